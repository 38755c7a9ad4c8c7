"""LAPTOP-Diff's normalised features and SnapFusion's guided output, as lower losses, against their formulas."""

from functools import partial

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.structure import Structure
from bilevel_fast.profiling.memory import estimate
from bilevel_fast.train import parse
from bilevel_fast.training import losses, lower
from bilevel_fast.training.losses import LossWeights
from bilevel_fast.training.lower import Answers, FineTuning
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.teacher import Teacher
from mutants import mutated
from world import SEED, TINY, make_batch, make_models

GUIDED = LossWeights(diffusion=0, output=0, feature=0, guided=0.5)
BY_NORM = LossWeights(diffusion=0, output=0, feature=0.1, feature_by_norm=True)
NULL = torch.linspace(-1, 1, 80).reshape(1, 5, 16)


def step(weights, fine_tuning=FineTuning, answers=Answers):
    """Loss and gradient of a lower step; the networks as they were, and the batch."""
    teacher, student = make_models()
    plain = make_models()[1]
    asks = answers(Teacher(teacher), Schedule.sd(), SEED)
    asks.null = NULL if weights.guided else None
    level, batch = fine_tuning(FlatParameters(student), asks, weights), make_batch(0, 0).drawn(SEED, 1000)
    loss = level(batch)
    return loss, level.flat, teacher, plain, batch, asks.noise(batch)


def gap(weights, formula, **how):
    """How far loss and gradient are from those of a formula of (teacher, student, batch, noised)."""
    loss, flat, teacher, plain, batch, noised = step(weights, **how)
    wanted = formula(teacher, plain, batch, noised)
    expected = torch.autograd.grad(wanted, list(plain.parameters()), allow_unused=True)
    views = flat.views(flat.gradient).values()
    gaps = [
        ((v - e).norm() / e.norm()).item() for v, e in zip(views, expected, strict=True) if e is not None and e.any()
    ]
    return max(*gaps, abs(loss.total.item() / wanted.item() - 1))


def by_norm(teacher, student, batch, noised):
    with torch.no_grad():
        theirs = teacher(noised.x, noised.t, batch.text).blocks
    mine = student(noised.x, noised.t, batch.text).blocks
    # squared norm by norm, both over the number of elements
    parts = [
        ((a - b) ** 2).sum() / b.numel() / (b.norm() / b.numel() ** 0.5) for a, b in zip(mine, theirs, strict=True)
    ]
    return 0.1 * sum(parts) / len(parts)


def guided(teacher, student, batch, noised):
    scale = 2 + 12 * torch.distributions.Normal(0, 1).cdf(batch.eps[:, 0, 0, 0])
    assert scale.min() >= 2
    assert scale.max() <= 14
    assert scale.std() > 0
    w = scale.reshape(-1, 1, 1, 1)

    def out(network):
        with_it, without = (network(noised.x, noised.t, text).out for text in (batch.text, NULL.expand(3, 5, 16)))
        return w * with_it - (w - 1) * without

    return 0.5 * (out(student) - out(teacher).detach()).square().mean()


def test_normalised_features():
    assert gap(BY_NORM, by_norm) < 1e-3
    assert list(step(BY_NORM)[0].terms) == ["feature"]


def test_guided_output():
    assert gap(GUIDED, guided) < 1e-3
    assert list(step(GUIDED)[0].terms) == ["guided"]


@pytest.mark.parametrize(
    ("old", "new"),
    [("other.numel() ** 0.5", "other.numel()"), ("torch.stack(parts).mean()", "torch.stack(parts).sum()")],
)
def test_a_planted_bug_in_normalised_features_is_seen(old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "_normalised", mutated(losses.__file__, old, new, tmp_path)._normalised)
    assert gap(BY_NORM, by_norm) > 0.05


@pytest.mark.parametrize(
    ("old", "new"),
    [("2 + 12 * torch.special", "1 + 12 * torch.special"), ("self.null.expand_as(batch.text)", "batch.text")],
)
def test_a_planted_bug_in_the_guided_output_is_seen(old, new, tmp_path):
    module = mutated(lower.__file__, old, new, tmp_path)
    assert gap(GUIDED, guided, fine_tuning=module.FineTuning, answers=module.Answers) > 0.01


def test_the_penalty_takes_the_same_answers():
    """An upper step's penalty is the lower loss with what the teacher said: no further question to it."""
    teacher, student = make_models()
    answers = Answers(Teacher(teacher), Schedule.sd(), SEED)
    answers.null, answers.keeps = NULL, True
    level = FineTuning(FlatParameters(student), answers, GUIDED)
    first, asked = level(make_batch(0, 0)), answers.teacher.images.item()
    again = level.loss(answers.last[0])
    assert answers.teacher.images.item() == asked == 6
    assert again.total.item() == pytest.approx(first.total.item(), rel=1e-5)


def test_the_memory_model_knows_of_the_second_pass():
    take = partial(estimate, Structure.dense(TINY), 8, 5, 4, "fp32")
    both = take(weights=LossWeights(guided=1.0))
    assert both.student_activations > 1.5 * take().student_activations
    assert take(weights=LossWeights(feature_by_norm=True)).total < 1.2 * take().total


@pytest.mark.situation
def test_weights_that_cannot_be():
    """`train --lower.weights.guided` below 0, or normalised features without a weight: one line."""
    with pytest.raises(UserError, match="must not be negative"):
        parse(["--preset", "mini", "--lower.weights.guided", "-1"])
    with pytest.raises(UserError, match=r"feature-by-norm is given with --lower\.weights\.feature 0"):
        parse(["--preset", "mini", "--lower.weights.feature-by-norm", "--lower.weights.feature", "0"])
