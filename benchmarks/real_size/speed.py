"""Does a pruned UNet of real size get as much faster on a CPU as its MACs promise? Ours and diffusers', one pass each.

    python -m benchmarks.real_size.speed rows.jsonl            SD 2.1 at 64 x 64 latents, batch 1, fp32
    python -m benchmarks.real_size.speed rows.jsonl --tiny     the mini world's UNet, for tests

The dense UNet, 0.80 and 0.55 of its MACs spread evenly, and BK-SDM-small; all of them interleaved, in rounds. Both ways
to run a UNet share its weights, which are random, so that all eight fit into 20 GiB. Rows are those of
`benchmarks.speed.unet`, and `times_faster_than_diffusers` besides.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from benchmarks.measure import interleaved
from benchmarks.speed.diffusers_unet import diffusers_unet
from benchmarks.speed.unet import Subject, make_inputs, rows_of
from benchmarks.speed.unet_providers import Inputs, distance, plain
from benchmarks.structures import model, structure
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_atomic
from bilevel_fast.models.unet import UNet

STRUCTURES = ("dense", "0.80", "0.55", "bk-sdm-small")
BOUND = 1e-4
"""How far apart, relative to each other, both outputs may be in fp32."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    out: Annotated[Path, tyro.conf.Positional]
    """Rows, one a line."""
    tiny: bool = False
    """The mini world's UNet."""
    rounds: int = 5
    """Rounds that count; one more comes first."""


def diffusers(unet: UNet, inputs: Inputs) -> Callable[[], Tensor]:
    theirs = diffusers_unet(unet.structure, unet.state_dict(), shared=True).eval().requires_grad_(False)

    def call() -> Tensor:
        with torch.no_grad():
            return theirs(*inputs).sample

    return call


def measure(tiny: bool, rounds: int) -> Iterator[Row]:
    """The rows.

    Raises:
        UserError: Both ways to run a UNet compute something else.
    """
    size = model(tiny)
    inputs = make_inputs(size, 1, torch.device("cpu"), torch.float32)
    subjects: list[Subject] = []
    for name in STRUCTURES:
        kept = structure(name, tiny)
        torch.manual_seed(0)
        unet = UNet(kept.config, kept).eval().requires_grad_(False)
        calls = {"ours": plain(unet, inputs, None), "diffusers": diffusers(unet, inputs)}
        apart = distance(calls["ours"](), calls["diffusers"]())
        if not apart <= BOUND:
            raise UserError(f"{name}: ours and diffusers' are {apart:.2g} apart, wanted at most {BOUND:.0e}")
        subjects += [Subject(name, unet, way, call, facts={"error": apart}) for way, call in calls.items()]
    timings = interleaved({str(i): s.call for i, s in enumerate(subjects) if s.call}, rounds, warmup=1)
    for i, timing in timings.items():
        subjects[int(i)].timing = timing
    load = {"load": os.getloadavg()[0]}
    rows = list(rows_of(subjects, size, 1))
    for ours, theirs in zip(subjects[::2], subjects[1::2], strict=True):
        assert ours.timing
        assert theirs.timing
        ratio = ours.timing.times_faster_than(theirs.timing)
        like = next(row for row in rows if row["provider"] == "ours" and row["config"]["structure"] == ours.name)
        value = {"value": ratio.p50, "p20": ratio.p20, "p80": ratio.p80}
        rows.append(like | {"metric": "times_faster_than_diffusers", "unit": "x", **value})
    for row in rows:
        yield row | {"suite": "real_size", "dtype": "float32", "rounds": rounds} | load


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.real_size.speed", __doc__)
    if settings.rounds < 2:
        raise UserError(f"--rounds {settings.rounds}, wanted at least 2")
    rows = list(measure(settings.tiny, settings.rounds))
    write_atomic(settings.out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    for row in rows:
        spread = f"({row['p20']:.4g} .. {row['p80']:.4g})"
        print(
            f"{row['case']:<24}{row['provider']:<10}{row['metric']:<28}{row['value']:>10.4g} {row['unit']:<3}{spread}"
        )


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
