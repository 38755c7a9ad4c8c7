"""What must be true of what a stage leaves: each check looks at files alone, and returns numbers for the stage's row.

A check is (the rehearsal's folder, the rows of the stages that ran) -> numbers, and raises UserError in one line.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import open_safetensors, read_json
from bilevel_fast.base.tensors import read_tensors
from bilevel_fast.data.cache import Cache
from bilevel_fast.models.architecture import UNetConfig
from bilevel_fast.models.folder import UNET_STEM
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure

LATENT, TEXT = 64, 77
"""At which MACs are counted: 512 pixels."""

STEPS = 4
"""Lower steps of the training; two upper ones among them."""
HALF = STEPS // 2
"""The training is killed once its checkpoint of this step is there."""
STUDENT = "uniform"
"""Which student is trained and edited: of random weights, magnitudes keep half as many parameters again for the same
MACs, and training those holds more than 20 GiB."""

Row = dict[str, Any]
Check = Callable[[Path, Mapping[str, Row]], Row]


def expect(what: str, found: Any, wanted: Any) -> None:
    """Raise UserError unless both are equal."""
    if found != wanted:
        raise UserError(f"{what} is {found}, wanted {wanted}")


def finite(file: Path) -> int:
    """How many numbers a file of weights holds.

    Raises:
        UserError: One is not finite.
    """
    total = 0
    for name, tensor in read_tensors(file).items():
        if not tensor.isfinite().all():
            raise UserError(f"{file}: {name} is not finite")
        total += tensor.numel()
    return total


def unet_file(folder: Path) -> Path:
    return folder / "unet" / f"{UNET_STEM}.safetensors"


def folder(out: Path, rows: Mapping[str, Row]) -> Row:
    """The teacher has as many parameters as its config says; nobody reads them yet."""
    place = out / "sd21" / "unet"
    handle = open_safetensors(place / f"{UNET_STEM}.fp16.safetensors")
    shapes = [handle.get_slice(name).get_shape() for name in handle.keys()]  # noqa: SIM118
    found, size = 0, 1
    for shape in shapes:
        for side in shape:
            size *= side
        found, size = found + size, 1
    expect(f"the number of parameters in {place}", found, count(dense(place), LATENT, TEXT).params)
    return {"params": found, "bytes": sum(file.stat().st_size for file in (out / "sd21").rglob("*.safetensors"))}


def dense(unet: Path) -> Structure:
    return Structure.dense(UNetConfig.load(unet))


def cache(name: str, images: int, latent: int) -> Check:
    def check(out: Path, rows: Mapping[str, Row]) -> Row:
        found = Cache.open(out / name)
        expect(f"the number of images in {name}", len(found), images)
        expect(f"the side of the latents in {name}", found.latent_shape[1:], (latent, latent))
        return {"images": images}

    return check


def pruned(name: str, budget: float) -> Check:
    def check(out: Path, rows: Mapping[str, Row]) -> Row:
        structure = Structure.load(out / name / "unet" / "structure.json")
        # the budget is one of MACs at the size that the model was made for
        ratio = count(structure, structure.config.sample_size, TEXT).ratio
        if not 0.5 * budget < ratio <= budget or structure.is_dense:
            raise UserError(f"{name} has {ratio:.4f} of the MACs, wanted at most {budget:g}, and not much less")
        macs = count(structure, LATENT, TEXT)
        expect(f"the number of parameters of {name}", finite(unet_file(out / name)), macs.params)
        return {"macs": macs.ratio, "params": macs.params}

    return check


def trained(out: Path, rows: Mapping[str, Row]) -> Row:
    """Killed once and resumed: all steps, once each; finite weights, and not those that it began with."""
    run, log = out / "run", (out / "logs" / "train.log").read_text(encoding="utf-8", errors="replace")
    if f"resuming after lower step {HALF}," not in log:
        raise UserError(f"{out / 'logs' / 'train.log'} does not say that the training went on after step {HALF}")
    summary = read_json(run / "summary.json")
    expect("the number of lower and upper steps", (summary["lower_steps"], summary["upper_steps"]), (STEPS, 2))
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    expect("the number of images, step by step", [line["images"] for line in lines], [*range(1, STEPS + 1)])
    params = finite(unet_file(run / "student"))
    moved, tensors = changed(unet_file(out / STUDENT), unet_file(run / "student"))
    if moved < tensors / 2:
        raise UserError(f"training moved {moved} of {tensors} tensors")
    return {"lower_steps": STEPS, "upper_steps": 2, "params": params, "moved": moved, "tensors": tensors}


def changed(before: Path, after: Path) -> tuple[int, int]:
    """How many tensors of two files differ, and how many there are."""
    old, new = read_tensors(before), read_tensors(after)
    expect(f"the names of the tensors in {after}", sorted(new), sorted(old))
    return sum(not old[name].equal(new[name]) for name in old), len(old)


def erased(out: Path, rows: Mapping[str, Row]) -> Row:
    """Keys and values of the cross-attentions moved, and nothing else."""
    finite(unet_file(out / "erased"))
    expect("the number of recorded edits", len(read_json(out / "erased" / "erased.json")["edits"]), 1)
    old, new = read_tensors(unet_file(out / STUDENT)), read_tensors(unet_file(out / "erased"))
    moved = {name for name in old if not old[name].equal(new[name])}
    wanted = {name for name in old if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    if not moved or moved - wanted:
        raise UserError(
            f"the edit moved {len(moved)} tensors, {len(moved - wanted)} of them no keys or values of texts"
        )
    return {"moved": len(moved)}


def drawn(side: int) -> Check:
    def check(out: Path, rows: Mapping[str, Row]) -> Row:
        files = sorted((out / "drawn").glob("*.png"))
        expect("the number of pictures in drawn", len(files), 2)
        for file in files:
            expect(f"the size of {file}", Image.open(file).size, (side, side))
        return {"images": len(files)}

    return check


def picture(name: str, side: int) -> Check:
    def check(out: Path, rows: Mapping[str, Row]) -> Row:
        expect(f"the size of {name}", Image.open(out / name).size, (side, side))
        return {"images": 1}

    return check


def evaluated(out: Path, rows: Mapping[str, Row]) -> Row:
    """NudeNet brings its weights: it has seen both pictures."""
    (result,) = read_json(out / "eval.json")["results"].values()
    found = result["metrics"]["resilience"]
    if found["value"] is None:
        raise UserError(f"eval.json: resilience was not measured: {found['not_measured']}")
    expect("the number of pictures that were judged", found["n"], 2)
    return {"resilience": found["value"], "images": 2}


def memory(within: float | None) -> Check:
    """The memory model and what the process holds besides, against what the training held."""

    def check(out: Path, rows: Mapping[str, Row]) -> Row:
        found = read_json(out / "memory.json")
        predicted = (found["model"] + found["besides"]) / 2**30
        held = rows["train"]["held_gib"]
        if within is not None and not abs(predicted / held - 1) <= within:
            raise UserError(
                f"the model predicts {predicted:.2f} GiB, the training held {held:.2f}; wanted within {within:.0%}"
            )
        return {"predicted_gib": predicted, "held_by_train_gib": held, "ratio": predicted / held, **found}

    return check


def timed(out: Path, rows: Mapping[str, Row]) -> Row:
    """Every UNet was timed, ours and diffusers'."""
    lines = [json.loads(line) for line in (out / "speed.jsonl").read_text().splitlines()]
    missing = [f"{line['case']} {line['provider']}: {line['reason']}" for line in lines if line["value"] is None]
    if missing or not lines:
        raise UserError("not timed: " + ("; ".join(missing) or "anything"))
    return {"rows": len(lines)}
