"""Graphs of a model: what runs them computes what the model does at sizes that they were not made with."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnxruntime

from bilevel_fast import api, export
from bilevel_fast.base.errors import UserError
from bilevel_fast.exporting import graphs
from bilevel_fast.exporting.parts import parts
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.conditioning import pack
from bilevel_fast.models.folder import load_folder, save_student
from bilevel_fast.models.structure import Structure
from bilevel_fast.runs.export_model import Exported
from mini_folder import TINY, make_mini_folder
from unets import randomise

TWO = replace(
    TINY, block_out_channels=(16, 32), num_heads=(2, 4), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
"""Two levels: an exporter takes its time for each operation."""


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """Of the mini world: narrowed, and without the mid block and a Transformer."""
    place = tmp_path_factory.mktemp("graphs")
    source = load_folder(make_mini_folder(place / "teacher", config=TWO))
    gone = [site.name for site in sites(TWO) if site.block == "mid_block"]
    unet = source.unet().cut(Structure.uniform(TWO, 0.6, [*gone, "up_blocks.1.attentions.1"]))
    randomise(unet, 0.05)
    save_student(place / "student", source, unet)
    return place / "student"


@pytest.fixture(scope="module")
def made(student, tmp_path_factory) -> dict[str, Exported]:
    out = tmp_path_factory.mktemp("made")
    return {target: api.export(student, target, out=out / target) for target in ("onnx", "torch")}


def session(path: Path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_onnx_from_a_prompt_to_a_picture(made, student):
    """Each file takes what the one before it gives, in another batch and size than any that was tried."""
    folder, out = load_folder(student), made["onnx"].path
    ids = folder.text_encoder.tokenizer(["a red star", "", "a blue ring", "a star"])
    (states,) = session(out / "text_encoder/model.onnx").run(None, {"input_ids": ids.numpy()})
    x, t = torch.randn(4, 12, 10, 7), torch.tensor([999, 500, 3, 0])
    given = {"sample": x.numpy(), "timestep": t.numpy(), "encoder_hidden_states": states}
    (v,) = session(out / "unet/model.onnx").run(["out_sample"], given)
    (image,) = session(out / "vae_decoder/model.onnx").run(["image"], {"sample": v})
    with torch.no_grad():
        text = folder.text_encoder.encode(["a red star", "", "a blue ring", "a star"])
        expected = folder.unet()(x, t, text).out
    np.testing.assert_allclose(states, text.numpy(), atol=1e-5)
    np.testing.assert_allclose(v, expected.numpy(), atol=1e-4 * float(expected.abs().max()))
    np.testing.assert_allclose(image, folder.vae.decode(torch.from_numpy(v)).numpy(), atol=1e-5)
    axes = {each.name: each.shape for each in session(out / "unet/model.onnx").get_inputs()}
    assert axes["sample"] == ["batch", 12, "height", "width"]
    assert axes["encoder_hidden_states"] == ["batch", 12, 64]


def test_torch_programs(made, student):
    folder, out = load_folder(student), made["torch"].path
    unet = torch.export.load(out / "unet/model.pt2").module()
    x, t, text = torch.randn(4, 12, 10, 7), torch.tensor([999, 500, 3, 0]), folder.text_encoder.encode(["a star"] * 4)
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t, text), folder.unet()(x, t, text).out, rtol=1e-4, atol=1e-5)
    decoder = torch.export.load(out / "vae_decoder/model.pt2").module()
    assert decoder(x).shape == (4, 3, 20, 14)


def test_the_snippets_of_the_cards_run(made, monkeypatch, capsys):
    for each in made.values():
        (snippet,) = re.findall("```python\n(.*?)```", (each.path / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(each.path)
        exec(snippet, {})
    assert "unet [('sample', ['batch', 12, 'height', 'width'])" in capsys.readouterr().out
    assert "off by" in made["onnx"].page


def test_both_text_encoders_of_xl(tmp_path, xl):
    """One graph, with what CLIP's attention makes of the words to come."""
    assert graphs.write_torch(parts(load_folder(xl))[1], tmp_path) < 1e-5


def test_what_xl_is_told_is_what_the_text_tensor_holds(xl):
    """The text encoder's graph gives states and the pooled state, the UNet's takes them, and the sizes."""
    folder = load_folder(xl)
    unet, encoder, _ = parts(folder)
    prompts = ("a photo of a house", "", "a star")
    with torch.no_grad():
        states, pooled = encoder.module(*encoder.example(3, 8, 8))
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(3, -1)
        text = folder.text_encoder.encode([prompt or " " for prompt in prompts])
        assert torch.allclose(pack(states, pooled, sizes)[[0, 2]], text[[0, 2]], atol=1e-5)
        x, t, *_ = unet.example(3, 8, 8)
        assert torch.equal(
            unet.module(x, t, states, pooled, sizes), folder.unet()(x, t, pack(states, pooled, sizes)).out
        )


@pytest.mark.situation
def test_a_graph_that_computes_something_else(student, tmp_path, monkeypatch):
    """onnxruntime computes something else than the model, or runs at one size alone: said, and no file is left."""
    decoder = parts(load_folder(student))[2]
    scaled, shapes = torch.onnx.export, graphs._shapes

    def off(module, *args, **options):
        scaled(torch.nn.Sequential(module, torch.nn.Threshold(-0.5, -0.5)), *args, **options)

    monkeypatch.setattr(torch.onnx, "export", off)
    with pytest.raises(
        UserError, match=r"^onnxruntime computes another image of vae_decoder than the model at batch 1, "
    ):
        graphs.write_onnx(decoder, tmp_path)
    monkeypatch.setattr(torch.onnx, "export", scaled)
    monkeypatch.setattr(
        graphs, "_shapes", lambda part, free: ({k: v for k, v in shapes(part, free)[0].items() if k != 2},)
    )
    with pytest.raises(
        UserError, match=r"^onnxruntime does not run vae_decoder at batch 3, latents 24x40: "
    ) as refusal:
        graphs.write_onnx(decoder, tmp_path)
    assert "\n" not in str(refusal.value)
    monkeypatch.setattr("bilevel_fast.runs.export_model.parts", lambda _: [decoder])
    with pytest.raises(UserError, match="does not run"):
        api.export(student, "onnx", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.situation
@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript", "onnx"])
def test_a_package_for_onnx_is_missing(tmp_path, student, monkeypatch, command, package):
    """`export onnx` where onnx, onnxscript or onnxruntime is not installed: the extra that brings it is named."""
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = command(export.main, "onnx", "--model", student, "--out", tmp_path / "out")
    assert code == 2
    assert err == f"error: {package} is not installed; run: pip install 'bilevel-fast[onnx]'\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.situation
def test_a_precision_for_graphs(tmp_path, student, command):
    """`export onnx --dtype fp16`: graphs have fp32 alone, and it says so."""
    code, _, err = command(export.main, "onnx", "--model", student, "--out", tmp_path / "out", "--dtype", "fp16")
    assert (code, err) == (2, "error: --dtype fp16 is for folder and single-file; onnx has fp32 alone\n")
