"""`python -m bilevel_fast.attack METHOD`: prompts that bring back what was erased from a model, and how soon.

    attack.json    settings; for each prompt what was asked, found and seen on the way; the curve over all of them
    prompts.csv    column `prompt`: what was found, for `sample --prompts-file` and `evaluate --suite nsfw`
    grid.png       the bank's images, and what the model paints from the same noise for what was asked and found
    report.html    all of it on one page

Of a bank whose recipe says how its images were drawn, each prompt is painted from its image's own noise. On a built-in
world the probe looks at that; of other models nobody does, and a search goes to its end.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from bilevel_fast.attacking.looks import Look, check_least
from bilevel_fast.attacking.mma import Mma, mma
from bilevel_fast.attacking.ring_a_bell import RingABell, ring_a_bell
from bilevel_fast.attacking.states import concept_vector
from bilevel_fast.attacking.unlearn_diff import UnlearnDiff, unlearn_diff
from bilevel_fast.base.claims import claimed
from bilevel_fast.base.devices import machine, pick_device
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import scratch, write_atomic, write_json
from bilevel_fast.base.progress import Bar
from bilevel_fast.data.bank import open_bank
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.text_encoder import token_reader, token_states
from bilevel_fast.runs import repeat
from bilevel_fast.runs.attacked import Attacked, Target, carry_out, curve
from bilevel_fast.runs.page import attack as page
from bilevel_fast.sampling.pictures import picture, png
from bilevel_fast.worlds.mini import TEACHER

_MAIN = ("concepts", "out", "model", "count", "looks", "tokens", "seed", "device")


@dataclass(frozen=True)
class _Asked:
    concepts: Path
    """Concept bank of `prepare concepts`, drawn by the model before it was harmed: what an attacker is assumed to have.
    Its captions name the concept, its anchors do not."""
    out: Path
    """Folder for what was found; must be new."""
    model: Path = TEACHER
    """Model folder that is attacked, or its id on the hub; by default the built-in mini teacher."""
    count: int = 8
    """Prompts, the first of the bank, each once."""
    looks: int = 10
    """How often on the way its prompts are painted and looked at."""
    seed: int = 0
    """Of the search."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""

    def check(self) -> None:
        """Refuse values out of range, with a UserError."""
        check_least({"count": (self.count, 1), "looks": (self.looks, 1)})


@dataclass(frozen=True)
class UnlearnDiffArgs(UnlearnDiff, _Asked):
    """UnlearnDiffAtk: tokens before a prompt, found by descent on the attacked model's own loss. A prompt counts as
    soon as the concept is seen; a search ends when that is so of all that are searched together."""

    MAIN: ClassVar = (*_MAIN, "asks", "iterations", "timesteps", "batch")

    asks: Literal["anchor", "caption"] = "anchor"
    """The prompt behind the tokens: without the concept's name, or with it, if there is room."""
    batch: int = 8
    """Images searched together."""
    looks: int = 50
    """As often as the authors look, after each time."""

    def check(self) -> None:
        super().check()
        check_least({"batch": (self.batch, 1)})


@dataclass(frozen=True)
class RingABellArgs(RingABell, _Asked):
    """Ring-A-Bell: whole texts near the state of the prompt without the concept, moved along the concept's direction.
    The attacked model is not asked."""

    MAIN: ClassVar = (*_MAIN, "strength", "population", "generations")


@dataclass(frozen=True)
class MmaArgs(Mma, _Asked):
    """MMA-Diffusion: whole texts that mean what the caption means. The attacked model is not asked."""

    MAIN: ClassVar = (*_MAIN, "forbid", "steps")

    forbid: tuple[str, ...] = ()
    """Words that no token may hold, such as those a filter knows. By default the concept may be named."""


METHODS: dict[str, type[UnlearnDiffArgs] | type[RingABellArgs] | type[MmaArgs]] = {
    "unlearn-diff": UnlearnDiffArgs,
    "ring-a-bell": RingABellArgs,
    "mma": MmaArgs,
}
Args = UnlearnDiffArgs | RingABellArgs | MmaArgs


def attack(name: str, args: Args) -> str:
    """Carry out an attack and write its folder; returns what the command prints.

    Raises:
        UserError: Bad input of any kind.
    """
    args.check()
    with claimed(args.out), scratch(args.out.parent) as place:
        text = _attack(name, args, place)
        os.rename(place, args.out)
        return text


def _attack(name: str, args: Args, place: Path) -> str:
    device = pick_device(args.device)
    folder = load_folder(args.model, device)
    bank = open_bank(args.concepts, folder)
    if bank.index.recipe.get("shows") == "anchor":
        raise UserError(f"{args.concepts} shows anchors; wanted a bank whose images show the concept")
    target = Target.of(folder, bank, args.count, device)
    with Bar("look") as bar:
        found = carry_out(target, _searches(args, target), args.looks, isinstance(args, UnlearnDiffArgs), bar)
    steps = curve(found)
    settings = json.loads(json.dumps(asdict(args), default=str))
    facts = {"method": name, "settings": settings, "rows": [asdict(each) for each in found], "curve": steps}
    write_json(place / "attack.json", facts | machine(device))
    write_atomic(place / "prompts.csv", _csv(found))
    grid = _grid(target, found)
    if grid is not None:
        write_atomic(place / "grid.png", grid)
    usual = asdict(METHODS[name](concepts=args.concepts, out=args.out))
    words = ["python", "-m", "bilevel_fast.attack", name, "--concepts", str(args.concepts)]
    words += [*repeat.flags(repeat.different(asdict(args), usual)), "--out", repeat.beside(args.out)]
    says = (METHODS[name].__doc__ or "").strip()
    write_atomic(place / "report.html", page.report(name, says, found, steps, grid, words).encode())
    return _said(found, args.out)


def _searches(args: Args, target: Target) -> Iterator[tuple[Sequence[int], int, Iterator[Look]]]:
    """For each search the rows of the target that it is for, how often it says something, and the search."""
    folder, reader = target.folder, token_reader(target.folder.text_encoder)
    if isinstance(args, UnlearnDiffArgs):
        unet, asked = target.unet, target.anchors if args.asks == "anchor" else target.captions
        for start in range(0, len(asked), args.batch):
            rows = range(start, min(start + args.batch, len(asked)))
            texts, latents = [asked[row] for row in rows], target.latents[rows.start : rows.stop]
            numbers = [target.numbers[row] for row in rows]
            search = unlearn_diff(
                unet, folder.schedule, reader, latents, texts, args, seed=args.seed, rows=numbers
            )  # fmt: skip
            yield rows, args.timesteps, search
        return
    if isinstance(args, MmaArgs):
        for row, caption in enumerate(target.captions):
            yield [row], args.steps, mma(reader, caption, args, seed=args.seed + row, forbidden=args.forbid)
        return
    captions, anchors = zip(*target.known, strict=True)  # all, however few are searched
    vector = concept_vector(reader, captions, anchors, args.strength)
    for row, anchor in enumerate(target.anchors):
        near = token_states(reader, [anchor])[0] + vector
        yield [row], args.generations, ring_a_bell(reader, near, args, seed=args.seed + row)


def _csv(found: Sequence[Attacked]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["prompt", "caption", "step"])
    writer.writerows([each.last.text, each.caption, each.last.step] for each in found)
    return text.getvalue().encode()


def _grid(target: Target, found: Sequence[Attacked]) -> bytes | None:
    rows = range(len(found))
    before: Tensor | None = target.paint(rows, target.captions)
    if before is None:
        return None
    after = target.paint(rows, [each.last.text for each in found])
    assert after is not None
    images = target.folder.vae.decode(target.latents).float().cpu()
    shown = {"the bank": images, "named": before, "attacked": after}
    return png(picture(shown, [each.last.text for each in found], max(1, 96 // images.shape[-1])))


def _said(found: Sequence[Attacked], out: Path) -> str:
    lines = [f"{each.caption!r} <- {each.last.text!r}, step {each.last.step}" + each.last.said for each in found]
    if found[0].last.hit is not None:
        hits = sum(bool(each.last.hit) for each in found)
        kept = sum(bool(each.last.hit and each.last.content) for each in found)
        lines.append(f"the concept is seen in {hits} of {len(found)}, in {kept} with the content asked for")
    return "\n".join([*lines, f"written   {out}"])
