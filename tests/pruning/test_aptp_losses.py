"""What the router learns from: MACs as `macs.count` counts them, and every term against its formula."""

import dataclasses
import math

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21, sites
from bilevel_fast.models.diffusion import Noised
from bilevel_fast.models.macs import count
from bilevel_fast.models.unet import Prediction
from bilevel_fast.models.vector import from_vector, layout
from bilevel_fast.pruning.aptp.losses import GatePrices, RouterWeights, contrastive_loss, resource_loss, router_loss
from bilevel_fast.training.losses import LossWeights, fine_tuning_loss
from mini_folder import TINY

SIZES = {"sd21": (SD21, 64, 77), "mini": (MINI, 16, 12)}


def random_structures(config, number):
    """Hard vectors with random units, and random sites dropped."""
    vectors = (torch.rand(number, layout(config).size) < torch.linspace(0.2, 1, number)[:, None]).float()
    for s in layout(config).segments:
        vectors[:, s.start + 1] = 1
    return vectors, [from_vector(config, v) for v in vectors]


@pytest.mark.parametrize("name", SIZES)
def test_macs_of_hard_gates_are_the_count(name):
    """To the last MAC."""
    config, latent, text = SIZES[name]
    prices = GatePrices(config, latent, text)
    vectors, structures = random_structures(config, 6)
    counted = [count(s, latent, text).true for s in structures]
    assert any(s.dropped for s in structures)
    assert prices.macs(vectors).round().long().tolist() == counted
    torch.testing.assert_close(prices.macs(vectors), torch.tensor(counted).double(), rtol=1e-14, atol=0)
    assert prices.macs(torch.ones(1, layout(config).size)).item() == prices.dense == counted[-1]
    gone = prices.macs(torch.zeros(1, layout(config).size)).item()
    assert gone == pytest.approx(prices.dense - prices.prunable, rel=1e-14)


def test_prices_of_soft_gates_are_between():
    """Half of everything that has no depth costs half of its units; gradients are the price of a unit."""
    prices = GatePrices(MINI, 16, 12)
    gates = torch.rand(2, layout(MINI).size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(prices.macs(gates).sum(), gates)
    for s in layout(MINI).segments:
        hard = (torch.rand(1, layout(MINI).size) < 0.5).double()
        hard[0, layout(MINI).widths :] = 1
        with_, without = hard.clone(), hard.clone()
        with_[0, s.start], without[0, s.start] = 1, 0
        half = (with_ + without) / 2
        mean = (prices.macs(with_) + prices.macs(without)) / 2
        torch.testing.assert_close(prices.macs(half), mean)
        if not s.site.depth_bit:
            price = prices.macs(with_) - prices.macs(without)
            torch.testing.assert_close(gradient[:1, s.start], price, rtol=1e-9, atol=0)


@pytest.mark.parametrize("ratio", [0.55, 0.8, 1.0])
def test_target_is_the_budget(ratio):
    """Gates of the target's share keep the ratio of all MACs."""
    prices = GatePrices(SD21, 64, 77)
    gates = torch.ones(1, 1620, dtype=torch.float64)
    gates[0, :1606] = 0.37
    target, share, macs = prices.target(ratio), prices.share(gates).item(), prices.macs(gates).item()
    slope = (1 - macs / prices.dense) / (1 - share)
    assert 1 - slope * (1 - target) == pytest.approx(ratio, rel=1e-12)


def test_target_refuses():
    prices = GatePrices(MINI, 16, 12)
    least = 1 - prices.prunable / prices.dense
    with pytest.raises(UserError, match=rf"budget is 0.01, wanted {least:.3f} < budget <= 1"):
        prices.target(0.01)
    with pytest.raises(UserError, match=r"budget is 1.5"):
        prices.target(1.5)
    with pytest.raises(UserError, match="budget is nan"):
        prices.target(math.nan)


def test_resource_loss():
    share = torch.tensor([0.4, 0.8])
    assert resource_loss(share, 0.6).item() == pytest.approx(0, abs=1e-6)
    assert resource_loss(share, 0.3).item() == pytest.approx(math.log(2))
    assert resource_loss(share, 1.2).item() == pytest.approx(math.log(2))


def test_contrastive_loss():
    """Entry by entry in Python's floats; least where architectures lie as the prompts do."""
    a, c = torch.randn(4, 30) * 0.1 + 1, torch.randn(4, 7) * 0.1 + 1

    def shares(rows):
        rows = rows.double()
        cos = [[torch.dot(p, q).item() / (p.norm() * q.norm()).item() / 0.03 for q in rows] for p in rows]
        return [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in cos]

    ours, theirs = shares(a), shares(c)
    pairs = [(p, t) for row, target in zip(ours, theirs, strict=True) for p, t in zip(row, target, strict=True)]
    wanted = -sum(t * math.log(p) + (1 - t) * math.log(1 - p) for p, t in pairs) / 16
    assert contrastive_loss(a, c).item() == pytest.approx(wanted, rel=1e-5)
    assert contrastive_loss(c, c) < contrastive_loss(c[[1, 0, 3, 2]], c)
    assert contrastive_loss(c, c) < contrastive_loss(torch.ones(4, 30), c)


def test_contrastive_loss_is_finite_for_architectures_far_apart():
    """Opposite rows: probabilities of 0 and 1, and of equal ones."""
    for rows in (torch.cat([torch.eye(4), -torch.eye(4)]), torch.ones(8, 4)):
        a = rows.clone().requires_grad_()
        loss = contrastive_loss(a, torch.randn(8, 7))
        loss.backward()
        assert loss.isfinite()
        assert a.grad is not None
        assert a.grad.isfinite().all()


def make_batch(batch=4):
    blocks = [tuple(torch.randn(batch, 2, 3, 3) for _ in range(2)) for _ in range(2)]
    student, teacher = (Prediction(torch.randn(batch, 3, 4, 4), b) for b in blocks)
    noised = Noised(torch.randn(batch, 3, 4, 4), torch.arange(batch), torch.randn(batch, 3, 4, 4), torch.rand(batch))
    return student, teacher, noised


def test_total_has_the_published_weights():
    student, teacher, noised = make_batch()
    gates = torch.rand(4, layout(TINY).size, requires_grad=True)
    space, prompts, prices = torch.rand(4, layout(TINY).size), torch.randn(4, 7), GatePrices(TINY, 8, 12)
    loss = router_loss(student, teacher, noised, gates, space, prompts, prices, 0.5, RouterWeights())

    hard = torch.where(gates >= 0.5, 1.0, 0.0)
    r = [(prices.macs(row[None]).item() - prices.dense + prices.prunable) / prices.prunable for row in hard]
    mean = sum(r) / 4
    std = math.sqrt(sum((v - mean) ** 2 for v in r) / 3)
    task = fine_tuning_loss(student, teacher, noised, LossWeights(1.0, 0.2, 0.2))
    wanted = task.total.item() + 2 * abs(math.log(mean / 0.5)) + 100 * contrastive_loss(space, prompts).item()
    wanted += 0.1 * -std + 0.1 * (1 - max(r))
    assert loss.total.item() == pytest.approx(wanted, rel=1e-5)
    assert loss.terms["resource"].item() == pytest.approx(abs(math.log(mean / 0.5)), rel=1e-5)
    assert loss.terms["spread"].item() == pytest.approx(-std, rel=1e-5)
    assert loss.terms["largest"].item() == pytest.approx(1 - max(r), rel=1e-5)
    assert loss.terms["macs"].item() == pytest.approx(prices.macs(hard).mean().item() / prices.dense)
    for name in ("diffusion", "output", "feature"):
        torch.testing.assert_close(loss.terms[name], task.terms[name])

    (gradient,) = torch.autograd.grad(loss.total, gates)  # straight through: soft gates below 0.5 are moved as well
    assert gradient[gates < 0.5].abs().gt(0).float().mean() > 0.5


def test_one_sample_has_no_spread():
    """A standard deviation of one number is 0 here, not NaN; and equal samples have finite gradients."""
    student, teacher, noised = make_batch(1)
    prices, size = GatePrices(TINY, 8, 12), layout(TINY).size
    gates = torch.full((1, size), 0.7, requires_grad=True)
    space = torch.rand(1, size)
    loss = router_loss(student, teacher, noised, gates, space, torch.randn(1, 7), prices, 0.5, RouterWeights())
    loss.total.backward()
    assert loss.terms["spread"].item() == 0
    assert loss.total.isfinite()
    assert gates.grad is not None
    assert gates.grad.isfinite().all()


def test_weights_are_used():
    """Doubling a weight adds that term once more."""
    student, teacher, noised = make_batch()
    size, prices = layout(TINY).size, GatePrices(TINY, 8, 12)
    gates, space, prompts = torch.rand(4, size), torch.rand(4, size), torch.randn(4, 7)

    def measure(weights):
        return router_loss(student, teacher, noised, gates, space, prompts, prices, 0.5, weights)

    base = measure(RouterWeights())
    for name in ("diffusion", "output", "feature", "resource", "contrastive", "spread", "largest"):
        weight = getattr(RouterWeights(), name)
        doubled = measure(dataclasses.replace(RouterWeights(), **{name: 2 * weight}))
        assert (doubled.total - base.total).item() == pytest.approx(weight * base.terms[name].item(), abs=2e-5)


def test_per_expert_holds_each_sample_to_the_budget():
    """R is the mean over samples, not R of the mean, and nothing pulls sizes apart."""
    share = torch.tensor([0.25, 1.0], dtype=torch.float64)
    assert resource_loss(share, 0.625).item() == pytest.approx(0)
    wanted = (math.log(0.625 / 0.25) + math.log(1 / 0.625)) / 2
    assert resource_loss(share, 0.625, per_expert=True).item() == pytest.approx(wanted)
    student, teacher, noised = make_batch()
    size, prices = layout(TINY).size, GatePrices(TINY, 8, 12)
    gates, space, prompts = torch.rand(4, size), torch.rand(4, size), torch.randn(4, 7)
    common = (student, teacher, noised, gates, space, prompts, prices, 0.5)
    mean, each = router_loss(*common, RouterWeights()), router_loss(*common, RouterWeights(), per_expert=True)
    change = 2 * (each.terms["resource"] - mean.terms["resource"])
    change = change - 0.1 * mean.terms["spread"] - 0.1 * mean.terms["largest"]
    assert change.abs() > 0.01
    assert (each.total - mean.total).item() == pytest.approx(change.item(), abs=2e-5)


def test_weights_refuse():
    with pytest.raises(UserError, match="weight of the spread loss is -1, wanted 0 or more"):
        RouterWeights(spread=-1)
    with pytest.raises(UserError, match="nor all zero"):
        RouterWeights(diffusion=0, output=0, feature=0)


def test_every_site_has_a_price():
    prices = GatePrices(SD21, 64, 77)
    vector = torch.ones(1, 1620)
    for i, site in enumerate(s for s in sites(SD21) if s.depth_bit):
        vector[0, 1606 + i] = 0
        dropped = from_vector(SD21, vector[0])
        assert site.name in dropped.dropped
        assert prices.macs(vector).item() == pytest.approx(count(dropped, 64, 77).true, rel=1e-14)
