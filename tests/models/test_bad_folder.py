"""Every bad model folder gets one clear line: which file, what is wrong with it, what was wanted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder
from mini_folder import make_mini_folder
from sd_folder import make_sd_folder

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    return make_sd_folder(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def broken(sd, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(sd, tmp_path / "model")


def edit(file: str, **fields):
    def apply(path: Path) -> None:
        content = json.loads((path / file).read_text()) | fields
        (path / file).write_text(json.dumps({k: v for k, v in content.items() if v != "DELETE"}))

    return apply


def tensors(file: str, change):
    def apply(path: Path) -> None:
        weights = load_file(path / file)
        change(weights)
        save_file(weights, path / file, metadata={"format": "pt"})

    return apply


def truncate(file: str):
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[:-1])


def remove(*files: str):
    return lambda path: [(path / file).unlink() for file in files]


def pickle_only(path: Path) -> None:
    (path / UNET).rename(path / "unet/diffusion_pytorch_model.bin")


def rename_conv_in(weights) -> None:
    weights["conv_inn.weight"] = weights.pop("conv_in.weight")


def narrow_conv1(weights) -> None:
    name = "down_blocks.0.resnets.1.conv1.weight"
    weights[name] = weights[name][:12].contiguous()


BAD = {
    "not there": (shutil.rmtree, r"model folder .*model does not exist; wanted a folder on this machine"),
    "no index": (remove("model_index.json"), r"model_index.json is missing"),
    "index not JSON": (lambda p: (p / "model_index.json").write_text("{,}"), r"model_index.json is not JSON"),
    "index a list": (lambda p: (p / "model_index.json").write_text("[]"), "wanted a JSON object, found list"),
    "component missing": (edit("model_index.json", vae="DELETE"), r"model_index.json: vae is missing"),
    "component odd": (edit("model_index.json", vae=[None, None]), r"vae is \[None, None\], wanted \[library, class\]"),
    "SDXL text": (
        edit("model_index.json", text_encoder=["transformers", "CLIPTextModelWithProjection"]),
        r"text_encoder 'CLIPTextModelWithProjection' is not supported; did you mean 'CLIPTextModel'",
    ),
    "scheduler class": (
        edit("model_index.json", scheduler=["diffusers", "PNDMSheduler"]),
        r"scheduler 'PNDMSheduler' is not supported; did you mean 'PNDMScheduler'",
    ),
    "prediction type": (
        edit("scheduler/scheduler_config.json", prediction_type="sample"),
        r"prediction_type 'sample' is not supported",
    ),
    "no scheduler": (remove("scheduler/scheduler_config.json"), r"scheduler_config.json is missing"),
    "no unet config": (remove("unet/config.json"), r"unet/config.json is missing"),
    "no unet weights": (remove(UNET), r"diffusion_pytorch_model.safetensors is missing"),
    "pickle": (pickle_only, r"has only diffusion_pytorch_model.bin: pickle weights are not loaded; convert to safe"),
    "unet cut": (truncate(UNET), r"unet/diffusion_pytorch_model.safetensors is cut short"),
    "text cut": (truncate(TEXT), r"text_encoder/model.safetensors is cut short"),
    "vae cut": (truncate(VAE), r"vae/diffusion_pytorch_model.safetensors is cut short"),
    "unet html": (lambda p: (p / UNET).write_text("<html>" * 99), r"is cut short or not a safetensors file"),
    "no vocabulary": (remove("tokenizer/vocab.json"), r"tokenizer/vocab.json is missing"),
    "no merges": (remove("tokenizer/merges.txt"), r"tokenizer/merges.txt is missing"),
    "vocabulary broken": (lambda p: (p / "tokenizer/vocab.json").write_text("["), r"model/tokenizer: "),
    "no text config": (remove("text_encoder/config.json"), r"text_encoder/config.json is missing"),
    "no vae config": (remove("vae/config.json"), r"vae/config.json is missing"),
    "text weight gone": (
        tensors(TEXT, lambda w: w.pop("text_model.final_layer_norm.weight")),
        r"text_encoder: 1 weight \(final_layer_norm.weight\) missing",
    ),
    "text shape": (edit("text_encoder/config.json", intermediate_size=48), r"text_encoder: "),
    "vae weight gone": (
        tensors(VAE, lambda w: w.pop("quant_conv.bias")), r"vae: 1 weight \(quant_conv.bias\) missing"
    ),
    "vae weight extra": (
        tensors(VAE, lambda w: w.update(ema=torch.zeros(1))), r"vae: 1 weight \(ema\) unexpected"
    ),
    "vae shape": (edit("vae/config.json", latent_channels=8), r"vae: .*shape"),
    "vae shifted": (edit("vae/config.json", shift_factor=0.1), r"shift_factor=0.1 is not supported"),
    "text width": (edit("unet/config.json", cross_attention_dim=48), r"states are 32 wide, the UNet reads 48"),
    "inpainting": (edit("unet/config.json", in_channels=9), r"in_channels is 9: an inpainting UNet"),
    "structure broken": (
        lambda p: (p / "unet/structure.json").write_text("{"), r"structure.json is not JSON"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_folder_gets_one_clear_line(broken, damage, message):
    damage(broken)
    with pytest.raises(UserError, match=message) as error:
        load_folder(broken)
    assert "\n" not in str(error.value)


BAD_UNETS = {
    "name": (
        tensors(UNET, rename_conv_in),
        r"1 weight \(conv_in.weight\) missing, 1 weight \(conv_inn.weight\) unexpected; "
        r"is conv_inn.weight meant to be conv_in.weight\?",
    ),
    "many gone": (
        tensors(UNET, lambda w: [w.pop(k) for k in list(w) if k.startswith("mid_block.resnets")]),
        r"unet: 20 weights \(mid_block.resnets.0.conv1.bias, mid_block.resnets.0.conv1.weight, .*, \.\.\.\) missing$",
    ),
    "shape": (
        tensors(UNET, narrow_conv1),
        r"down_blocks.0.resnets.1.conv1.weight has shape \[12, 16, 3, 3\], "
        r"the config without a structure.json wants \[16, 16, 3, 3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BAD_UNETS.values(), ids=BAD_UNETS.keys())
def test_weights_that_do_not_fit_are_named(broken, damage, message):
    damage(broken)
    with pytest.raises(UserError, match=message):
        load_folder(broken).unet()


def test_a_file_is_not_a_folder(broken):
    with pytest.raises(UserError, match="is a file; wanted a folder"):
        load_folder(broken / UNET)


def test_a_mini_folder_wants_mini_components(tmp_path):
    path = make_mini_folder(tmp_path / "mini")
    edit("model_index.json", vae=["diffusers", "AutoencoderKL"])(path)
    with pytest.raises(UserError, match="vae 'AutoencoderKL' is not supported; choose from PixelUnshuffleVAE"):
        load_folder(path)
