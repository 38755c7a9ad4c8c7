"""A batch in parts: the gradient, the losses and the run are those of the whole batch."""

from dataclasses import replace

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.esd import Esd
from bilevel_fast.erasing.references import Itself
from bilevel_fast.erasing.saliency import EraseDiff, Relabel, salient
from bilevel_fast.erasing.solvers import bome
from bilevel_fast.erasing.targets import ConceptAblation, Guidance
from bilevel_fast.training.graphs import Graphs
from bilevel_fast.training.levels import bilevel
from bilevel_fast.training.settings import check_micro_batch
from replay import on_the_cpu
from world import ETA, SEED, Descent, make_batch, make_levels, make_models

IMAGES = 6
ERASERS = {
    "guidance": lambda student: Guidance(ETA),
    "concept-ablation": lambda student: ConceptAblation(Itself(student), 0.5),
    "esd": lambda student: Esd(Itself(student), make_batch(1, 0).anchor[:1], ETA, 2.0, 6, False),
    "relabel": lambda student: Relabel(Itself(student)),
    "erasediff": lambda student: EraseDiff(Itself(student), 0.3),
}


def six(level, step):
    """A batch of six images."""
    both = [make_batch(level, 2 * step + half).drawn(SEED, 1000) for half in (0, 1)]
    joined = {name: torch.cat([getattr(b, name) for b in both]) for name in ("latents", "text", "anchor", "eps", "t")}
    return replace(both[0], index=torch.cat([b.index for b in both]), captions=tuple("abcdef"), **joined)


def make(micro, eraser="guidance", **settings):
    teacher, student = make_models()
    lower, upper = make_levels(teacher, student, eraser=ERASERS[eraser](student), micro=micro, **settings)
    return replace(lower, batches=lambda step: six(0, step)), replace(upper, batches=lambda step: six(1, step))


def near(found, expected):
    """Sums of fp32 in another order differ by up to 3.5e-6 here."""
    assert (found - expected).norm() <= 5e-6 * expected.norm()
    assert expected.norm() > 0


@pytest.mark.parametrize(
    ("eraser", "micro", "settings"),
    [
        *(("guidance", micro, {}) for micro in (1, 2, 3)),
        ("guidance", 2, {"norm": "raw", "penalty": 3.0}),
        ("guidance", 2, {"penalty": 0.0}),
        ("guidance", 2, {"surgery": True}),
        ("guidance", 2, {"rule": bome}),
        *((eraser, 2, {}) for eraser in ERASERS if eraser != "guidance"),
    ],
)
def test_gradients_and_losses_are_those_of_the_whole_batch(eraser, micro, settings):
    whole, parts = make(None, eraser, **settings), make(micro, eraser, **settings)
    for one, other in zip(whole, parts, strict=True):
        expected, found = one.gradient(one.batches(0)), other.gradient(other.batches(0))
        near(other.optimizer.flat.gradient, one.optimizer.flat.gradient)
        assert list(found.terms) == list(expected.terms)
        for name, value in (found.terms | {"total": found.total}).items():
            torch.testing.assert_close(value, (expected.terms | {"total": expected.total})[name], rtol=2e-6, atol=0)
    asked = [levels[0].gradient.answers.teacher.images for levels in (whole, parts)]
    assert asked[0] == asked[1] > 0


@pytest.mark.parametrize("name", ["latents", "text", "anchor", "eps", "t", "index", "captions"])
def test_parts_of_a_batch(name):
    batch = six(0, 0)
    parts = batch.split(2)
    assert [len(part.latents) for part in parts] == [2, 2, 2]
    assert batch.split(6) == (batch,)
    pieces = [getattr(part, name) for part in parts]
    if name == "captions":
        assert pieces == [("a", "b"), ("c", "d"), ("e", "f")]
    else:
        assert torch.equal(torch.cat(pieces), getattr(batch, name))


def test_bf16_gradients_are_added_in_fp32():
    """The sum over parts is exact where a sum in bf16 would not be."""
    lower, _ = make(1, dtype=torch.bfloat16)
    flat, batch, total = lower.optimizer.flat, six(0, 0), 0.0
    lower.gradient(batch)
    assert flat.gradient.dtype == torch.float32
    together = flat.gradient.clone()
    for part in batch.split(1):
        lower.gradient.micro = None
        (lower.gradient.loss(lower.gradient.answers.ask(part)).total / IMAGES).backward()
        flat.collect()
        assert torch.equal(flat.gradient, flat.gradient.bfloat16().float())
        total = total + flat.gradient
    assert torch.equal(together, total)
    assert not torch.equal(together, together.bfloat16().float())


def test_a_run_in_parts_is_the_run_and_is_recorded():
    """With the plain rule, and as CUDA graphs do it: the parts are inside one recording."""
    masters = []
    for micro, run in ((None, None), (2, None), (2, Graphs(on_the_cpu))):
        lower, upper = make(micro, make=Descent)
        for _ in bilevel(lower, upper, 1, 0, 5, *([] if run is None else [run])):
            pass
        masters.append(lower.optimizer.flat.master.clone())
    near(masters[1], masters[0])
    assert torch.equal(masters[2], masters[1])


def test_answers_stay_only_where_the_penalty_reads_them():
    for penalty, kept in ((0.0, 0), (1.0, 3)):
        lower, _ = make(2, penalty=penalty)
        lower.gradient(six(0, 0))
        assert len(lower.gradient.answers.last) == kept


def test_saliency_in_parts():
    lower, upper = make(2)
    gradient, flat = lower.gradient, lower.optimizer.flat
    masks = [salient(gradient.student, gradient.answers, flat, upper.batches, 2, 0.3, micro) for micro in (None, 3)]
    assert (masks[0] != masks[1]).float().mean() < 1e-4


@pytest.mark.parametrize(
    ("micro", "message"),
    [(5, r"--lower.micro-batch is 5: wanted a divisor of --lower.batch 12 \(1, 2, 3, 4, 6, 12\)"), (0, "wanted >= 1")],
)
def test_a_part_that_does_not_divide_is_refused(micro, message):
    with pytest.raises(UserError, match=message):
        check_micro_batch("lower", micro, 12)
    check_micro_batch("lower", "auto", 12)
