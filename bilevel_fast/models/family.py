"""Model families: which component classes make a folder one of them, how these are read, and what differs between them.

A further family is a line of `FAMILIES` and the loaders that it names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import read_json
from bilevel_fast.models.autoencoder import Autoencoder, KLAutoencoder
from bilevel_fast.models.diffusion import SCHEDULERS
from bilevel_fast.models.kinds import CONVERT, is_xl, refuse_file, refuse_others
from bilevel_fast.models.mini import MiniTextEncoder, PixelUnshuffleVAE
from bilevel_fast.models.text_encoder import ClipTextEncoder, TextEncoder
from bilevel_fast.models.text_encoder_xl import XlTextEncoder

Device = torch.device | str


@dataclass(frozen=True)
class Family:
    """One kind of text-to-image model.

    Attributes:
        components: For each component of a folder, the classes that can be read, by name: whoever wrote the folder may
            import them from elsewhere. The text encoders, their number and class, decide which family a folder is of.
        text_encoder: Reads it from a model folder, to a device and a dtype.
        vae: Reads it from a model folder, to a device and a dtype.
        guidance: Classifier-free guidance scale that its models are sampled with.
        largest_latent: Side of the latents that images for evaluation have at most; None leaves it to the UNet.
        world: The built-in world that its models draw (`bilevel_fast.worlds`); None draws photographs and the like.
        pipeline: What `_class_name` of `model_index.json` says, where that decides between families.
        closed_vocabulary: Whether its text encoder refuses prompts with words that it does not know.
    """

    components: Mapping[str, tuple[str, ...]]
    text_encoder: Callable[[Path, Device, torch.dtype], TextEncoder]
    vae: Callable[[Path, Device, torch.dtype], Autoencoder]
    guidance: float = 7.5
    largest_latent: int | None = None
    world: str | None = None
    pipeline: str | None = None
    closed_vocabulary: bool = False

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Its components that are text encoders."""
        return tuple(component for component in self.components if component.startswith("text_encoder"))


UNETS = ("UNet2DConditionModel", "PrunedUNet")
"""The second one is what `exporting` puts into a student's folder for diffusers: for here, the same files."""

MINI_INDEX = {
    "_class_name": "MiniPipeline",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["bilevel_fast.models.mini", "MiniTextEncoder"],
    "tokenizer": ["bilevel_fast.models.mini", "WordTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["bilevel_fast.models.mini", "PixelUnshuffleVAE"],
}
"""The `model_index.json` of a mini world's model."""
EMOJI_INDEX = {**MINI_INDEX, "_class_name": "EmojiPipeline"}
"""That of an emoji world's model: the same parts, another world."""


def _drawn(index: Mapping[str, Any], world: str) -> "Family":
    """The models of a built-in world, by the `model_index.json` that its teacher has."""
    return Family(
        components={part: (pair[1],) for part, pair in index.items() if part != "_class_name"} | {"unet": UNETS},
        text_encoder=lambda folder, device, dtype: MiniTextEncoder.load(folder).to(device, dtype),
        vae=lambda folder, device, dtype: PixelUnshuffleVAE.load(folder / "vae"),
        guidance=3.0,
        world=world,
        pipeline=index["_class_name"],
        closed_vocabulary=True,
    )


FAMILIES = {
    "stable-diffusion": Family(
        components={
            "scheduler": tuple(SCHEDULERS),
            "text_encoder": ("CLIPTextModel",),
            "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
            "unet": UNETS,
            "vae": ("AutoencoderKL",),
        },
        text_encoder=ClipTextEncoder.load,
        vae=lambda folder, device, dtype: KLAutoencoder.load(folder / "vae", device, dtype),
        largest_latent=64,  # 512 pixels, as the paper measures; Stable Diffusion 2.1 was made for 768
    ),
    "stable-diffusion-xl": Family(
        components={
            "scheduler": tuple(SCHEDULERS),
            "text_encoder": ("CLIPTextModel",),
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
            "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
            "unet": UNETS,
            "vae": ("AutoencoderKL",),
        },
        text_encoder=XlTextEncoder.load,
        vae=lambda folder, device, dtype: KLAutoencoder.load(folder / "vae", device, dtype, upcast=True),
        guidance=5.0,
    ),
    "mini": _drawn(MINI_INDEX, "mini"),
    "emoji": _drawn(EMOJI_INDEX, "emoji"),
}
"""By name. A folder whose text encoder is of no family is refused as the first one's with as many text encoders; of two
with the same components, `_class_name` says which it is, and the first one is taken where it names neither."""


def family_of(path: Path) -> Family:
    """The family of a model folder, by its `model_index.json`.

    Raises:
        UserError: The folder or the file is missing, it holds something else than a text-to-image model, or a component
            is missing or of a class that cannot be read.
    """
    if not path.exists():
        raise UserError(f"model folder {path} does not exist; wanted a folder on this machine in the diffusers layout")
    if not path.is_dir():
        refuse_file(path)
        raise UserError(
            f"{path} is a checkpoint in one file; write its folder, once: "
            f"{CONVERT} --file {path} --config-from FOLDER --out FOLDER"
        )
    refuse_others(path)
    file, families = path / "model_index.json", list(FAMILIES.values())
    index = read_json(file)
    encoder, two = _class_name(file, index, "text_encoder"), is_xl(index)
    families = [family for family in families if two == ("text_encoder_2" in family.components)]
    said = [family for family in families if encoder in family.components["text_encoder"]]
    said.sort(key=lambda family: family.pipeline != index.get("_class_name"))  # stable: the first one stays so
    for component, known in (said or families)[0].components.items():
        if (found := _class_name(file, index, component)) not in known:
            read_anywhere = {name for family in families for name in family.components.get(component, ())}
            raise UserError(
                f"{file}: {component} {found!r} is not supported{nearest(found, known if said else read_anywhere)}"
            )
    return said[0]


def _class_name(file: Path, index: dict[str, Any], component: str) -> str:
    match index.get(component):
        case [str(), str(name)]:
            return name
        case None:
            raise UserError(f"{file}: {component} is missing")
        case other:
            raise UserError(f"{file}: {component} is {other!r}, wanted [library, class]")
