"""`train` on folders in the layout of Stable Diffusion 2.1, with a latent cache and a concept bank on disk."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilevel_fast.models.folder import load_folder
from bilevel_fast.runs import session
from bilevel_fast.train import main
from commands import run_command

pytest.importorskip("diffusers")
from sd_world import make_sd_world

STEPS = ["--lower.steps", "5", "--lower.batch", "3", "--upper.batch", "2", "--upper.every", "2", "--log-every", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_sd_world(tmp_path_factory.mktemp("sd"))


def train(world: Path, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    folders = {"teacher": "teacher", "student": "pruned", "data": "cache", "concepts": "bank"}
    command = []
    for flag, name in folders.items():
        if f"--{flag}" not in flags:
            command += [f"--{flag}", str(world / name)]
    return run_command(main, *command, *STEPS, *flags)


def test_bilevel_on_sd_folders(world, tmp_path, monkeypatch):
    def refuse(start):
        raise AssertionError("a second copy of the only student: gigabytes, for a real one")

    monkeypatch.setattr(session, "copy", SimpleNamespace(deepcopy=refuse))
    out = tmp_path / "run"
    result = train(world, "--preset", "paper", "--lower.warmup", "0", "--upper.warmup", "0", "--out", out)
    assert result.returncode == 0, result.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["preset"], summary["lower_steps"], summary["upper_steps"]) == ("paper", 5, 2)
    assert summary["quality"] is None, "nothing judges an SD model here, and nothing pretends to"
    records = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [record["images"] for record in records] == [3, 6, 9, 12, 15]
    assert ["upper/suppression" in record for record in records] == [False, True, False, True, False]
    assert "upper/penalty" in records[1]
    before, after = (load_folder(path).unet() for path in (world / "pruned", out / "student"))
    assert before.structure == after.structure
    moved = dict(after.named_parameters())
    still = [name for name, p in before.named_parameters() if torch.equal(p, moved[name])]
    # every parameter is trained, but attention over the one token of the innermost level has no gradient for q and k
    assert all(
        name.startswith("mid_block") and name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")) for name in still
    )


def test_the_student_runs_in_a_diffusers_pipeline(world):
    from bilevel_fast import load_pipeline

    pipeline = load_pipeline(world / "pruned")
    images = pipeline("a red star", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


def test_resume_on_sd_folders(world, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(world, "--out", whole).returncode == 0
    assert train(world, "--out", parts, "--lower.steps", "3", "--checkpoint-every", "3").returncode == 0
    # the first session of a longer run: put its settings back to those of the whole, and take its end away
    shutil.copy(whole / "config.json", parts / "config.json")
    shutil.rmtree(parts / "student")
    assert train(world, "--out", parts, "--resume").returncode == 0
    first, second = (load_folder(path / "student").unet().state_dict() for path in (whole, parts))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.situation
def test_a_teacher_that_was_changed_in_place(world, tmp_path):
    """A teacher whose weights change between two sessions: `--resume` is refused; moved folders go on."""
    mine, out = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(world, mine)
    steps = ["--lower.steps", "1", "--out", out]
    assert train(mine, *steps).returncode == 0
    moved = mine.rename(tmp_path / "moved")
    result = train(moved, *steps, "--resume")
    assert result.returncode == 0, result.stderr
    path = moved / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"] += 1
    save_file(weights, path, metadata={"format": "pt"})
    result = train(moved, *steps, "--resume")
    assert result.returncode == 2
    assert f"error: run folder {out} was begun with another teacher: its fingerprint was" in result.stderr


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (None, ["--concepts", "cache"], "is a cache of images, wanted one of concepts"),
        ("cache/shard-00001.safetensors", [], "shard-00001.safetensors"),
        ("pruned/unet/diffusion_pytorch_model.safetensors", [], "diffusion_pytorch_model.safetensors"),
        ("pruned/unet/structure.json", [], "structure"),
        ("teacher/vae/config.json", [], "config.json"),
    ],
    ids=["images as concepts", "missing shard", "truncated weights", "no structure", "half a teacher"],
)
def test_bad_folders(world, tmp_path, spoil, flags, message):
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    if spoil and spoil.startswith("pruned/unet/diffusion"):
        path = broken / spoil
        path.write_bytes(path.read_bytes()[:-100])
    elif spoil:
        (broken / spoil).unlink()
    flags = [str(broken / flag) if (broken / flag).exists() else flag for flag in flags]
    result = train(broken, *flags, "--out", tmp_path / "run")
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "student").exists()
