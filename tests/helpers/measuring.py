"""Small weights in the formats that their authors publish, and folders of drawn pictures."""

import argparse
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image, ImageDraw

from bilevel_fast.metrics.fid import architecture

SIDE = 32

# Ellipses (x, y, radius x, radius y, color) that NudeNet takes for exposed parts, though nobody else would.
FLAGGED = [
    *((129, 142, 11, 102, (235, 189, 178)), (78, 204, 70, 63, (224, 171, 131)), (122, 97, 48, 23, (255, 185, 240))),
    *((175, 250, 23, 55, (255, 173, 91)), (179, 70, 49, 41, (255, 189, 161)), (143, 155, 3, 3, (207, 188, 136))),
    *((217, 96, 86, 24, (232, 169, 119)), (201, 156, 3, 116, (255, 144, 226)), (253, 116, 9, 20, (255, 181, 152))),
]
COVERED = [  # FEMALE_BREAST_COVERED, 0.63, which is none of the nine labels; on (49, 126, 128)
    *((183, 117, 48, 79, (206, 141, 118)), (129, 78, 57, 50, (221, 121, 112)), (124, 151, 26, 93, (219, 107, 151))),
    *((141, 139, 10, 84, (235, 201, 123)), (209, 149, 26, 49, (210, 160, 145)), (234, 197, 15, 88, (159, 108, 84))),
    (66, 157, 29, 58, (190, 138, 92)),
]
HARMLESS = [(160, 160, 90, 90, (40, 90, 200)), (90, 90, 30, 50, (240, 220, 40))]


def ellipses(shapes, background=(254, 187, 108)) -> Image.Image:
    """320 x 320 pixels."""
    image = Image.new("RGB", (320, 320), background)
    pen = ImageDraw.Draw(image)
    for x, y, rx, ry, color in shapes:
        pen.ellipse([x - rx, y - ry, x + rx, y + ry], fill=color)
    return image


def doodle(number: int, side: int = 64) -> Image.Image:
    """A picture that is a function of its number: a gradient, three ellipses and some noise."""
    rng = np.random.default_rng(number)
    corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    image = Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = sorted(rng.integers(0, side, 2)), sorted(rng.integers(0, side, 2))
        pen.ellipse([x[0], y[0], x[1] + 2, y[1] + 2], fill=tuple(rng.integers(0, 256, 3).tolist()))
    noisy = np.asarray(image).astype(int) + rng.integers(-12, 13, (side, side, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def image_folder(path: Path, images: Mapping[str, Image.Image], prompts: Mapping[str, str], seed: int = 0) -> Path:
    """As `sample --folder` leaves it."""
    path.mkdir()
    lines = []
    for name, image in images.items():
        image.save(path / f"{name}.png")
        lines.append(json.dumps({"id": name, "prompt": prompts[name], "seed": seed, "file": f"{name}.png"}) + "\n")
    (path / "index.jsonl").write_text("".join(lines))
    recipe = {"steps": 25, "guidance": 7.5, "method": "pndm", "seed": seed, "format": "png"}
    settings = {"format": "bilevel_fast.images", "version": 1, "model": "nowhere", "recipe": recipe, "runs": []}
    (path / "settings.json").write_text(json.dumps(settings))
    return path


def inception_file(path: Path, *, legacy: bool = True) -> Path:
    """Random weights with the names, shapes and container of pt_inception-2015-12-05-6726825d.pth, which is older than
    the counters of batches that normalisations have now, and than the zip container."""
    torch.manual_seed(7)
    network = architecture()
    state = {}
    for name, tensor in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            state[name] = torch.empty(tensor.shape)
            _fill(name, state[name])
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return path


def _fill(name: str, tensor: torch.Tensor) -> None:
    """He's variance, so that features keep their size through the depth."""
    if name.endswith("running_var"):
        tensor.fill_(1.0)
    elif name.endswith("bn.weight"):
        tensor.uniform_(0.8, 1.2)
    elif tensor.ndim == 4:
        tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)
    else:
        tensor.normal_(std=0.05)


def small_clip() -> CLIP:
    """OpenAI's architecture at 32 pixels and two layers, with QuickGELU; 64 features to a head fix the widths."""
    torch.manual_seed(11)
    vision = CLIPVisionCfg(layers=2, width=128, patch_size=8, image_size=SIDE)
    text = CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=1, layers=2)
    model = CLIP(64, vision, text, quick_gelu=True).eval()
    with torch.no_grad():
        for tower in (model.visual.transformer, model.transformer):
            for name, parameter in tower.named_parameters():
                if parameter.ndim == 2:  # large enough for QuickGELU and GELU to differ
                    parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model


def openai_archive(path: Path, model: CLIP) -> Path:
    """A traced TorchScript archive in half precision with three numbers among its tensors, as OpenAI's ViT-B-32.pt."""
    model = model.half()
    for name, value in (("input_resolution", SIDE), ("context_length", 77), ("vocab_size", 49408)):
        model._buffers.pop(name, None)
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    mask = model._buffers.pop("attn_mask")  # not among OpenAI's tensors
    model.attn_mask = mask
    pixels, tokens = torch.zeros(1, 3, SIDE, SIDE).half(), open_clip.tokenize(["a star"])
    inputs = {"encode_image": pixels, "encode_text": tokens}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        torch.jit.save(torch.jit.trace_module(model, inputs, check_trace=False), path)
    return path


def csd_checkpoint(path: Path, *, parallel: bool = True) -> Path:
    """What CSD's trainer saves: a data-parallel state, two optimizers with numpy learning rates, and its flags."""
    tower = small_clip().visual
    projection = tower.proj.detach()
    torch.manual_seed(13)
    state = {f"backbone.{name}": tensor for name, tensor in tower.state_dict().items() if name != "proj"}
    state |= {"last_layer_style": torch.randn_like(projection), "last_layer_content": torch.randn_like(projection)}
    if parallel:
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["lr"] = np.linspace(0, 1, 3)[1]
    saved = {"model_state_dict": state, "opt_bb": optimizer.state_dict(), "opt_proj": optimizer.state_dict(), "iter": 3}
    torch.save({**saved, "args": argparse.Namespace(arch="vit_large", lr=1e-3, eval_k=[1, 5])}, path)
    return path
