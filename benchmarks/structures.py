"""The UNets that are measured and counted, by name: Stable Diffusion 2.1, dense, pruned and as BK-SDM cuts it; and XL.

    dense           the teacher
    0.80, 0.55      the same share of every width vector, and that share of the MACs (`true`) of the dense UNet
    planned-...     those MACs as the planner spends them if all units of a width vector matter alike: shares differ by
                    what they cost. Those of SD 2.1 are files, which `python -m benchmarks.structures` writes.
    bk-sdm-base     one ResNet and one Transformer less in every block (arXiv:2305.15798)
    bk-sdm-small    base without the mid block
    bk-sdm-tiny     small without the innermost level

    ssd-1b, koala-700m    of XL alone, in the shapes of the published models

The tiny ones cut the mini world's UNet in the same ways, to rehearse on a CPU. That one has a single layer per block
already, so its `bk-sdm-base` is the dense UNet again: whatever is measured between the two is noise.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import write_atomic
from bilevel_fast.models.architecture import MINI, SD21, UNetConfig, sites
from bilevel_fast.models.macs import count
from bilevel_fast.models.sdxl import SDXL
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.budget import MacBudget
from bilevel_fast.pruning.planner import spend
from bilevel_fast.pruning.sdxl_shapes import structure as shaped
from bilevel_fast.pruning.uniform import uniform

NAMES = ("dense", "0.80", "0.55", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")
PLANNED = ("planned-0.80", "planned-0.55")
FOLDER = Path(__file__).with_suffix("")


@dataclass(frozen=True)
class Model:
    """A dense UNet and the sizes to measure it at."""

    name: str
    config: UNetConfig
    latent: int
    """Height and width of the latents."""
    text: int
    """Text tokens."""


def model(tiny: bool = False) -> Model:
    """SD 2.1 at 512 px, or the mini world."""
    return Model("mini", MINI, 16, 12) if tiny else Model("sd21", SD21, 64, 77)


@cache
def structure(name: str, tiny: bool = False) -> Structure:
    """One of `NAMES` or `PLANNED`; `structure(...).config` is the UNet to build it from.

    Raises:
        UserError: There is no such structure; the nearest are named.
    """
    if name not in (*NAMES, *PLANNED):
        raise UserError(f"no structure {name!r}{nearest(name, (*NAMES, *PLANNED))}")
    size = model(tiny)
    if name in PLANNED:
        return plan(name, size) if tiny else Structure.load(FOLDER / f"{name}.json")
    if name == "dense":
        return Structure.dense(size.config)
    if name.startswith("bk-sdm"):
        return Structure.dense(_bk_sdm(name, size.config))
    return _even(size, float(name))


def counted(unet: Literal["sd21", "sdxl"]) -> tuple[Model, dict[str, Structure]]:
    """What is counted and projected of a UNet: SD 2.1 at 512 px, SDXL at 1024 px, and students by name."""
    if unet == "sd21":
        return model(), {name: structure(name) for name in ("dense", "0.80", "0.55")}
    size = Model("sdxl", SDXL, 128, 77)
    shapes = {name: shaped(SDXL, name) for name in ("ssd-1b", "koala-700m")}
    return size, {"dense": Structure.dense(SDXL), "0.80": _even(size, 0.8), **shapes}


def _even(size: Model, budget: float) -> Structure:
    with torch.device("meta"):
        dense = UNet(size.config)
    return uniform(dense, MacBudget(budget, size.latent, size.text))


def plan(name: str, size: Model) -> Structure:
    """One of `PLANNED`, from nothing: without weights: all units of a width vector are equally important."""
    ones = {s.name: {w.name: torch.ones(w.units) for w in s.widths} for s in sites(size.config)}
    return spend(size.config, MacBudget(float(name.removeprefix("planned-")), size.latent, size.text), ones)


def write(folder: Path = FOLDER) -> None:
    """Write the planned structures of SD 2.1, with what they cost and where they come from."""
    size = model()
    for name in PLANNED:
        found = plan(name, size)
        macs = count(found, size.latent, size.text)
        provenance = {
            "command": "python -m benchmarks.structures",
            "planner": "bilevel_fast.pruning.planner.spend",
            "importance": "uniform within each width vector: no weights of SD 2.1 were at hand. Which units stay says "
            "nothing, the first ones do; how many of each vector is what was planned.",
            "latent": size.latent, "text": size.text, "budget": float(name.removeprefix("planned-")),
            "true_ratio": macs.ratio, "true_macs": macs.true, "official_macs": macs.official,
            "official_ratio": macs.official / count(Structure.dense(size.config), size.latent, size.text).official,
            "params": macs.params,
        }  # fmt: skip
        folder.mkdir(exist_ok=True)
        write_atomic(folder / f"{name}.json", json.dumps({"provenance": provenance, **found.to_dict()}).encode())
        print(f"{folder / name}.json  {macs.true / 1e9:.3f} GMAC true, {macs.official / 1e9:.3f} official")


def _bk_sdm(name: str, config: UNetConfig) -> UNetConfig:
    config = dataclasses.replace(config, layers_per_block=1)
    if name != "bk-sdm-base":
        config = dataclasses.replace(config, mid_block_type=None)
    if name == "bk-sdm-tiny":
        config = dataclasses.replace(
            config,
            block_out_channels=config.block_out_channels[:-1],
            num_heads=config.num_heads[:-1],
            down_block_types=config.down_block_types[:-1],
            up_block_types=config.up_block_types[1:],
        )
    return config


if __name__ == "__main__":
    write()
