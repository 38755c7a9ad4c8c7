"""Model folders: a teacher or a student on disk, in the layout of a diffusers Stable Diffusion pipeline.

    model_index.json     which class each component is
    unet/                config.json, weights, and for a pruned UNet structure.json
    text_encoder/  tokenizer/  vae/  scheduler/    and text_encoder_2/  tokenizer_2/ of Stable Diffusion XL

The mini world's models have the same layout with components of their own. Weights are safetensors only.
"""

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import aside_of, read_json, replacing, sweep, sync_folder, write_json
from bilevel_fast.base.tensors import write_tensors
from bilevel_fast.models.architecture import UNetConfig
from bilevel_fast.models.autoencoder import Autoencoder
from bilevel_fast.models.copying import component_files, copy_file
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.family import Family, family_of
from bilevel_fast.models.hub import local
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.weights import check_names, find_weights, fingerprint, mapped_weights

UNET_STEM = "diffusion_pytorch_model"
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class ModelFolder:
    """A loaded model folder: everything but the UNet, which `unet` reads when asked."""

    path: Path
    family: Family
    config: UNetConfig
    structure: Structure | None
    """None if the UNet is dense."""
    text_encoder: TextEncoder
    vae: Autoencoder
    schedule: Schedule

    def unet(self, align: int = 1, mapped: bool = False) -> UNet:
        """A fresh copy of the UNet, as `load_unet`."""
        return load_unet(self.path, align, mapped)

    @cached_property
    def vae_fingerprint(self) -> str:
        """Which VAE it is: caches of latents carry the same."""
        return fingerprint(self.path / "vae")


def load_folder(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ModelFolder:
    """Load a model folder.

    Args:
        path: A folder on this machine, or an id on the hub: see `hub.local`.
        device: Of the text encoder and the VAE.
        dtype: They compute in; they return fp32 all the same.

    Raises:
        UserError: The folder or a file of it is missing or broken, a component is of an unknown kind, or two
            components do not fit each other. The file is named.
    """
    path = local(path)
    family = family_of(path)
    config, structure = _read_architecture(path / "unet")
    find_weights(path / "unet", UNET_STEM)  # a missing file is better found now than after the text encoder
    schedule = Schedule.load(path)
    text_encoder, vae = family.text_encoder(path, device, dtype), family.vae(path, device, dtype)
    if text_encoder.width != config.cross_attention_dim:
        raise UserError(
            f"{path}: the text encoder's states are {text_encoder.width} wide, "
            f"the UNet reads {config.cross_attention_dim}"
        )
    if text_encoder.pooled != config.pooled_dim:
        raise UserError(
            f"{path}: the text encoders' pooled state is {text_encoder.pooled} wide, the UNet reads {config.pooled_dim}"
        )
    if not vae.channels == config.in_channels == config.out_channels:
        raise UserError(
            f"{path}: the VAE has {vae.channels} latent channels, "
            f"the UNet reads {config.in_channels} and writes {config.out_channels}"
        )
    return ModelFolder(path, family, config, structure, text_encoder, vae, schedule)


def load_unet(path: Path | str, align: int = 1, mapped: bool = False) -> UNet:
    """Load the UNet of a model folder: fp32 on the CPU, in eval mode, its parameters trainable.

    Args:
        path: The model folder, or an id on the hub.
        align: As `UNet`.
        mapped: Leave the weights in their file, in its dtype and its memory order: for who looks at them, or cuts
            them, and computes nothing. Not with `align`.

    Raises:
        UserError: A file is missing or broken, or the weights do not fit the config and the structure; says which.
    """
    folder = local(path) / "unet"
    config, structure = _read_architecture(folder)
    source = "the config without a structure.json" if structure is None else "the structure"
    return read_unet(folder, config, structure, source, align, mapped)


def read_unet(
    folder: Path,
    config: UNetConfig,
    structure: Structure | None,
    source: str,
    align: int = 1,
    mapped: bool = False,
) -> UNet:
    """As `load_unet`, where something else than the folder says what the UNet keeps.

    Args:
        folder: The `unet/` folder itself; only the weights in it are read.
        config: Of the dense UNet.
        structure: What is kept; None is everything.
        source: Who says so, for the message about weights that do not fit.
        align: As `UNet`.
        mapped: As `load_unet`.

    Raises:
        UserError: A file is missing or broken, or the weights are not those of this structure; says which.
    """
    with torch.device("meta"):
        unet = UNet(config, structure, align)
    weights, wanted = mapped_weights(folder, UNET_STEM), unet.state_dict()
    check_names(str(folder), weights, wanted)
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            came, asked = list(tensor.shape), list(wanted[name].shape)
            raise UserError(f"{folder}: {name} has shape {came}, {source} wants {asked}")
    if mapped:
        unet.load_state_dict(weights, assign=True)
    else:
        unet.fill(weights.items(), torch.device("cpu"))
    return unet.eval()


def _read_architecture(folder: Path) -> tuple[UNetConfig, Structure | None]:
    config = UNetConfig.load(folder)
    if not (folder / "structure.json").exists():
        return config, None
    structure = Structure.load(folder / "structure.json")
    if structure.config != config:
        raise UserError(f"{folder / 'structure.json'} describes another UNet than {folder / 'config.json'}")
    return config, None if structure.is_dense else structure


def write_unet(
    folder: Path, unet: UNet, dtype: torch.dtype = torch.float32, config: Mapping[str, Any] | None = None
) -> None:
    """Write the `unet/` of a model folder: config.json, weights without padding, structure.json if it is pruned.

    Args:
        folder: The `unet/` folder itself; made if missing.
        unet: On any device.
        dtype: To store the weights in.
        config: The config.json that the UNet was made by. It says more than we read (`upcast_attention`), and others
            read it: it is written as it is, unless it describes another UNet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config is None or UNetConfig.from_dict(config) != unet.config:
        config = unet.config.to_dict()
    write_json(folder / "config.json", dict(config))
    if not unet.structure.is_dense:
        unet.structure.save(folder / "structure.json")
    with replacing(folder / f"{UNET_STEM}.safetensors") as file:
        write_tensors(file, unet.state_dict(), dtype, {"format": "pt"})


def save_student(
    path: Path | str,
    source: ModelFolder,
    unet: UNet,
    *,
    overwrite: bool = False,
    notes: Mapping[str, dict[str, Any]] | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a model folder: the UNet, and every other component copied from the folder that it was made from.

    The folder is written aside and renamed: at `path` there is always a whole model or none.

    Args:
        path: The new folder.
        source: Of the teacher.
        unet: The student; on any device, padded or not.
        overwrite: Replace a student that an earlier call wrote.
        notes: JSON files to lie beside the components, by file name.
        tensors: The same of safetensors files.

    Raises:
        UserError: The path exists and is not to be, or not to be lightly, replaced; or a file of the source is a pipe,
            or a link that leads somewhere else: see `component_files`.
        OSError: It cannot be written; what was there is there, and nothing else.
    """
    path = Path(path)
    if path.exists():
        if not overwrite:
            raise UserError(f"{path} exists already; delete it or choose another folder")
        if not _is_student(path) or path.resolve() in (source.path.resolve(), *source.path.resolve().parents):
            raise UserError(f"{path} is not a student's folder; it is not replaced")
    parts = component_files(source.path)
    aside, old = aside_of(path), aside_of(path, "old")
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    _sweep_old(path, {*(part.parts[0] for part in parts), *(notes or {}), *(tensors or {}), "unet", "model_index.json"})
    try:
        _write_student(aside, source, parts, unet, notes or {})
        for name, some in (tensors or {}).items():
            with replacing(aside / name) as file:
                write_tensors(file, some)
        if path.exists():
            path.rename(old)
        aside.rename(path)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)  # of the size of a model: a full disk would stay full
        if old.exists() and not path.exists():
            old.rename(path)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{path} exists already: another process wrote it meanwhile") from error
        if isinstance(error, OSError):
            raise in_place(error, aside, path) from error
        raise
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)
    sweep(path.parent, "old")


def _sweep_old(path: Path, names: Collection[str]) -> None:
    """Delete what a killed process of an earlier release left aside, which has the size of a model; nothing else."""
    aside = path.with_name(f".{path.name}.tmp")
    if aside.is_dir() and not aside.is_symlink() and {entry.name for entry in aside.iterdir()} <= set(names):
        shutil.rmtree(aside, ignore_errors=True)


def in_place(error: OSError, aside: Path, path: Path) -> OSError:
    """An error, with the name of the file as it would have been; what is aside is gone by then."""
    name = os.path.relpath(error.filename or aside, aside)
    where = str(error.filename) if name.startswith("..") else str(path / name)
    return OSError(error.errno, f"{error.strerror or error}; nothing was written", where)


def _is_student(path: Path) -> bool:
    return (path / "model_index.json").is_file() and (path / "unet" / "structure.json").is_file()


def _write_student(
    aside: Path, source: ModelFolder, parts: Iterable[Path], unet: UNet, notes: Mapping[str, dict[str, Any]]
) -> None:
    index = read_json(source.path / "model_index.json")
    for name in _OPTIONAL:  # as diffusers says that a component is not there: it would look for its files
        if isinstance(index.get(name), list) and not (source.path / name).is_dir():
            index[name] = [None, None]
    aside.mkdir()
    for part in parts:
        copy_file(source.path / part, aside / part)
    write_unet(aside / "unet", unet, config=read_json(source.path / "unet" / "config.json"))
    unet.structure.save(aside / "unet" / "structure.json")  # a student has one even if nothing is pruned
    for name, content in notes.items():
        write_json(aside / name, content)
    write_json(aside / "model_index.json", index)
