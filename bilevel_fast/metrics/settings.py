"""Settings of `evaluate --suite style|nsfw|coco`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Folders:
    """Settings of the suites that measure folders of images."""

    suite: Literal["mini", "style", "nsfw", "coco"] = "mini"
    """`mini` judges models of a built-in world; `style` (CLIP score, CP score, CSD), `nsfw` (NudeNet) and `coco`
    (FID, CLIP score) measure images that `sample --prompts-file ... --folder ...` drew."""
    images: tuple[Path, ...] = ()
    """Folders of images of the model that is judged, one for each of --prompts."""
    prompts: tuple[Path, ...] = ()
    """What they were drawn from: tables of artists, I2P, MMA, coco_30k.csv; captions_*.json; text, a prompt a line."""
    reference: tuple[Path, ...] = ()
    """Compared with. style: the distilled model's folders, one per prompt file; nsfw: the dense model's; coco: real
    images, or statistics of them: .npz with mu and sigma, or .safetensors."""
    out: Path = Path("eval.json")
    """All results; the table goes beside it, as .md. An existing file is refused."""
    clip_weights: Path | None = None
    """OpenAI's ViT-B-32.pt, or another of its files; or weights of --clip-model."""
    clip_model: str | None = None
    """Architecture of open_clip that --clip-weights are of, such as ViT-B-32-quickgelu. Default: OpenAI's own file."""
    csd_weights: Path | None = None
    """The checkpoint that the authors of CSD publish (ViT-L)."""
    inception_weights: Path | None = None
    """pt_inception-2015-12-05-6726825d.pth, for FID."""
    statistics_out: Path | None = None
    """coco: write the statistics of a reference folder there, .npz or .safetensors."""
    draws: int = 1000
    """Of the bootstrap, for the intervals."""
    fid_draws: int = 20
    """Of the bootstrap of FID; one takes seconds. 0 leaves its interval out."""
    batch: int = 32
    """Images at a time."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one. NudeNet stays on the CPU."""


def given(config: Folders, but: tuple[str, ...] = ("suite",)) -> list[str]:
    """The flags of `Folders` whose values are not the defaults."""
    changed = (f.name for f in fields(Folders) if f.name not in but and getattr(config, f.name) != f.default)
    return ["--" + name.replace("_", "-") for name in changed]
