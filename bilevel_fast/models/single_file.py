"""A checkpoint in one file, in the original layout of Stable Diffusion, to a model folder.

    model.diffusion_model.*    the UNet
    model_ema.*                its moving average, in names without dots, where training kept one: it is what is drawn
                               with, and what the published folders hold
    first_stage_model.*        the VAE
    cond_stage_model.*         the text encoder: CLIP's for 1.x (`transformer.`), OpenCLIP's for 2.x (`model.`)

Weights are all that it holds. Tokenizer, configs and scheduler are those of a folder of the same model, which names the
prediction type as well: it cannot be read off the shapes. Names are converted by diffusers, numbers stay as they are.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import aside_of, open_safetensors, read_json, replacing, sync_folder, write_json
from bilevel_fast.base.tensors import read_tensors, write_tensors
from bilevel_fast.models.copying import component_files, copy_file
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.family import FAMILIES, family_of
from bilevel_fast.models.folder import UNET_STEM, load_folder, load_unet
from bilevel_fast.models.hub import local
from bilevel_fast.models.kinds import refuse_file

_CLIP, _OPEN_CLIP, _VAE = "cond_stage_model.transformer.", "cond_stage_model.model.", "first_stage_model."
_FILES = {
    "unet": f"{UNET_STEM}.safetensors", "vae": f"{UNET_STEM}.safetensors", "text_encoder": "model.safetensors"
}  # fmt: skip


def convert_file(file: Path, source: Path, out: Path) -> bool:
    """Write the model folder of a checkpoint; whole or not at all.

    Args:
        file: A `.safetensors` file in the original layout; in any precision, which is kept.
        source: A folder in the diffusers layout of the model that it descends from, or its id on the hub. Its weights
            are not read and need not be there.
        out: The new folder. It loads before it is there.

    Returns:
        Whether the weights are those of a moving average.

    Raises:
        UserError: `file` is something else, lacks a component, or does not fit the configs of `source`; `source` is no
            Stable Diffusion; or `out` exists.
        OSError: It cannot be written; nothing is left.
    """
    if out.exists():
        raise UserError(f"{out} exists already; delete it or choose another folder")
    refuse_file(file)
    source = local(source, weights=False)
    if family_of(source) is not FAMILIES["stable-diffusion"]:
        raise UserError(f"{source} is of another family; wanted a folder of Stable Diffusion 1.x or 2.x")
    tensors, averaged = _averaged(read_tensors(file), file)
    _check_prediction(file, tensors, source)
    weights = _components(file, tensors, source)
    aside = aside_of(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(aside, source, weights)
        try:
            load_folder(aside)
            load_unet(aside, mapped=True)
        except UserError as error:
            said = str(error).replace(f"{aside}/", "")
            raise UserError(f"{file} does not fit the configs of {source}: {said}") from error
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(out.parent)
    return averaged


def _averaged(tensors: dict[str, Tensor], file: Path) -> tuple[dict[str, Tensor], bool]:
    """With the moving average in place of the UNet's weights, if there is one."""
    if not any(name.startswith("model_ema.diffusion_model") for name in tensors):
        return tensors, False
    unet = [name for name in tensors if name.startswith("model.diffusion_model.")]
    names = {name: f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in unet}
    if missing := sorted(ema for ema in names.values() if ema not in tensors):
        raise UserError(f"{file} has a moving average of its weights without {missing[0]}")
    return tensors | {name: tensors[ema] for name, ema in names.items()}, True


def _check_prediction(file: Path, tensors: Mapping[str, Tensor], source: Path) -> None:
    """What the file says of itself, if anything, must be what the folder says."""
    schedule, notes = Schedule.load(source), open_safetensors(file).metadata() or {}
    said = {"v": "v_prediction", "epsilon": "epsilon"}.get(notes.get("modelspec.prediction_type", ""))
    said = "v_prediction" if "v_pred" in tensors else said
    config = source / "scheduler" / "scheduler_config.json"
    if said not in (None, schedule.prediction_type):
        raise UserError(f"{file} is marked as {said}, and prediction_type in {config} is {schedule.prediction_type}")
    if "ztsnr" in tensors and not schedule.zero_terminal_snr:
        raise UserError(f"{file} is marked as of zero terminal SNR, and {config} lacks rescale_betas_zero_snr")


def _components(file: Path, tensors: Mapping[str, Tensor], source: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of each component, named as diffusers and transformers name them."""
    library = require("diffusers.loaders.single_file_utils", "sd")
    configs = {part: read_json(source / part / "config.json") for part in _FILES}
    if not any(name.startswith(_VAE) for name in tensors):
        raise UserError(f"{file} holds no VAE ({_VAE}*); wanted a checkpoint with one")
    clip = {
        name.replace(_CLIP, f"{_CLIP}text_model.") if f"{_CLIP}text_model." not in name else name: tensor
        for name, tensor in tensors.items()
        if name.startswith(_CLIP)  # some tools leave `text_model.` out
    }
    if clip:
        encoder: Callable[[], Any] = lambda: library.convert_ldm_clip_checkpoint(clip)  # noqa: E731
    elif any(name.startswith(_OPEN_CLIP) for name in tensors):
        like = SimpleNamespace(config=SimpleNamespace(hidden_size=configs["text_encoder"].get("hidden_size")))
        encoder = lambda: library.convert_open_clip_checkpoint(like, tensors, _OPEN_CLIP)  # noqa: E731
    else:
        raise UserError(f"{file} holds no text encoder ({_CLIP}* or {_OPEN_CLIP}*); wanted a checkpoint with one")
    ways: dict[str, Callable[[], Any]] = {
        "unet": lambda: library.convert_ldm_unet_checkpoint(tensors, {"layers_per_block": 2, **configs["unet"]}),
        "vae": lambda: library.convert_ldm_vae_checkpoint(tensors, configs["vae"]),
        "text_encoder": encoder,
    }
    found: dict[str, dict[str, Tensor]] = {}
    for part, way in ways.items():
        try:
            found[part] = {name: _wide(tensor) for name, tensor in way().items()}
        except Exception as error:  # names that are none of its make diffusers raise anything
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{file}: diffusers does not convert its {part} by {source}: {said}") from error
    text = found["text_encoder"]
    # position_ids are the numbers from 0 on, which tools store in half precision; the projection is not asked.
    found["text_encoder"] = {
        name: text[name] for name in text if name.startswith("text_model.") and not name.endswith(".position_ids")
    }
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _write(folder: Path, source: Path, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    index, files = read_json(source / "model_index.json"), component_files(source)
    bare = {
        part
        for part in index
        if (source / part / "config.json").is_file()
        and not any(file.parts[0] == part and file.suffix in (".safetensors", ".bin") for file in files)
    } - set(_FILES)
    folder.mkdir()
    for file in files:
        part = file.parts[0]
        if part not in bare and (part not in _FILES or file.name == "config.json"):
            copy_file(source / file, folder / file)
    (folder / "unet").mkdir()
    write_json(folder / "unet" / "config.json", read_json(source / "unet" / "config.json"))
    for part, tensors in weights.items():
        with replacing(folder / part / _FILES[part]) as written:
            write_tensors(written, tensors, metadata={"format": "pt"})
    # A safety checker of which only the config is there would not load.
    missing = {part: [None, None] for part in index if part in bare}
    write_json(folder / "model_index.json", index | missing)
