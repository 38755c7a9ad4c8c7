"""The bilevel engine against a plain transcription of the algorithm card, and the properties it promises."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bilevel_fast.erasing.solvers import bome, weight_at
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.ops.randomness import Stream, integers, normal
from bilevel_fast.training.levels import Level, bilevel
from bilevel_fast.training.lower import FineTuning, SharedAnswers
from bilevel_fast.training.optim import AdamW, LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.teacher import Teacher
from world import (
    ETA,
    LR_LOWER,
    LR_UPPER,
    SEED,
    SHAPE,
    WARMUP,
    B,
    Descent,
    make_batch,
    make_levels,
    make_models,
)  # fmt: skip

SGD = partial(torch.optim.SGD, lr=0.0, fused=True)
ADAMW = partial(torch.optim.AdamW, weight_decay=0.0, fused=True)


def plain(teacher, student, steps, every, penalty, norm, make, weight=lambda lambda_, k: lambda_, bome=False):
    """The algorithm, top to bottom, with nothing of the engine but the random numbers."""
    teacher.requires_grad_(False)
    parameters = list(student.parameters())
    low, up = make(parameters), make(parameters)
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    losses, n_up = [], 0

    def noised(batch):
        t, eps = integers(SEED, Stream.TIMESTEP, batch.index, 1000), normal(SEED, Stream.NOISE, batch.index, SHAPE)
        alpha, sigma = abar[t].sqrt()[:, None, None, None], (1 - abar[t]).sqrt()[:, None, None, None]
        snr = abar[t] / (1 - abar[t])
        omega = torch.minimum(snr + 1, torch.tensor(5.0)) / (snr + 1)
        return alpha * batch.latents + sigma * eps, t, alpha * eps - sigma * batch.latents, omega

    def fine_tuning(x, t, v, omega, text):
        theirs, mine = teacher(x, t, text), student(x, t, text)
        diffusion = (omega * (mine.out - v).square().mean((1, 2, 3))).mean()
        feature = sum(F.mse_loss(a, b) for a, b in zip(mine.blocks, theirs.blocks, strict=True)) / len(mine.blocks)
        return diffusion + 2 * F.mse_loss(mine.out, theirs.out) + 0.1 * feature

    def move(optimizer, gradients, lr):
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

    for g in range(steps):
        lower = make_batch(0, g)
        loss = fine_tuning(*noised(lower), lower.text)
        move(low, torch.autograd.grad(loss, parameters), LR_LOWER * min(1, g / WARMUP))
        losses.append(loss.item())
        if (g + 1) % every == 0:
            batch = make_batch(1, g // every)
            x, t, _, _ = noised(batch)
            v_c, v_a = teacher(x, t, batch.text).out, teacher(x, t, batch.anchor).out
            upper = F.mse_loss(student(x, t, batch.text).out, v_a - ETA * (v_c - v_a))
            gradients = torch.autograd.grad(upper, parameters)
            if penalty:
                extra = torch.autograd.grad(fine_tuning(*noised(lower), lower.text), parameters)
                size = [torch.sqrt(sum(g.square().sum() for g in gs)) for gs in (gradients, extra)]
                scale = weight(penalty, n_up) * (size[0] / size[1] if norm == "grad" else 1)
                if bome:
                    along = sum((g.double() * r.double()).sum() for g, r in zip(gradients, extra, strict=True))
                    scale = max(0.0, 0.5 - (along / size[1].double() ** 2).item())
                gradients = [a + scale * b for a, b in zip(gradients, extra, strict=True)]
            move(up, gradients, LR_UPPER * min(1, n_up / WARMUP))
            losses.append(upper.item())
            n_up += 1
    return losses


def engine(teacher, student, steps, every, penalty, norm, make, schedule="", rule=None):
    """The same through the modules that train."""
    lower, upper = make_levels(teacher, student, penalty, norm, make, rule=rule)
    if schedule:
        upper.gradient.penalty = partial(weight_at, schedule, penalty, upper.optimizer.steps)
    return list(bilevel(lower, upper, every, 0, steps)), lower.gradient.answers.teacher


def in_order(terms):
    for step in terms:
        yield step["lower/loss"].item()
        if "upper/suppression" in step:
            yield step["upper/suppression"].item()


RISING = {"schedule": "rising"}, {"weight": lambda lambda_, k: lambda_ * (k + 1) ** 0.25}
BOME = {"rule": bome}, {"bome": True}


@pytest.mark.parametrize(
    ("penalty", "norm", "ours", "theirs"),
    [
        *((0.0, "grad", {}, {}), (0.5, "grad", {}, {}), (3.0, "raw", {}, {})),
        *((3.0, "raw", *RISING), (1.0, "grad", *BOME)),
    ],
    ids=["none", "grad", "raw", "rising", "bome"],
)
def test_equals_the_plain_transcription(penalty, norm, ours, theirs):
    """Ten lower and three upper steps: identical losses; with SGD the parameters agree to 1e-7."""
    expected_student = make_models()[1]
    expected = plain(make_models()[0], expected_student, 10, 3, penalty, norm, SGD, **theirs)
    teacher, student = make_models()
    terms, _ = engine(teacher, student, 10, 3, penalty, norm, Descent, **ours)
    assert len(expected) == 13
    torch.testing.assert_close(list(in_order(terms)), expected, rtol=1e-6, atol=0)
    moved = 0.0
    for mine, theirs, start in zip(
        student.parameters(), expected_student.parameters(), make_models()[1].parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1.2e-7, atol=1e-7)  # rtol: one ulp of a gain near 1
        moved = max(moved, (mine - start).abs().max().item())
    assert moved > 1e-3, "the steps must be large enough for a difference to show"


def test_equals_the_plain_transcription_with_adamw(monkeypatch):
    """Two AdamW states over the same parameters. Adam makes steps of last digits: both sums are torch's."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")
    expected = plain(*make_models(), 10, 3, 0.0, "grad", ADAMW)
    terms, _ = engine(*make_models(), 10, 3, 0.0, "grad", AdamW)
    torch.testing.assert_close(list(in_order(terms)), expected, rtol=1e-4, atol=0)


def test_first_step_of_each_level_has_learning_rate_zero():
    teacher, student = make_models()
    engine(teacher, student, 1, 1, 0.0, "grad", AdamW)
    for mine, start in zip(student.parameters(), make_models()[1].parameters(), strict=True):
        assert torch.equal(mine, start)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_the_penalty_costs_no_teacher_forward(penalty):
    """B images per lower step, 2 B per upper step, with or without a penalty."""
    _, teacher = engine(*make_models(), 6, 3, penalty, "grad", AdamW)
    assert teacher.images == 6 * B + 2 * 2 * B


def test_students_side_by_side_share_the_teacher():
    """Two students in step with one set of answers end where each ends alone, and the teacher works once."""
    alone = [make_models()[1] for _ in range(2)]
    for student, lr in zip(alone, (0.01, 0.02), strict=True):
        side_by_side([student], [lr])
    together = [make_models()[1] for _ in range(2)]
    teacher = side_by_side(together, [0.01, 0.02])
    assert teacher.images == 4 * B
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def side_by_side(students, rates):
    answers = SharedAnswers(Teacher(make_models()[0]), Schedule.sd(), SEED)
    walks = []
    for student, lr in zip(students, rates, strict=True):
        optimizer = LevelOptimizer(FlatParameters(student), lr, WARMUP, make=Descent)
        level = Level("lower", partial(make_batch, 0), FineTuning(optimizer.flat, answers), optimizer)
        walks.append(bilevel(level, None, 1, 0, 4))
    for _ in zip(*walks, strict=True):
        pass
    return answers.teacher


def test_the_teacher_never_changes():
    teacher, student = make_models()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    engine(teacher, student, 4, 2, 1.0, "raw", AdamW)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_non_finite_gradient_is_skipped_and_counted():
    _, student = make_models()
    optimizer = LevelOptimizer(FlatParameters(student), 0.1, warmup=0)
    before = [p.detach().clone() for p in student.parameters()]
    for bad in (1, 2):
        optimizer.flat.gradient.fill_(0.5)
        optimizer.flat.gradient[0] = float("nan") if bad == 1 else float("inf")
        assert not optimizer.step().isfinite()
        assert optimizer.bad_in_a_row == bad
    assert all(torch.equal(p, b) for p, b in zip(student.parameters(), before, strict=True))
    optimizer.flat.gradient.fill_(0.5)
    optimizer.step()
    assert optimizer.bad_in_a_row == 0
    # the skipped steps left no trace in the moments: the first real AdamW step is lr * sign(gradient)
    for p, b in zip(student.parameters(), before, strict=True):
        torch.testing.assert_close(b - p, torch.full_like(p, 0.1), rtol=1e-4, atol=1e-6)


def test_clipping():
    _, student = make_models()
    optimizer = LevelOptimizer(FlatParameters(student), 1.0, warmup=0, clip_norm=0.25, make=Descent)
    before = torch.cat([p.detach().flatten().clone() for p in student.parameters()])
    for p in student.parameters():
        p.grad = torch.randn_like(p)
    optimizer.flat.collect()
    norm = optimizer.step()
    after = torch.cat([p.detach().flatten() for p in student.parameters()])
    assert norm > 10
    assert (after - before).norm().item() == pytest.approx(0.25, rel=1e-3)
