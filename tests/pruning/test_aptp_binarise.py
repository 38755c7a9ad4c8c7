"""Logits to gates: the formulas, the order in which depths go, noise that belongs to a sample, straight-through."""

import math

import pytest
import torch

from bilevel_fast.models.architecture import MINI, SD21
from bilevel_fast.models.vector import from_vector, layout
from bilevel_fast.pruning.aptp.binarise import binarise, depth_order, gumbel, harden
from mini_folder import TINY


def test_depth_order():
    """SD 2.1: the published list. The mini world: what the rule says, by name."""
    assert depth_order(SD21) == (13, 12, 0, 1, 11, 10, 2, 3, 9, 8, 4, 5, 7, 6)
    names = [layout(MINI).depths[i].name for i in depth_order(MINI)]
    assert names == [
        *("up_blocks.2.attentions.1", "up_blocks.2.resnets.1", "down_blocks.0.resnets.0", "down_blocks.0.attentions.0"),
        *("up_blocks.1.attentions.1", "up_blocks.1.resnets.1", "down_blocks.1.attentions.0"),
        *("up_blocks.0.resnets.1", "down_blocks.2.resnets.0"),
    ]


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize("noisy", [False, True])
def test_formulas(noisy):
    """Entry by entry, in Python's floats."""
    plan = layout(TINY)
    logits = 3 * torch.randn(2, plan.size) - 2
    noise = gumbel(TINY, 1, [3, 4]) if noisy else None
    gates = binarise(TINY, logits, noise)
    added = 0
    for row in range(2):
        n = noise[row].tolist() if noisy else [0.0] * plan.size
        z = logits[row].tolist()
        wanted = [sigmoid((z[i] + n[i] + 3) / 0.4) for i in range(plan.widths)]
        for s in plan.segments:
            if max(wanted[s.start : s.stop]) < 0.5:
                wanted[s.start] += 0.5
                added += 1
        powers = [math.exp(v) for v in z[plan.widths :]]
        depths = [0.0] * len(powers)
        for k, site in enumerate(depth_order(TINY)):
            c = sum(powers[: len(powers) - k]) / sum(powers)
            depths[site] = sigmoid((math.log((c + 1e-6) / (1 - c + 1e-6)) + n[plan.widths + k] + 3) / 0.4)
        torch.testing.assert_close(gates[row], torch.tensor(wanted + depths), rtol=1e-3, atol=1e-5)
    assert added or noisy


@pytest.mark.parametrize("share", [1e-7, 3e-6, 0.5])
def test_the_logit_of_a_depth(share):
    """log((c + 1e-6) / (1 - c + 1e-6)) of the second site's c = share; a cut at 1e-6 would differ."""
    plan = layout(TINY)
    logits = torch.zeros(1, plan.size, dtype=torch.float64)
    logits[0, plan.widths :] = -100.0
    logits[0, plan.widths], logits[0, -1] = math.log(share), math.log1p(-share)
    gate = binarise(TINY, logits)[0, plan.widths + depth_order(TINY)[1]]
    wanted = math.log((share + 1e-6) / (1 - share + 1e-6))
    assert gate.logit().item() * 0.4 - 3 == pytest.approx(wanted, abs=1e-6)


def test_open_at_the_start():
    """b = 3: logits as small as an orthogonal code's leave all of SD 2.1 open."""
    gates = binarise(SD21, torch.randn(8, 1620) / 40)
    assert gates.min() > 0.5


def test_something_always_stays():
    gates = binarise(SD21, torch.full((2, 1620), -30.0), gumbel(SD21, 0, [0, 1]))
    structure = from_vector(SD21, gates[0])
    assert all(units == (0,) for widths in structure.kept.values() for units in widths.values())
    open_gates = binarise(SD21, torch.full((1, 1620), 30.0))
    assert from_vector(SD21, open_gates[0]).is_dense
    assert open_gates.max() <= 1


def test_depths_go_innermost_first():
    """One large logit decides how many sites stay: all but a beginning of the reversed order are closed."""
    plan = layout(SD21)
    for stays in range(1, 14):
        logits = torch.zeros(1, plan.size)
        logits[0, plan.widths + 14 - stays] = 30.0
        depths = binarise(SD21, logits)[0, plan.widths :]
        assert {i for i in range(14) if depths[i] >= 0.5} == set(depth_order(SD21)[:stays])


def test_gradient_reaches_all_logits():
    """Closed vectors and depths too; against central differences in fp64."""
    plan = layout(TINY)
    logits = torch.randn(2, plan.size, dtype=torch.float64) - 3
    logits[0, plan.segments[2].start : plan.segments[2].stop] = -5
    logits.requires_grad_()
    noise, upstream = gumbel(TINY, 0, [0, 1]), torch.randn(2, plan.size, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((binarise(TINY, logits, noise) * upstream).sum(), logits)
    assert gradient.abs().gt(0).all()
    for i in (0, 5, plan.segments[2].start, plan.widths, plan.widths + 4, plan.size - 1):
        ahead, behind = logits.detach().clone(), logits.detach().clone()
        ahead[:, i] += 1e-5
        behind[:, i] -= 1e-5
        change = (binarise(TINY, ahead, noise) - binarise(TINY, behind, noise)) * upstream / 2e-5
        torch.testing.assert_close(gradient[:, i], change.sum(dim=1), rtol=1e-5, atol=1e-9)


def test_noise_belongs_to_the_sample():
    """Gumbel distributed, finite, and the same for a sample in any batch."""
    noise = gumbel(SD21, 7, range(200))
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02
    assert torch.equal(gumbel(SD21, 7, [41, 3]), noise[[41, 3]])
    assert not torch.equal(gumbel(SD21, 8, [41]), noise[41:42])


def test_without_noise_rows_are_independent():
    """To the last bit but one: vectorised exponentials round by where in memory a number lies."""
    logits = 4 * torch.randn(6, layout(MINI).size)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    gates = binarise(MINI, logits)
    torch.testing.assert_close(binarise(MINI, logits[order]), gates[order], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(binarise(MINI, logits[3:4]), gates[3:4], rtol=1e-6, atol=1e-7)


def test_harden_is_straight_through():
    gates = torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0], requires_grad=True)
    hard = harden(gates)
    assert hard.tolist() == [0, 0, 1, 1, 1]
    (gradient,) = torch.autograd.grad((hard * torch.tensor([1.0, 2, 3, 4, 5])).sum(), gates)
    assert gradient.tolist() == [1, 2, 3, 4, 5]


def test_refuses_other_lengths():
    with pytest.raises(ValueError, match=r"\(1, 1619\), wanted \(B, 1620\)"):
        binarise(SD21, torch.zeros(1, 1619))
