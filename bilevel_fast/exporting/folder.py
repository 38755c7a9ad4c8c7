"""A student as a folder that diffusers opens: by itself where it can, else with a file of code for its UNet.

model_index.json  README.md
unet/       of a plain student the config of a smaller UNet; else `pruned_unet.py`, which diffusers runs if it is
            trusted, the config with what that file wants to know, and structure.json for this package
all other components as they were, weights in one file each
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, replacing, write_json
from bilevel_fast.base.tensors import write_tensors
from bilevel_fast.exporting.plain import cut_widths, plain
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.copying import component_files, copy_file
from bilevel_fast.models.folder import UNET_STEM, load_unet
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.weights import STEMS, mapped_weights

CODE = "pruned_unet.py"
_KEPT = ("erased.json",)


def write_folder(source: Path, out: Path, dtype: torch.dtype | None) -> str | None:
    """Write the folder of a student.

    Args:
        source: A student's model folder.
        out: The new folder; its parent is there.
        dtype: Of all weights; None leaves each in its own.

    Returns:
        None if diffusers opens it by itself, else why it needs code: the site that it has no fields for.

    Raises:
        UserError: A weight is too large for `dtype`, or a file of the source is missing, broken or leads elsewhere.
    """
    unet = load_unet(source, mapped=True)
    config = {name: value for name, value in read_json(source / "unet" / "config.json").items() if name != "pruned"}
    config |= {"_class_name": "UNet2DConditionModel"}
    index, state, why = read_json(source / "model_index.json"), unet.state_dict(), None
    out.mkdir()
    (out / "unet").mkdir()
    try:
        smaller = plain(unet.structure)
        config, state = smaller.fields(config), smaller.renamed(state)
        index["unet"] = ["diffusers", "UNet2DConditionModel"]
    except UserError as error:
        why = str(error)
        config |= {"_class_name": "PrunedUNet", "pruned": pruned(unet.structure)}
        index["unet"] = [Path(CODE).stem, "PrunedUNet"]
        shutil.copyfile(Path(__file__).with_name(CODE), out / "unet" / CODE)
        unet.structure.save(out / "unet" / "structure.json")
    write_json(out / "unet" / "config.json", config)
    write_weights(out / "unet" / f"{UNET_STEM}.safetensors", state, dtype, source / "unet")
    write_components(source, out, dtype)
    for name in _KEPT:
        if (source / name).is_file():
            copy_file(source / name, out / name)
    write_json(out / "model_index.json", index)
    return why


def pruned(structure: Structure) -> dict[str, Any]:
    """What `pruned_unet.py` wants to know: modules by name, and how wide they are."""
    known, narrow = {site.name: site for site in sites(structure.config)}, dict[str, dict[str, int]]()
    for name, widths in cut_widths(structure).items():
        units = {width.name: width for width in known[name].widths}
        for kind, count in widths.items():
            channels = count * units[kind].unit_size
            if kind == "groups":
                narrow[name] = {"channels": channels, "groups": count}
            else:
                block = known[name].transformer_block
                narrow[f"{block}.{kind}"] = {"channels": channels} if kind == "ff" else {"heads": count}
    dropped = sorted(name for name in structure.dropped if known[name].within not in structure.dropped)
    return {"narrow": narrow, "dropped": dropped}


def write_components(source: Path, out: Path, dtype: torch.dtype | None, weights: bool = True) -> None:
    """Copy all components but the UNet.

    Args:
        source, out: Model folders.
        dtype: Of their weights, which become one file each, of no variant; None leaves each in its own.
        weights: Without them, only what is told in JSON and text.

    Raises:
        UserError: As `write_folder`.
    """
    written: set[Path] = set()
    for file in component_files(source):
        stem = next((stem for stem in STEMS if file.name.startswith((f"{stem}.", f"{stem}-"))), None)
        if stem is None:
            if weights or file.suffix in (".json", ".txt"):
                copy_file(source / file, out / file)
        elif weights and file.with_name(stem) not in written:
            written.add(file.with_name(stem))
            found = mapped_weights((source / file).parent, stem)
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            write_weights(out / file.with_name(f"{stem}.safetensors"), found, dtype, (source / file).parent)


def write_weights(
    file: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    where: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to one file; those of whole numbers stay as they are.

    Args:
        file: To write.
        tensors: By name.
        dtype: Of those of real numbers; None leaves each in its own.
        where: They come from, for the message.
        metadata: Free text for its header.

    Raises:
        UserError: A number is too large for `dtype`.
    """
    stored = {name: _stored(name, tensor, dtype, where) for name, tensor in tensors.items()}
    with replacing(file) as written:
        write_tensors(written, stored, metadata=dict(metadata or {"format": "pt"}))


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None, where: Path) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # which few programs read
    if dtype is None:
        return tensor
    if (most := float(tensor.abs().max())) > torch.finfo(dtype).max:
        short = str(dtype).removeprefix("torch.")
        raise UserError(f"{where}: {name} has a number of size {most:g}, {short} ends at {torch.finfo(dtype).max:g}")
    return tensor.to(dtype)
