"""Every eraser, edit and lower loss on a small SDXL: a step of both levels, an edited folder, a judge."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("diffusers")

from bilevel_fast import erase, evaluate, sample
from bilevel_fast.erasing.registry import ERASERS, EditKind
from bilevel_fast.models.folder import load_folder
from bilevel_fast.runs.assemble import fit
from bilevel_fast.runs.session import gather, initial_student
from bilevel_fast.train import parse
from bilevel_fast.training.loop import Places
from commands import run_command
from measuring import openai_archive, small_clip
from sdxl_chain import UPPER, done, training

FLAGS = {
    "esd": ["--upper.esd.steps", "3"],
    "salun": ["--upper.salun.batches", "1"],
    "concept-prune": ["--upper.concept-prune.steps", "2", "--upper.concept-prune.ratio", "0.1"],
    "p-esd": [f"--upper.p-esd.{flag}" for flag in ("steps=3", "updates=1", "lr=2", "ratio=1")],
    "separable": ["--upper.separable.texts", "0", "--upper.separable.threshold", "0.3"],  # 32 dimensions, 77 tokens
}
SHALLOW = "down_blocks.1.attentions.0.transformer_blocks.0"
DEEP = "down_blocks.2.attentions.0.transformer_blocks.4"
"""The first and the last block of a Transformer that has several."""


@pytest.fixture(scope="module")
def place(sdxl, sdxl_chain):
    """Teacher, pruned student, and what both train on; read once."""
    given = [*training(sdxl_chain, sdxl), "--lower.steps", "1", "--upper.every", "1"]
    config, folder = parse(given), load_folder(sdxl)
    teacher = folder.unet().requires_grad_(False)
    materials = gather(config, folder, teacher, [], sdxl_chain, record=False)
    return SimpleNamespace(given=given, student=initial_student(config, folder, 1), materials=materials)


def step(place, out: Path, *flags: str) -> tuple[set[str], dict]:
    """What a step of both levels moves, and its record; the lower level's rate moves nothing that could be seen."""
    student = copy.deepcopy(place.student)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    config = parse([*place.given, "--lower.lr", "1e-30", *flags])
    places = Places(out / "checkpoints", out / "stats.jsonl", out / "events")
    fit(config, student, place.materials, places, SimpleNamespace(requested=False), torch.device("cpu"))
    after = dict(student.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    (record,) = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    return {name for name, p in before.items() if (p - after[name]).abs().max() > 1e-20}, record


PARTS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.mark.parametrize("name", ERASERS)
def test_an_upper_step_of_each(place, tmp_path, name):
    """It reaches the first and the last block of a Transformer of several."""
    edits = isinstance(ERASERS[name], EditKind)
    moved, record = step(place, tmp_path, "--upper.eraser", name, *([] if edits else UPPER), *FLAGS.get(name, []))
    ends = {"concept-prune": "ff.net.2.weight"}
    for block in (SHALLOW, DEEP):
        assert f"{block}.{ends.get(name, 'attn2.to_k.weight')}" in moved
    if edits:
        edited = {"concept-prune": ("ff.net.2.weight",), "p-esd": tuple(f"attn2.{part}.weight" for part in PARTS)}
        edited = edited.get(name, ("attn2.to_k.weight", "attn2.to_v.weight"))
        assert all(parameter.endswith(edited) for parameter in moved)
    else:
        assert record["upper/suppression"] > 0


def test_both_lower_losses(place, tmp_path):
    """And an upper step whose penalty is made of them."""
    flags = ["--lower.weights.self-attention", "1", "--lower.weights.layer", "1", "--upper.penalty", "1"]
    moved, record = step(place, tmp_path, *UPPER, *flags)
    assert record["lower/self_attention"] > 0
    assert record["lower/layer"] > 0
    assert f"{DEEP}.attn1.to_q.weight" in moved


def test_concept_prune_edits_a_folder(sdxl_chain, tmp_path):
    """UCE does in tests/runs/test_sdxl_chain.py. Only feed-forwards lose weights, those of every block."""
    subjects = tmp_path / "subjects.txt"
    subjects.write_text("a red star {}\na house {}\n")
    asked = ["--model", sdxl_chain / "pruned", "--erase", "by monet", "--subjects", subjects, "--out", tmp_path / "out"]
    done(erase.main, "concept-prune", *asked, "--steps", 2, "--ratio", 0.1)
    before, after = (load_folder(path).unet().state_dict() for path in (sdxl_chain / "pruned", tmp_path / "out"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith("ff.net.2.weight")}
    assert all(((after[name] == before[name]) | (after[name] == 0)).all() for name in changed)


def test_what_a_student_draws_is_evaluated(sdxl_chain, tmp_path):
    """`sample` from captions, then CLIP scores of the folder, as for any other model."""
    prompts = tmp_path / "captions_val2017.json"
    texts = [{"image_id": number, "caption": text} for number, text in enumerate(("a star", "a house"))]
    prompts.write_text(json.dumps({"annotations": texts}))
    model = ["--model", sdxl_chain / "erased", "--steps", 2, "--prompts-file", prompts]
    done(sample.main, *model, "--folder", tmp_path / "drawn")
    clip = openai_archive(tmp_path / "ViT-tiny-8.pt", small_clip())
    asked = ["--suite", "coco", "--images", tmp_path / "drawn", "--prompts", prompts, "--clip-weights", clip]
    done(evaluate.main, *asked, "--device", "cpu", "--out", tmp_path / "eval.json")
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["metrics"]["clip"]["n"] == 2
    assert found["metrics"]["fid"]["not_measured"]


@pytest.mark.situation
def test_the_mini_worlds_judge_wants_a_model_of_the_mini_world(sdxl, tmp_path):
    """`evaluate --models` with a folder of Stable Diffusion XL: refused in one line, as its judge knows one world."""
    result = run_command(evaluate.main, "--models", sdxl)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (result.returncode, len(errors)) == (2, 1), result.stderr
    assert str(sdxl) in errors[0]
