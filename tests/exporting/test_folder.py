"""Students in diffusers: drawn in a process that cannot import this package, they draw what `load_pipeline` draws."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bilevel_fast import api, export
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_unet
from bilevel_fast.models.pipeline import load_pipeline

PROMPT = "a red star by monet"
DRAW = """
import importlib, json, os, re, sys, numpy, torch
sys.modules["bilevel_fast"] = None
for path in sys.argv[2:]:
    os.chdir(path)
    (code,) = re.findall("```python\\n(.*?)```", open("README.md").read(), re.DOTALL)
    names = {}
    exec(code.replace("steps=20", "steps=1"), names)
    pipeline, noise = names["pipeline"], torch.load(sys.argv[1])
    dtype = pipeline.unet.dtype
    pipeline.set_progress_bar_config(disable=True)
    given = dict(latents=noise.to(dtype), num_inference_steps=2, guidance_scale=3.0)
    numpy.save("drawn.npy", pipeline("a red star by monet", output_type="np", **given).images)
    print(json.dumps([path, type(pipeline.unet).__name__, str(dtype)]))
"""


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("noise") / "noise.pt"
    torch.manual_seed(3)
    torch.save(torch.randn(1, 4, 8, 8), path)
    return path


@pytest.fixture(scope="module")
def made(
    tmp_path_factory, bk_sdm_base, shallow_xl, narrow, narrow_xl, noise
) -> dict[str, tuple[Path, Path, list[str]]]:
    """Of each student: its folder, what was exported, and what a process without this package said of it."""
    place = tmp_path_factory.mktemp("exported")
    students = {
        "bk-sdm": bk_sdm_base,
        "xl": shallow_xl,
        "narrow": narrow,
        "narrow-xl": narrow_xl,
        "half": narrow,
    }
    for name, student in students.items():
        api.export(student, "folder", out=place / name, dtype="bf16" if name == "half" else None)
    hidden = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(noise), *(str(place / name) for name in students)],
        env={**hidden, "HF_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1"},
        cwd=place, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {name: (student, place / name, row[1:]) for (name, student), row in zip(students.items(), said, strict=True)}


@pytest.mark.parametrize("name", ["bk-sdm", "xl", "narrow", "narrow-xl"])
def test_a_process_without_this_package_draws_the_same(made, noise, name):
    student, out, (kind, _) = made[name]
    assert kind == ("PrunedUNet" if name.startswith("narrow") else "UNet2DConditionModel")
    pipeline = load_pipeline(student)
    pipeline.set_progress_bar_config(disable=True)
    given = {"latents": torch.load(noise), "num_inference_steps": 2, "guidance_scale": 3.0}
    images = pipeline(PROMPT, output_type="np", **given).images
    assert images.std() > 0.01
    np.testing.assert_allclose(np.load(out / "drawn.npy"), images, rtol=0, atol=1e-5)
    again = load_pipeline(out)  # what was exported is a model folder
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(again(PROMPT, output_type="np", **given).images, images, rtol=0, atol=1e-5)


def test_another_precision(made):
    """Of every component: diffusers reads it so, and whole numbers stay what they are."""
    student, out, (_, dtype) = made["half"]
    assert dtype == "torch.bfloat16"
    assert np.isfinite(np.load(out / "drawn.npy")).all()
    for part, file in (
        ("unet", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("vae", "diffusion_pytorch_model"),
    ):
        came, was = (load_file(path / part / f"{file}.safetensors") for path in (out, student))
        assert came.keys() == was.keys()
        for key, tensor in was.items():
            expected = tensor.bfloat16() if tensor.is_floating_point() else tensor
            assert came[key].dtype == expected.dtype, key  # torch.equal does not look at it
            assert torch.equal(came[key], expected), key


def test_weights_of_a_variant_are_written_without_it(tmp_path, bk_sdm_base):
    """diffusers reads a variant only if it is told to."""
    copy = _copy(bk_sdm_base, tmp_path / "student")
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    file.rename(copy / "vae/diffusion_pytorch_model.fp16.safetensors")
    api.export(copy, "folder", out=tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out/vae").iterdir())] == ["config.json", file.name]
    assert (tmp_path / "out/vae" / file.name).stat().st_size > 1000


def test_a_student_of_the_mini_world(tmp_path, command):
    """This package opens it; diffusers has no pipeline for it."""
    api.prune(api.load(), "uniform", 0.7, out=tmp_path / "student")
    code, said, err = command(export.main, "folder", "--model", tmp_path / "student", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "this package opens the folder" in said
    one, other = load_unet(tmp_path / "student"), load_unet(tmp_path / "out")
    assert other.structure == one.structure
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    (snippet,) = re.findall("```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(snippet.replace('"."', repr(str(tmp_path / "out"))), names)
    again = api.export(tmp_path / "out", "folder", out=tmp_path / "again").path
    for file in ("config.json", "structure.json", "pruned_unet.py", "diffusion_pytorch_model.safetensors"):
        assert (again / "unet" / file).read_bytes() == (tmp_path / "out/unet" / file).read_bytes()


def _copy(source: Path, to: Path) -> Path:
    return shutil.copytree(source, to)


@pytest.mark.situation
def test_a_number_that_fp16_cannot_hold(tmp_path, bk_sdm_base):
    """A weight beyond 65504 and `--dtype fp16`: the weight is named, and nothing is left behind."""
    copy = _copy(bk_sdm_base, tmp_path / "student")
    file = copy / "text_encoder/model.safetensors"
    tensors = load_file(file)
    tensors["text_model.final_layer_norm.bias"][3] = 7e4
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"text_encoder: .*layer_norm.bias has a number of size 70000, float16 ends"):
        api.export(copy, "folder", out=tmp_path / "out", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.situation
def test_what_export_refuses(tmp_path, sd21, bk_sdm_base, command):
    """An unknown target, a dense model where a student is wanted, a folder that is there, no model: one line each."""
    (tmp_path / "there").mkdir()
    for words, message in {
        ("foldr", sd21, "new"): r"no target 'foldr'; did you mean 'folder'\?",
        (
            "folder",
            sd21,
            "new",
        ): r"is a dense model, and a folder of diffusers already; wanted a student",
        ("folder", bk_sdm_base, "there"): r"there exists already; delete it or choose another name",
        ("single-file", tmp_path / "none", "new"): r"model folder .*none does not exist",
    }.items():
        target, model, out = words
        code, said, err = command(export.main, target, "--model", model, "--out", tmp_path / out)
        assert (code, said) == (2, "")
        assert re.search(message, err), err
        assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
