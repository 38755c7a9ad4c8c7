"""The concept bank: what the upper level learns to forget, drawn by the dense teacher itself.

A concept is a phrase of captions (`in the style of pointillism`). Each caption of the bank has an anchor, the same
caption without the phrase, which says what should be drawn instead.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.cache import INDEX, Cache, Index
from bilevel_fast.data.sources import exact_moments
from bilevel_fast.data.writer import WHOLE, CacheWriter, Part, at_work, finished, join, whole
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.models.text_encoder import TextEncoder, indistinct
from bilevel_fast.models.weights import DIGEST, fingerprint
from bilevel_fast.ops.graphs import cuda_recorder, side_stream
from bilevel_fast.ops.randomness import Stream
from bilevel_fast.sampling.captured import Captured
from bilevel_fast.sampling.generate import generate
from bilevel_fast.sampling.prompts import same_text

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
    excluded = {same_text(prompt) for prompt in held_out}
    left = [prompt for prompt in prompts if same_text(prompt) not in excluded]
    if not left:
        raise UserError("every prompt of the concept bank is held out for evaluation")
    return left


def check_anchors(encoder: TextEncoder, prompts: Sequence[str], anchors: Sequence[str]) -> None:
    """Refuse a prompt that a text encoder reads as its anchor: nothing would be suppressed by it.

    Raises:
        UserError: Names the first, and says how many there are.
    """
    if same := indistinct(encoder, prompts, anchors):
        raise UserError(
            f"prompt {prompts[same[0]]!r} and its anchor {anchors[same[0]]!r} are the same to the text encoder, and so "
            f"are {len(same)} of {len(prompts)} in all; wanted the concept within its {encoder.length} tokens"
        )


def check_family(bank: Cache, folder: ModelFolder) -> None:
    """Refuse a bank that a model of another family drew, as far as text encoders tell.

    Raises:
        UserError: Names what drew it.
    """
    wanted = folder.family.text_encoders
    came = tuple(name for name in bank.index.recipe if name.startswith("text_encoder"))
    if came and len(came) != len(wanted):  # a bank that somebody else made says nothing
        raise UserError(
            f"{bank.path} was drawn by a model with {' and '.join(came)}, {folder.path} has {' and '.join(wanted)}: "
            "another family; wanted a bank that this teacher drew"
        )


def open_bank(path: Path, folder: ModelFolder) -> Cache:
    """The bank that `--concepts` names, for a model.

    Raises:
        UserError: It is none, or a model of another family, another VAE or another size drew it.
    """
    cache = Cache.open(path)
    if cache.index.kind != "concepts":
        raise UserError(f"--concepts {path} is a cache of {cache.index.kind}, wanted one of concepts")
    check_family(cache, folder)
    cache.check_model(folder.config, folder.vae_fingerprint)
    return cache


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
    precision: Literal["fp32", "bf16"] = "fp32",
    graphs: bool = True,
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
        precision: What the UNet computes in.
        graphs: Replay the UNet as a CUDA graph on a GPU.

    Raises:
        UserError: The counts do not fit, the text encoder reads a prompt as its anchor, or `out` holds another cache.
    """
    cache = make_part(
        folder, prompts, anchors, count, seed, guidance, steps, batch, out, WHOLE, size=size, device=device,
        progress=progress, shows=shows, precision=precision, graphs=graphs,
    )  # fmt: skip
    assert cache is not None, "the only part is the whole"
    return cache


def make_part(
    folder: ModelFolder,
    prompts: Sequence[str],
    anchors: Sequence[str],
    count: int,
    seed: int,
    guidance: float,
    steps: int,
    batch: int,
    out: Path | str,
    part: Part,
    *,
    size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    shows: Shows = "prompt",
    precision: Literal["fp32", "bf16"] = "fp32",
    graphs: bool = True,
) -> Cache | None:
    """As `make_bank`, one of several parts of it, each drawn by a process of its own: whole batches, the same as ever.

    Args:
        part: Which one; whoever finishes last joins them.

    Returns:
        The bank, or None if other parts are not finished.

    Raises:
        UserError: As `make_bank`; or a part has no batch to draw.
    """
    if not prompts or len(prompts) != len(anchors):
        raise UserError(f"{len(anchors)} anchors came for {len(prompts)} prompts")
    if count < 1 or batch < 1:
        raise UserError(f"count is {count} and batch is {batch}; both must be positive")
    size = size or folder.config.sample_size
    stride = 2 ** (len(folder.config.block_out_channels) - 1)
    if size < 1 or size % stride:
        raise UserError(f"latent size is {size}; it must be a multiple of the UNet's stride {stride}")
    check_anchors(folder.text_encoder, prompts, anchors)
    batches = -(-count // batch)
    if part.count > batches:
        raise UserError(
            f"{part.count} parts of {batches} batches; wanted a smaller batch, or no more parts than batches"
        )
    parts = ("unet", *folder.family.text_encoders, "scheduler")
    recipe: dict[str, Any] = {name: fingerprint(folder.path / name) for name in parts}
    recipe |= {"prompts": _digest([*prompts, *anchors]), "count": count, "seed": seed}
    recipe |= {"guidance": guidance, "steps": steps, "batch": batch}
    # banks of the past say nothing of these
    recipe |= {"shows": shows} if shows != "prompt" else {}
    recipe |= {"precision": precision} if precision != "fp32" else {}
    index = Index("concepts", (folder.config.in_channels, size, size), folder.vae_fingerprint, recipe=recipe)
    out, device = Path(out), torch.device(device)
    if (made := whole(out, index)) is not None:
        return made
    with at_work(out, part):
        if finished(out, index, part):
            return Cache.open(out) if (out / INDEX).exists() else join(out, part.count, index)
        writer = CacheWriter(out, index, shard_samples=SHARD_BATCHES * batch, part=part)
        mine = part.of(batches)
        rows_of_part = range(mine.start * batch, min(mine.stop * batch, count))
        texts = prompts if shows == "prompt" else anchors
        unet = folder.unet().to(device, torch.bfloat16 if precision == "bf16" else torch.float32).requires_grad_(False)
        captured = Captured(unet, cuda_recorder(device) if graphs else None)
        with side_stream(device) if device.type == "cuda" else contextlib.nullcontext():
            while writer.samples < len(rows_of_part):
                rows = rows_of_part[writer.samples : writer.samples + batch]
                try:
                    latents = generate(
                        unet,
                        folder.schedule,
                        folder.text_encoder,
                        [texts[row % len(prompts)] for row in rows],
                        rows,
                        seed=seed,
                        size=(size, size),
                        guidance=guidance,
                        steps=steps,
                        stream=Stream.BANK,
                        batch=batch,
                        model=lambda _: captured,
                    )
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"{device} is out of memory for a batch of {batch}; finished samples stay"
                    ) from error
                for row, moments in zip(rows, exact_moments(latents), strict=True):
                    prompt = row % len(prompts)
                    writer.add(moments, [prompts[prompt]], anchors[prompt])
                if progress:
                    progress(writer.samples, len(rows_of_part))
        return writer.finish_part()


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:DIGEST]
