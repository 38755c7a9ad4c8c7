"""Flat parameters of several ranks, which are threads here: what they hold together is what one rank holds."""

import threading

import pytest
import torch

from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.scale import rows
from bilevel_fast.training.levels import descend
from bilevel_fast.training.optim import LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.sharded import ShardedParameters
from thread_team import together
from world import TINY, make_levels, make_models

ONE_AT_A_TIME = threading.Lock()


def unet() -> UNet:
    """With padding inside of its parameters, which a state dict leaves out."""
    with ONE_AT_A_TIME:  # threads share torch's random numbers
        torch.manual_seed(0)
        return UNet(TINY, Structure.uniform(TINY, 0.6), 8)


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch):
    """A few rows at once: these networks have several buckets, and the last is a part of one."""
    monkeypatch.setattr(rows, "BUCKET", 2)


def leave_gradients(network: UNet, leaf: int) -> None:
    """Whole numbers, whose sums are exact in any order."""
    for number, p in enumerate(network.parameters()):
        generator = torch.Generator().manual_seed(100 * number + leaf)
        p.grad = torch.randint(-8, 9, p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_one_rank(world, dtype):
    """Norm, product, what the network computes with, and what is saved of masters, average and moments."""
    leaves = 6

    def train(flat, mine, count):
        optimizer = LevelOptimizer(flat, 0.1, 0, clip_norm=1.0)
        for _ in range(2):
            for part, leaf in enumerate(mine):
                leave_gradients(flat.module, leaf)
                flat.take(part, count, add=False)
            norm = optimizer.step()
        flat.arrive()
        dot = flat.dot(flat.gradient, flat.master)
        states = [flat.state_dict(), flat.state_dict(flat.average), optimizer.state_dict()["rule"]["second"]]
        return flat, norm, dot, states

    one, norm, dot, expected = train(FlatParameters(unet(), dtype, average=True, summed=True), range(leaves), leaves)

    def work(team):
        flat = ShardedParameters(unet(), dtype, average=True, team=team, leaves=leaves)
        assert len(flat.master) * world - len(one.master) < world * rows.ROW
        return train(flat, team.ranks.leaves(leaves), leaves // world)

    found = together(world, work)
    for flat, its_norm, its_dot, states in found:
        assert torch.equal(its_norm, norm)
        assert (its_dot - dot).abs() <= 1e-6 * one.norm() * one.norm(one.master), "by rows, and not by larger parts"
        for name, p in flat.module.named_parameters():
            assert torch.equal(p, one.module.get_parameter(name)), name
        for state, wanted in zip(states, expected, strict=True):
            if flat.team.rank:
                assert state == {}
                continue
            assert state.keys() == wanted.keys()
            assert all(torch.equal(value, wanted[name]) for name, value in state.items())


def test_what_one_number_of_ranks_saves_another_reads():
    """Of buffers of any dtype, bit for bit, and padding stays zero."""
    flat = FlatParameters(unet(), torch.bfloat16)
    numbers = torch.arange(len(flat.master), dtype=torch.float32) * 1e-3
    flat.load_state_dict(flat.state_dict(numbers))
    saved = {name: value.clone() for name, value in flat.state_dict().items()}
    mask = {name: value > 1 for name, value in saved.items()}

    def work(team):
        other = ShardedParameters(unet(), torch.bfloat16, team=team, leaves=6)
        with torch.no_grad():
            for p in other.module.parameters():
                p.zero_()
        other.load_state_dict(saved)
        marks = torch.zeros_like(other.master, dtype=torch.bool)
        other.load_state_dict(mask, marks)
        with pytest.raises(RuntimeError, match=r"^extra is not of this network$"):
            other.load_state_dict(saved | {"extra": other.master})
        return other.state_dict(), other.state_dict(marks), other.gathered(other.master), other

    for world in (2, 3):
        for number, (state, marks, whole, other) in enumerate(together(world, work)):
            assert torch.equal(whole, flat.master)
            assert torch.equal(other.compute[: len(whole)], flat.compute)
            assert not other.compute[len(whole) :].any()
            if number == 0:
                assert all(torch.equal(value, saved[name]) for name, value in state.items())
                assert all(torch.equal(value, mask[name]) for name, value in marks.items())


def test_whole_buffers_are_changed_by_all_alike():
    def work(team):
        flat = ShardedParameters(unet(), torch.bfloat16, average=True, team=team, leaves=3)
        with flat.whole() as (masters, average):
            for name, view in flat.views(masters).items():
                view.fill_(len(name))
            average.fill_(2.0)
        return flat

    for flat in together(3, work):
        assert all((p == len(name)).all() for name, p in flat.module.named_parameters())
        assert (flat.average == 2).all()


def test_rows_of_some_parameters_and_of_a_mask():
    """Zeroing `gradients` of some leaves zeros there and nowhere else; `own` is what `gathered` is made of."""

    def work(team):
        flat = ShardedParameters(unet(), team=team, leaves=2)
        flat.gradient.fill_(1.0)
        names = [name for name, _ in flat.module.named_parameters()][1::3]
        for view in flat.gradients(names):
            view.zero_()
        whole = flat.gathered(flat.gradient)
        return flat, names, whole, flat.own(whole)

    found = together(2, work)
    for flat, names, whole, own in found:
        for name, view in flat.views(whole).items():
            assert (view == (name not in names)).all()
        assert torch.equal(own, flat.gradient) or flat.team.rank, "of the last rank, the end is padding"


def test_a_released_network_has_parameters_of_its_own():
    def work(team):
        flat = ShardedParameters(unet(), torch.bfloat16, average=True, team=team, leaves=2)
        flat.average.add_(1)
        return flat.release()

    start = unet().state_dict()
    for network in together(2, work):
        for name, value in network.state_dict().items():
            assert torch.equal(value, start[name] + 1)


def test_weights_are_on_their_way_until_the_network_computes():
    """Sent when a step begins, and not when the one before ends; the network waits, whoever calls it."""

    def work(team):
        flat = ShardedParameters(unet(), torch.bfloat16, team=team, leaves=2)
        inputs = torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 4, TINY.cross_attention_dim)
        inputs = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
        optimizer, found = LevelOptimizer(flat, 0.1, 0), []
        for step in range(3):
            leave_gradients(flat.module, team.rank)
            flat.take(0, 1, add=False)
            del team.events[:]
            optimizer.step()
            assert len(team.events) == 1, "the norm alone"
            if step:  # else the network asks for them itself
                flat.publish()
                assert len(flat._coming) == len(flat._cut)
            out = flat.module(*inputs).out
            assert len(team.events) == 1 + len(flat._cut), "sent once"
            assert not flat._coming
            flat.module(*inputs)
            assert len(team.events) == 1 + len(flat._cut), "nothing has moved since"
            found.append((out, flat.compute.clone()))
        return found, flat

    first, second = together(2, work)
    for (out, compute), (other_out, other) in zip(first[0], second[0], strict=True):
        assert torch.equal(compute, other)
        assert torch.equal(out, other_out)
    masters = first[1].master, second[1].master
    assert not torch.equal(first[0][0][1], first[0][2][1])
    for bucket in first[1]._cut:
        runs = [bucket.own(master).bfloat16() for master in masters]
        assert torch.equal(bucket.whole(first[0][-1][1]), torch.cat(runs))


def test_what_a_broken_step_leaves_is_forgotten():
    """A gradient that stays would be added to, a bucket on its way would be taken for the next one's."""

    def work(team):
        flat = ShardedParameters(unet(), team=team, leaves=4)
        for part in (0, 1):
            leave_gradients(flat.module, part)
            if part == 0:
                flat.take(0, 2, add=False)
        flat.expect(1, 2, add=False)
        flat._send()
        flat.publish()
        flat.forget()
        assert not flat._coming
        assert all(p.grad is None for p in flat.module.parameters())
        for part in (0, 1):
            leave_gradients(flat.module, 2 * team.rank + part)
            flat.take(part, 2, add=False)
        return flat.gathered(flat.gradient)

    whole = FlatParameters(unet(), summed=True)
    for leaf in range(4):
        leave_gradients(whole.module, leaf)
        whole.take(leaf, 4, add=False)
    for found in together(2, work):
        assert torch.equal(found, whole.gradient)


@pytest.mark.parametrize("name", ["lower", "upper"])
def test_weights_are_sent_before_the_teacher_is_asked(name, monkeypatch):
    """They travel while it answers."""
    order = []
    monkeypatch.setattr(FlatParameters, "publish", lambda self: order.append("weights"))
    levels = dict(zip(("lower", "upper"), make_levels(*make_models()), strict=True))
    descend(levels["lower"], 0)
    level = levels[name]
    for network, who in (
        (level.optimizer.flat.module, "student"),
        (levels["lower"].gradient.answers.teacher.unet, "teacher"),
    ):
        network.register_forward_pre_hook(lambda *_, who=who: order.append(who))
    del order[:]
    descend(level, 1)
    assert order[0] == "weights"
    assert order.index("teacher") < order.index("student")
    assert order.count("weights") == 1
