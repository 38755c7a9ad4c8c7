"""Micro-batches by the memory model, and what does not fit."""

import json
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.folder import load_unet
from bilevel_fast.models.structure import Structure
from bilevel_fast.runs.config import TrainConfig, preset
from bilevel_fast.runs.fitting import Fitting, free_bytes
from bilevel_fast.train import main
from commands import run_command

PAPER = preset("paper")
LITTLE = ["--mini.judge-erased", "1", "--mini.judge-kept", "1", "--mini.judge-steps", "2"]


def fitting(config: TrainConfig = PAPER, dtype=torch.bfloat16) -> Fitting:
    return Fitting(config, Structure.uniform(MINI, 0.6), 16, 12, dtype)


def with_upper(config: TrainConfig, **settings) -> TrainConfig:
    return replace(config, upper=replace(config.upper, **settings))


def test_auto_takes_the_largest_part_that_fits():
    plan = fitting()
    for size in (1, 4, 16, 64):
        card = plan.wanted(64, size).total
        assert plan.micro_batches(card) == (size, size)
        if size > 1:
            assert plan.micro_batches(card - 1) == (size // 2, size // 2)
    assert plan.micro_batches(None) == (64, 64)
    assert plan.wanted(64, 8).total < plan.wanted(64).total


def test_what_is_asked_for_is_taken():
    config = with_upper(replace(PAPER, lower=replace(PAPER.lower, micro_batch=16)), micro_batch=2)
    assert fitting(config).micro_batches(2**20) == (16, 2)


def test_parts_take_an_fp32_gradient_and_all_answers():
    plan = fitting()
    whole, parts = plan.wanted(64), plan.wanted(64, 4)
    assert parts.gradients == 2 * whole.gradients
    assert parts.teacher_activations == whole.teacher_activations
    assert parts.student_activations == plan.wanted(4).student_activations
    assert parts.total < whole.total


def test_what_cannot_fit_says_by_how_much():
    plan = fitting()
    card = plan.wanted(64, 1).total - 2**28
    with pytest.raises(UserError, match=r"--lower.batch 64 does not fit even as micro-batches of 1: .* 0\.2 GiB more"):
        plan.micro_batches(card)
    with pytest.raises(UserError, match=r"; --recompute takes \d+\.\d, which"):
        plan.micro_batches(card)
    with pytest.raises(UserError, match=r"has free$"):
        fitting(replace(PAPER, recompute=True)).micro_batches(2**20)


@pytest.mark.parametrize("eraser", ["forget-me-not", "guidance"])
def test_losses_over_whole_batches_are_not_split(eraser):
    config = with_upper(PAPER, eraser=eraser)
    if eraser == "guidance":
        config = with_upper(config, controller=replace(config.upper.controller, enabled=True))
    card = fitting(config).wanted(64, 4).total
    assert fitting(config).micro_batches(card) == (4, 64)
    with pytest.raises(UserError, match=r"--upper.micro-batch is 2: wanted 64 or auto, as "):
        fitting(with_upper(config, micro_batch=2)).micro_batches(None)


def test_losses_that_listen_take_more():
    listening = replace(PAPER, lower=replace(PAPER.lower, weights=replace(PAPER.lower.weights, layer=1.0)))
    card = fitting().wanted(64, 16).total
    assert fitting().micro_batches(card) == (16, 16)
    assert fitting(listening).wanted(64, 16).total > card
    assert fitting(listening).micro_batches(card)[0] < 16


def test_ranks_share_what_is_trained():
    """What does not fit alone fits where four share it; a leaf is a quarter of the batch."""
    four = replace(fitting(replace(PAPER, scale=replace(PAPER.scale, leaves=4))), ranks=4)
    card = four.wanted(16).total
    assert four.micro_batches(card) == (16, 16)
    assert fitting().wanted(16).total > card
    assert replace(four, ranks=1).wanted(16).total > card
    assert "batch 16 at latents of 16 x 16" in str(four.out_of_memory(torch.device("cpu"))), "one rank's leaf"


def test_an_edit_has_no_upper_batch():
    plan = fitting(with_upper(PAPER, eraser="uce"))
    assert plan.micro_batches(plan.wanted(64, 4).total) == (4, 64)


def test_a_cpu_has_no_limit():
    assert free_bytes(torch.device("cpu")) is None


def test_what_the_model_counts_itself_is_free(monkeypatch):
    """16 bytes free, 8 of 12 reserved ones unused, and a module of 4 numbers there: none of it is counted twice."""
    for name, value in {"mem_get_info": (16, 32), "memory_reserved": 12, "memory_allocated": 4}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    with FakeTensorMode():
        there, here = (torch.nn.Linear(4, 1, bias=False, device=device) for device in ("cuda", "cpu"))
        assert free_bytes(torch.device("cuda"), there, here) == 16 + 8 + 16


def test_a_run_in_parts_ends_where_the_run_ends(small_teacher, tmp_path):
    """And stopped and resumed in other parts it is accepted: a part's size is no setting of the result."""
    students = {}
    for name, flags in {"whole": [], "parts": ["--lower.micro-batch", "2", "--upper.micro-batch", "1"]}.items():
        out = tmp_path / name
        given = ["--preset", "smoke", "--no-twin", "--teacher", small_teacher, "--lower.steps", "4", *LITTLE]
        result = run_command(main, *given, *flags, "--out", str(out))
        assert result.returncode == 0, result.stderr
        students[name] = load_unet(out / "student").state_dict()
    assert "computing 2 of 4 lower and 1 of 4 upper images at once" in result.stderr
    rows = [[json.loads(x) for x in (tmp_path / n / "stats.jsonl").read_text().splitlines()] for n in students]
    for row, other in zip(*rows, strict=True):
        for name in ("lower/loss", "upper/suppression", "lower/grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-3)
    for name, value in students["whole"].items():
        torch.testing.assert_close(students["parts"][name], value, rtol=0, atol=2e-3, msg=name)
    refused = run_command(main, "--preset", "smoke", "--lower.micro-batch", "3", "--out", str(tmp_path / "no"))
    assert refused.returncode == 2
    assert "error: --lower.micro-batch is 3: wanted a divisor of --lower.batch 4 (1, 2, 4)" in refused.stderr
