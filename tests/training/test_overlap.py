"""Gradients of several ranks are sent while backward still runs, in one order, and add up to the same bits."""

import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F

from bilevel_fast.models.unet import UNet
from bilevel_fast.scale import rows
from bilevel_fast.training.losses import Loss
from bilevel_fast.training.lower import descend
from bilevel_fast.training.sharded import IN_FLIGHT, ShardedParameters
from thread_team import together
from world import TINY

ONE_AT_A_TIME = threading.Lock()
SMALL = dataclasses.replace(TINY, block_out_channels=(32, 64))


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    monkeypatch.setattr(rows, "BUCKET", 2)


def unet() -> UNet:
    with ONE_AT_A_TIME:  # threads share torch's random numbers
        torch.manual_seed(0)
        return UNet(SMALL)


def losses(network: UNet, parts):
    """Of parts of a batch, by their numbers."""
    for part in parts:
        generator = torch.Generator().manual_seed(part)
        x = torch.randn(1, SMALL.in_channels, 8, 8, generator=generator)
        text = torch.randn(1, 5, SMALL.cross_attention_dim, generator=generator)
        out = network(x, torch.tensor([100 + part]), text).out
        yield Loss(F.mse_loss(out.float(), x), {})


def test_the_first_bucket_is_sent_before_backward_has_reached_the_first_layer():
    def work(team):
        flat = ShardedParameters(unet(), team=team, leaves=2)
        first = flat.module.conv_in.weight
        first.register_post_accumulate_grad_hook(lambda _: team.events.append("first layer"))
        descend(losses(flat.module, [team.rank]), 1, flat)
        return flat, team.events

    for flat, events in together(2, work):
        sent, reached = [e for e in events if e[0] == "exchange"], events.index("first layer")
        assert [start for _, start in sent] == [bucket.start for bucket in reversed(flat._cut)]
        before = sum(event[0] == "exchange" for event in events[:reached])
        assert before >= len(flat._cut) - 1 > IN_FLIGHT, "all but the bucket of the first layer"


@pytest.mark.parametrize("missing", [False, True])
def test_all_send_in_one_order_whatever_comes_first(missing):
    """Backward goes through the parameters in another order on each rank, or some of them have no gradient."""

    def work(team):
        flat = ShardedParameters(unet(), team=team, leaves=2)
        named = [(n, p) for n, (_, p) in enumerate(flat.module.named_parameters())]
        order = torch.randperm(len(named), generator=torch.Generator().manual_seed(team.rank)).tolist()
        total = sum((named[n][1] * named[n][0]).sum() for n in order if not (missing and n % 3 == 0))
        descend([Loss(total * (team.rank + 1), {})], 1, flat)
        return flat, team.events, flat.gathered(flat.gradient)

    (flat, events, whole), (_, others, _) = together(2, work)
    assert events == others
    assert [start for _, start in events[: len(flat._cut)]] == [bucket.start for bucket in reversed(flat._cut)]
    for n, view in enumerate(flat.views(whole).values()):
        assert (view == (0 if missing and n % 3 == 0 else 1.5 * n)).all(), "the mean of both ranks' losses"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("leaves", "micro"), [(2, 1), (4, 1), (2, 2)])
def test_a_gradient_that_is_sent_meanwhile_has_the_bits_of_one_rank(leaves, micro, dtype):
    def work(team):
        flat = ShardedParameters(unet(), dtype, summed=micro > 1, team=team, leaves=leaves)
        mine = [leaf * micro + part for leaf in team.ranks.leaves(leaves) for part in range(micro)]
        for add in (False, True):
            loss = descend(losses(flat.module, mine), len(mine), flat, weight=3.0, add=add)
        return loss.total, flat.gathered(flat.gradient)

    ((total, gradient),) = together(1, work)
    assert gradient.norm() > 0
    for its_total, its_gradient in together(2, work):
        assert torch.equal(its_total, total)
        assert torch.equal(its_gradient, gradient)


def test_a_released_network_sends_nothing():
    def work(team):
        flat = ShardedParameters(unet(), team=team, leaves=2)
        network = flat.release()
        del team.events[:]
        flat.expect(0, 1, False)
        next(losses(network, [0])).total.backward()
        return team.events

    assert together(2, work) == [[], []]
