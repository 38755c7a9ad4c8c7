"""`python -m bilevel_fast.export TARGET`: settings, what each target makes of a model folder, and its model card."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from bilevel_fast.base.claims import claimed
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import aside_of, read_json, sweep, sync_folder, write_atomic, write_json
from bilevel_fast.exporting.card import render
from bilevel_fast.exporting.folder import CODE, write_components, write_folder, write_weights
from bilevel_fast.exporting.graphs import write_onnx, write_torch
from bilevel_fast.exporting.original import original
from bilevel_fast.exporting.parts import Part, parts
from bilevel_fast.models.copying import copy_file
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.family import FAMILIES
from bilevel_fast.models.folder import ModelFolder, in_place, load_folder, load_unet
from bilevel_fast.runs import export_facts
from bilevel_fast.runs.export_facts import Made
from bilevel_fast.runs.inputs import fetched

TARGETS = {
    "folder": "a student as a folder of diffusers, which opens it by itself if only whole layers were cut, and else "
    "with the file of code that lies in it (trust_remote_code=True)",
    "single-file": "one .safetensors file in the original layout of Stable Diffusion 1.x, 2.x or XL, and the configs "
    "by which it is read",
    "onnx": "UNet, text encoder and VAE decoder as ONNX files for any batch, height and width, compared in onnxruntime",
    "torch": "the same as programs of torch.export, which need torch alone",
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FILE = "model.safetensors"

Target = Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="\n\n".join(f"{n}: {d}" for n, d in TARGETS.items()))]


@dataclass(frozen=True)
class Args:
    """Write a model folder in a form that other programs read, with a model card."""

    target: Target
    model: Path
    """Model folder, or its id on the hub: a student; all targets but folder take a dense one as well."""
    out: Path
    """Folder to write; must be new."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """What folder and single-file store weights in; by default each as it is stored."""


@dataclass(frozen=True, eq=False)
class Exported:
    """A model that was exported.

    Attributes:
        path: The folder that was written.
        page: What the command prints.
    """

    path: Path
    page: str


def export(args: Args) -> Exported:
    """Write the model in the form of the target; whole or not at all.

    Raises:
        UserError: Bad input of any kind, or the target cannot express the model; says why.
    """
    check_target(args.target)
    args = fetched(args, "model")
    with claimed(args.out):
        folder = load_folder(args.model)
        aside = aside_of(args.out)
        sweep(args.out.parent)
        try:
            made = _WAYS[args.target](folder, aside, args)
            write_atomic(aside / "README.md", render(export_facts.facts(folder, made)).encode())
            aside.rename(args.out)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError):
                raise in_place(error, aside, args.out) from error
            raise
        sync_folder(args.out.parent)
    return Exported(args.out, "\n".join([*(f"{k:<13}{v}" for k, v in made.said), f"{'written':<13}{args.out}"]))


def check_target(name: str) -> None:
    """Refuse a target that there is not.

    Raises:
        UserError: The nearest are named.
    """
    if name not in TARGETS:
        raise UserError(f"no target {name!r}{nearest(name, TARGETS)}")


def _folder(folder: ModelFolder, out: Path, args: Args) -> Made:
    if not (folder.path / "unet" / "structure.json").is_file():
        raise UserError(
            f"{folder.path} is a dense model, and a folder of diffusers already; wanted a student, "
            "or another target than folder"
        )
    why = write_folder(folder.path, out, _dtype(args))
    load_folder(out)
    load_unet(out, mapped=True)
    how = "opens it by itself" if why is None else f"opens it with trust_remote_code=True: {why}"
    if folder.family.world:
        kind = "UNet2DConditionModel" if why is None else f"PrunedUNet of unet/{CODE}: {why}"
        how = f"has no pipeline of the {folder.family.world} world; this package opens the folder; its unet/: {kind}"
    return Made("diffusers", _snippet_of_folder(folder, args, why), (("diffusers", how),))


def _snippet_of_folder(folder: ModelFolder, args: Args, why: str | None) -> str:
    if folder.family.world:
        return 'from bilevel_fast import api\n\nmodel = api.load(".")\nunet = model.unet()'
    return _snippet("DiffusionPipeline", "from_pretrained", args, '"."', *(["trust_remote_code=True"] if why else []))


def _single_file(folder: ModelFolder, out: Path, args: Args) -> Made:
    if folder.family.world:
        raise UserError(f"{folder.path} holds a model of the {folder.family.world} world, which has no original layout")
    tensors, config = original(folder.path)
    out.mkdir()
    (out / "unet").mkdir()
    write_json(out / "unet" / "config.json", config)
    write_components(folder.path, out, None, weights=False)
    prediction = {"v_prediction": "v", "epsilon": "epsilon"}[Schedule.load(folder.path).prediction_type]
    notes = {"format": "pt", "modelspec.prediction_type": prediction}
    write_weights(out / FILE, tensors, _dtype(args), folder.path, notes)
    write_json(out / "model_index.json", _index(folder))
    xl = folder.family is FAMILIES["stable-diffusion-xl"]
    kind = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    snippet = _snippet(kind, "from_single_file", args, f'"{FILE}"', 'config="."')
    said = (("tensors", f"{len(tensors)} in {FILE}; diffusers' converter reads the same from it"),)
    return Made("diffusers", snippet, said)


def _graphs(folder: ModelFolder, out: Path, args: Args) -> Made:
    if args.dtype is not None:
        raise UserError(f"--dtype {args.dtype} is for folder and single-file; {args.target} has fp32 alone")
    write, runs, library, snippet = _GRAPHS[args.target]
    out.mkdir()
    said: list[tuple[str, str]] = []
    for part in parts(folder):
        (out / part.name).mkdir()
        off = write(part, out / part.name)
        said.append((part.name, f"{part.signature}; in {runs} off by {off:.1g} of the largest number"))
    for name in ("model_index.json", "unet/config.json"):
        copy_file(folder.path / name, out / name)
    write_components(folder.path, out, None, weights=False)
    return Made(library, snippet, tuple(said))


_NETWORKS = '("text_encoder", "unet", "vae_decoder")'
_GRAPHS: dict[str, tuple[Callable[[Part, Path], float], str, str, str]] = {
    "onnx": (
        write_onnx,
        "onnxruntime",
        "onnx",
        "import onnxruntime\n\n"
        f'networks = {{name: onnxruntime.InferenceSession(f"{{name}}/model.onnx") for name in {_NETWORKS}}}\n'
        "for name, network in networks.items():\n"
        "    print(name, [(each.name, each.shape) for each in network.get_inputs()])",
    ),
    "torch": (
        write_torch,
        "torch.export.load",
        "pytorch",
        "import torch\n\n"
        f'networks = {{name: torch.export.load(f"{{name}}/model.pt2").module() for name in {_NETWORKS}}}',
    ),
}


def _index(folder: ModelFolder) -> dict[str, Any]:
    """Without what the file does not hold, such as a safety checker: only its config would be there."""
    index = read_json(folder.path / "model_index.json") | {"unet": ["diffusers", "UNet2DConditionModel"]}
    bare = {part for part in index if (folder.path / part / "config.json").is_file()} - set(folder.family.components)
    return index | {part: [None, None] for part in bare}


def _snippet(kind: str, call: str, args: Args, *given: str) -> str:
    """Python that opens a pipeline of diffusers and draws with it."""
    half = args.dtype not in (None, "fp32")
    given = (*given, f"torch_dtype={_dtype(args)}") if half else given
    lines = [*(["import torch"] if half else []), f"from diffusers import {kind}", ""]
    lines += [f"pipeline = {kind}.{call}({', '.join(given)})"]
    return "\n".join([*lines, 'image = pipeline("a photo of a house", num_inference_steps=20).images[0]'])


def _dtype(args: Args) -> torch.dtype | None:
    return DTYPES[args.dtype] if args.dtype else None


_WAYS: dict[str, Callable[[ModelFolder, Path, Args], Made]] = {
    "folder": _folder,
    "single-file": _single_file,
    "onnx": _graphs,
    "torch": _graphs,
}
