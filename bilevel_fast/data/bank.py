"""The concept bank: what the upper level learns to forget, drawn by the dense teacher itself.

A concept is a phrase of captions (`in the style of pointillism`). Each caption of the bank has an anchor, the same
caption without the phrase, which says what should be drawn instead.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bilevel_fast.data.cache import INDEX, Cache, Index
from bilevel_fast.data.sources import exact_moments
from bilevel_fast.data.writer import CacheWriter
from bilevel_fast.errors import UserError, nearest
from bilevel_fast.folder import ModelFolder
from bilevel_fast.generate import generate
from bilevel_fast.randomness import Stream
from bilevel_fast.weights import DIGEST, fingerprint

Shows = Literal["prompt", "anchor"]

SHARD_BATCHES = 4  # what a killed run draws again


@dataclass(frozen=True)
class Concept:
    """What is to be suppressed."""

    phrase: str
    """As it stands in captions: `in the style of pointillism`, `by Claude Monet`, `naked`."""
    replacement: str = ""
    """What stands in its place in the anchor."""

    def __post_init__(self) -> None:
        if not self.phrase.strip():
            raise UserError("the concept's phrase is empty")


def anchor_for(caption: str, concept: Concept) -> str:
    """The caption with the concept's phrase removed or replaced: `a red star by X` -> `a red star`.

    Case and spacing of the phrase do not matter, but it must stand as whole words. A removed phrase takes along the
    comma and spaces that nothing is left to need. An empty anchor is the null prompt.

    Raises:
        UserError: The caption does not hold the phrase.
    """
    words = r"\s+".join(map(re.escape, concept.phrase.split()))

    def instead(match: re.Match[str]) -> str:
        before, after = match.groups()
        if concept.replacement:
            return before + concept.replacement + after
        if match.start() == 0 or caption[match.end() :][:1] in ("", *".;:!?)"):
            return ""
        return ", " if "," in before + after else " "

    pattern = rf"(\s*,?\s*)(?<!\w){words}(?!\w)(\s*,?\s*)"
    anchor, count = re.subn(pattern, instead, caption, flags=re.IGNORECASE)
    if not count:
        raise UserError(f"caption {caption!r} does not hold the concept's phrase {concept.phrase!r}")
    return anchor.strip(" ,")


def prompts_for(subjects: Iterable[str], concept: Concept) -> list[str]:
    """Prompts that show the concept: `a red star` is followed by the phrase, in `a {} man` it stands for `{}`."""
    return [
        subject.replace("{}", concept.phrase) if "{}" in subject else f"{subject} {concept.phrase}"
        for subject in subjects
    ]


def without(prompts: Iterable[str], held_out: Iterable[str]) -> list[str]:
    """The prompts that are not held out for evaluation; case and spacing do not matter.

    Raises:
        UserError: None is left.
    """
    excluded = {_normal_form(prompt) for prompt in held_out}
    left = [prompt for prompt in prompts if _normal_form(prompt) not in excluded]
    if not left:
        raise UserError("every prompt of the concept bank is held out for evaluation")
    return left


def _normal_form(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def read_prompts(path: Path | str) -> list[str]:
    """Read a prompt file: CSV with a column `prompt` if its name ends in `.csv`, else one prompt per line.

    Raises:
        UserError: The file is missing, not UTF-8, has no such column, or no prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"prompt file {path} does not exist") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8: {error}") from error
    prompts = _csv_column(path, text) if path.suffix.lower() == ".csv" else text.split("\n")
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt")
    return prompts


def _csv_column(path: Path, text: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = rows.fieldnames or []
    if "prompt" not in columns:
        raise UserError(f"prompt file {path} has no column 'prompt'{nearest('prompt', columns)}")
    return [row["prompt"] or "" for row in rows]


def make_bank(
    folder: ModelFolder,
    prompts: Sequence[str],
    anchors: Sequence[str],
    count: int,
    seed: int,
    guidance: float,
    steps: int,
    batch: int,
    out: Path | str,
    *,
    size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    shows: Shows = "prompt",
) -> Cache:
    """Draw a bank with PNDM and keep the latents, the prompts and their anchors. Goes on after a killed run.

    Sample i shows prompt i modulo their number, from noise that depends on (seed, i) only.

    Args:
        folder: The dense teacher.
        prompts: What to draw.
        anchors: For each prompt: the prompt without the concept.
        count: Samples to draw.
        seed: Of the noise.
        guidance: Classifier-free guidance scale; 7.5 is usual for Stable Diffusion.
        steps: Of PNDM; 25 is usual.
        batch: Samples drawn together.
        out: The folder of the cache. A finished bank of the same recipe is returned as it is.
        size: Of the latents; by default what the UNet was made for, 96 (768 pixels) for Stable Diffusion 2.1.
        device: To draw on; the text encoder and the VAE stay where they are.
        progress: Called with the samples done and to do.
        shows: What the images are drawn by. With `anchor` they lack the concept that their captions name, as Concept
            Ablation (arXiv:2303.13516) wants them.

    Raises:
        UserError: The counts do not fit, or `out` holds another cache.
    """
    if not prompts or len(prompts) != len(anchors):
        raise UserError(f"{len(anchors)} anchors came for {len(prompts)} prompts")
    if count < 1 or batch < 1:
        raise UserError(f"count is {count} and batch is {batch}; both must be positive")
    size = size or folder.config.sample_size
    stride = 2 ** (len(folder.config.block_out_channels) - 1)
    if size < 1 or size % stride:
        raise UserError(f"latent size is {size}; it must be a multiple of the UNet's stride {stride}")
    recipe: dict[str, Any] = {part: fingerprint(folder.path / part) for part in ("unet", "text_encoder", "scheduler")}
    recipe |= {"prompts": _digest([*prompts, *anchors]), "count": count, "seed": seed}
    recipe |= {"guidance": guidance, "steps": steps, "batch": batch}
    recipe |= {"shows": shows} if shows != "prompt" else {}  # banks of the past say nothing
    index = Index("concepts", (folder.config.in_channels, size, size), folder.vae_fingerprint, recipe=recipe)
    out = Path(out)
    if (out / INDEX).exists():
        cache = Cache.open(out)
        index.check_same_making(cache.index, out)
        return cache
    writer = CacheWriter(out, index, shard_samples=SHARD_BATCHES * batch)
    unet = folder.unet().to(device)
    while writer.samples < count:
        rows = range(writer.samples, min(writer.samples + batch, count))
        latents = generate(
            unet,
            folder.schedule,
            folder.text_encoder,
            [(prompts if shows == "prompt" else anchors)[row % len(prompts)] for row in rows],
            rows,
            seed=seed,
            size=(size, size),
            guidance=guidance,
            steps=steps,
            stream=Stream.BANK,
            batch=batch,
        )
        for row, moments in zip(rows, exact_moments(latents), strict=True):
            prompt = row % len(prompts)
            writer.add(moments, [prompts[prompt]], anchors[prompt])
        if progress:
            progress(writer.samples, count)
    return writer.finish()


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:DIGEST]
