"""Training the router: who moves in which phase, that MACs arrive at the budget, and that a resumed run is the run."""

import copy
import dataclasses

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.diffusion import Schedule, noise
from bilevel_fast.models.macs import count
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.aptp.binarise import harden
from bilevel_fast.pruning.aptp.experts import experts
from bilevel_fast.pruning.aptp.gates import gated
from bilevel_fast.pruning.aptp.losses import GatePrices, RouterWeights, router_loss
from bilevel_fast.pruning.aptp.router import embed
from bilevel_fast.pruning.aptp.train import RouterConfig, RouterTraining, mean_pool, train
from bilevel_fast.pruning.budget import MacBudget
from mini_folder import TINY, TRAINED

BUDGET = MacBudget(0.8, 8, 5)
SCHEDULE = Schedule.sd()
QUICK = RouterConfig(experts=3, steps=4, pretrain=2, warmup=0, lr=0.01)


def batches(step, size=4):
    """Latents and text as functions of the step alone."""
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(size, 12, 8, 8, generator=generator)
    text = torch.randn(size, 5, 64, generator=generator)
    return Batch(latents, text, None, torch.arange(step * size, (step + 1) * size))


def start(config=QUICK, seed=0):
    torch.manual_seed(seed)
    return RouterTraining(UNet(TINY), SCHEDULE, BUDGET, 64, 4, config)


def advance(training, count=1):
    for _ in range(count):
        batch = batches(training.step)
        terms = training.advance(batch, mean_pool(batch))
    return terms


def test_a_step_is_the_loss_of_the_gated_network():
    """The second one, put together here from its parts, in both phases and both modes."""
    for mode, pretrain in (("exact", 2), ("compat", 1)):
        training = start(dataclasses.replace(QUICK, resnet=mode, pretrain=pretrain))
        advance(training)
        teacher, batch = training.teacher, batches(1)
        drawn, prompts = batch.drawn(0, 1000), batch.text.mean(dim=1)
        noised = noise(SCHEDULE, batch.latents, drawn.eps, drawn.t, 5.0)
        routed = training.router(prompts, batch.index, 1)
        gates = routed.own if pretrain == 2 else routed.codes[routed.expert]
        student = gated(teacher, noised.x, drawn.t, batch.text, gates, mode)
        whole = teacher(noised.x, drawn.t, batch.text)
        prices = GatePrices(TINY, 8, 5)
        space = embed(TINY, routed.own)
        loss = router_loss(student, whole, noised, gates, space, prompts, prices, prices.target(0.8), RouterWeights())
        terms = training.advance(batch, prompts)
        assert terms["loss"].item() == pytest.approx(loss.total.item(), rel=1e-6)
        assert terms["macs"].item() == pytest.approx(prices.macs(harden(gates)).mean().item() / prices.dense)


def test_who_moves_when():
    """First the predictor alone; then the codes by the task, and the predictor by the contrastive loss alone."""
    training = start()
    router, teacher = training.router, copy.deepcopy(training.teacher.state_dict())

    def moved():
        before = [p.detach().clone() for p in (router.predictor.linear.weight, router.codes)]
        advance(training)
        after = (router.predictor.linear.weight, router.codes)
        return [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]

    assert moved() == [True, False]
    assert moved() == [True, False]
    assert moved() == [True, True]
    assert all(torch.equal(old, training.teacher.state_dict()[name]) for name, old in teacher.items())

    silent = dataclasses.replace(QUICK, pretrain=1, weights=RouterWeights(contrastive=0))
    training = start(silent)
    router = training.router
    assert moved() == [True, False]
    advance(training)
    gradient = training.flat.views(training.flat.gradient)
    assert gradient["codes"].abs().sum() > 0
    assert gradient["predictor.linear.weight"].eq(0).all()


def test_resumed_run_is_the_run():
    straight, first = start(), start()
    advance(straight, 4)
    advance(first, 2)
    second = start(dataclasses.replace(QUICK, seed=0))
    second.flat.load_state_dict(first.flat.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.step = 2
    advance(second, 2)
    for mine, theirs in zip(second.router.parameters(), straight.router.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    other = start(dataclasses.replace(QUICK, seed=1))
    advance(other, 4)
    assert not torch.equal(other.router.codes, straight.router.codes)


@pytest.mark.parametrize("ratio", [0.9, 0.6])
def test_macs_arrive_at_the_budget(ratio):
    """In both phases, and on the structures that are cut in the end. High rates, so that it is soon."""
    torch.manual_seed(0)
    seen: list[float] = []
    weights = RouterWeights(contrastive=1)
    config = RouterConfig(experts=3, steps=110, pretrain=50, warmup=0, lr=0.04, weights=weights)

    def watch(step, terms):
        assert step == len(seen)
        seen.append(terms["macs"].item())

    router = train(UNet(TRAINED), SCHEDULE, batches, MacBudget(ratio, 8, 5), config, watch=watch)
    assert len(seen) == 110
    assert min(seen[0], seen[50]) > 0.97  # predictor and codes start open, and wait for their phase
    assert sum(seen[40:50]) / 10 == pytest.approx(ratio, abs=0.06)
    assert sum(seen[-20:]) / 20 == pytest.approx(ratio, abs=0.06)
    found = experts(TRAINED, router.gates())
    assert sum(count(structure, 8, 5).ratio for structure in found) / 3 == pytest.approx(ratio, abs=0.1)
    assert not any(p.requires_grad for p in router.parameters())


def test_rate_grows_with_the_batch_and_warms_up():
    training = start(dataclasses.replace(QUICK, warmup=2))
    rates = []
    for _ in range(4):
        rates.append(training.optimizer.next_lr.item())
        advance(training)
    assert rates == pytest.approx([0, 0.01, 0.02, 0.02])  # 0.01 times the square root of 4


def test_refuses():
    for name, value in (("experts", 0), ("steps", 0), ("pretrain", -1), ("warmup", -1)):
        with pytest.raises(UserError, match=f"{name} is {value}, wanted at least"):
            RouterConfig(**{name: value})
    with pytest.raises(UserError, match="lr is nan"):
        RouterConfig(lr=float("nan"))
    with pytest.raises(UserError, match=r"budget is 0.001, wanted 0\.\d+ < budget"):
        RouterTraining(UNet(MINI), SCHEDULE, MacBudget(0.001, 16, 12), 64, 4, QUICK)
