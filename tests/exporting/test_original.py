"""Checkpoints in the original layout: `convert` reads back the same bits, and diffusers the same pictures."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bilevel_fast import api, convert, export
from bilevel_fast.base.errors import UserError
from bilevel_fast.exporting import original
from bilevel_fast.models.folder import load_folder, load_unet
from bilevel_fast.models.pipeline import load_pipeline
from bilevel_fast.models.structure import Structure
from mini_folder import make_mini_folder
from single_file import original as written_by_hand

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def draw(pipeline, noise):
    pipeline.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    return pipeline("a red star by monet", latents=noise.clone(), **given).images


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_the_names_are_those_of_the_repositories(tmp_path, name, request):
    """Against an inverse that was written for tests of `convert`, from the code of ldm and OpenCLIP."""
    folder = request.getfixturevalue(name)
    api.export(folder, "single-file", out=tmp_path / "out")
    came, wanted = load_file(tmp_path / "out/model.safetensors"), written_by_hand(folder, open_clip=name == "sd21")
    if name == "sd21":  # OpenCLIP has a last layer and a projection that Stable Diffusion 2 does not ask
        last = max(int(key.split(".")[4]) for key in wanted if ".resblocks." in key)
        gone = (f".resblocks.{last}.", "text_projection", "logit_scale")
        wanted = {key: each for key, each in wanted.items() if not any(part in key for part in gone)}
    assert came.keys() == wanted.keys()
    assert all(torch.equal(came[key], each) for key, each in wanted.items())


@pytest.mark.parametrize("name", ["sd15", "bk_sdm_base"])
def test_convert_reads_it_back_to_the_bit(tmp_path, name, request, command):
    folder = request.getfixturevalue(name)
    flags = ["--model", folder, "--out", tmp_path / "out"]
    code, said, err = command(export.main, "single-file", *flags)
    assert (code, err) == (0, ""), err
    assert "diffusers' converter reads the same" in said
    file = tmp_path / "out/model.safetensors"
    flags = ["--file", file, "--config-from", tmp_path / "out", "--out", tmp_path / "again"]
    assert command(convert.main, *flags)[0] == 0
    source = folder
    if name == "bk_sdm_base":  # of which `folder` makes a dense model of another config, that other targets take
        source = api.export(folder, "folder", out=tmp_path / "folder").path
        assert load_unet(source).structure.is_dense
        api.export(source, "single-file", out=tmp_path / "same")
        assert (tmp_path / "same/model.safetensors").read_bytes() == file.read_bytes()
    for part, stored in FILES.items():
        came, wanted = load_file(tmp_path / "again" / part / stored), load_file(source / part / stored)
        wanted.pop("text_model.embeddings.position_ids", None)
        assert came.keys() == wanted.keys()
        assert all(torch.equal(came[key], each) for key, each in wanted.items())
    assert load_folder(tmp_path / "again").schedule.prediction_type == load_folder(folder).schedule.prediction_type


@pytest.mark.parametrize(
    ("name", "kind"),
    [("bk_sdm_base", StableDiffusionPipeline), ("shallow_xl", StableDiffusionXLPipeline)],
)
def test_diffusers_reads_it_and_draws_the_same(tmp_path, name, kind, request):
    folder, noise = request.getfixturevalue(name), torch.randn(1, 4, 8, 8)
    api.export(folder, "single-file", out=tmp_path / "out")
    theirs = kind.from_single_file(str(tmp_path / "out/model.safetensors"), config=str(tmp_path / "out"))
    np.testing.assert_allclose(draw(theirs, noise), draw(load_pipeline(folder), noise), rtol=0, atol=1e-5)


def test_the_projection_of_the_second_text_encoder_is_turned(tmp_path, shallow_xl):
    api.export(shallow_xl, "single-file", out=tmp_path / "out", dtype="fp16")
    file = load_file(tmp_path / "out/model.safetensors")
    stored = load_file(shallow_xl / "text_encoder_2/model.safetensors")["text_projection.weight"]
    assert torch.equal(file["conditioner.embedders.1.model.text_projection"], stored.T.half())
    assert {tensor.dtype for tensor in file.values() if tensor.is_floating_point()} == {torch.float16}
    with safe_open(tmp_path / "out/model.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.prediction_type"] == "epsilon"


def test_names_of_newer_and_of_older_libraries(tmp_path, sd15):
    """A VAE as it was published with 1.5, and a text encoder as transformers 5.6 saves it."""
    copy = shutil.copytree(sd15, tmp_path / "model")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        new = next((name.replace(f".{a}.", f".{b}.") for a, b in old.items() if f"attentions.0.{a}." in name), name)
        tensors[new] = tensor
    assert tensors.keys() != load_file(file).keys()
    save_file(tensors, file, metadata={"format": "pt"})
    file = copy / "text_encoder/model.safetensors"
    tensors = {name.removeprefix("text_model."): each for name, each in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    for name, folder in (("one", sd15), ("other", copy)):
        api.export(folder, "single-file", out=tmp_path / name)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


@pytest.mark.situation
def test_what_the_original_layout_has_no_place_for(tmp_path, sd21, narrow, make_student):
    """A structure or a model without an original layout: refused, the site is named, and nothing is left behind."""
    config = load_folder(sd21).config
    pair = [f"{block}.{kind}.1" for block in ("down_blocks.1", "up_blocks.2") for kind in ("resnets", "attentions")]
    uneven = make_student(sd21, Structure.uniform(config, 1.0, pair))
    for folder, message in (
        (narrow, r"the original layout has no place for this structure: site \w+_blocks?\.[\w.]+ keeps \d+ of"),
        (uneven, r"no place for this structure: sites down_blocks.\* are left with 2, 1, 2, 2 ResNets"),
        (make_mini_folder(tmp_path / "mini"), r"holds a model of the mini world, which has no original layout"),
    ):
        with pytest.raises(UserError, match=message) as refusal:
            api.export(folder, "single-file", out=tmp_path / "out")
        assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]


@pytest.mark.situation
def test_a_weight_that_the_original_layout_does_not_know(tmp_path, sd15, monkeypatch):
    """diffusers would read another weight from a file than the model has: it is named, and nothing is written."""
    monkeypatch.setitem(original._RESNET, "norm1", "out_layers.0")
    monkeypatch.setitem(original._RESNET, "norm2", "in_layers.0")
    with pytest.raises(UserError, match=r"unet: diffusers would read another down_blocks.1.resnets.0.norm1.bias from"):
        api.export(sd15, "single-file", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
