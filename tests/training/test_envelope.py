"""MEHA's upper step: against its formula in both precisions, replayed, resumed, and with bugs planted in it."""

import pytest
import torch

from bilevel_fast.erasing import registry as erasers
from bilevel_fast.erasing.settings import Meha, Upper
from bilevel_fast.train import parse
from bilevel_fast.training import envelope
from bilevel_fast.training.graphs import Graphs
from bilevel_fast.training.levels import bilevel, descend
from bilevel_fast.training.lower import descend as gradient_of
from bilevel_fast.training.student import StudentTraining
from mutants import mutated
from replay import Recording, on_the_cpu
from world import make_levels, make_models

A, GAMMA, LAMBDA = 0.3, 2.0, 3.0


def world(module=envelope, dtype=torch.float32):
    """Both levels with MEHA between them, and v beside theta."""
    lower, upper = make_levels(*make_models(), penalty=LAMBDA, norm="raw", dtype=dtype)
    upper.gradient.penalty = torch.tensor(LAMBDA)
    upper.gradient.envelope = module.Envelope(lower.gradient, A, GAMMA)
    return lower, upper


def gaps(module=envelope, dtype=torch.float32, recording=False) -> tuple[float, float]:
    """How far v and d of one upper step are from the formulas in fp64, relative to what they add."""
    lower, upper = world(module, dtype)
    flat, suppression = lower.optimizer.flat, upper.gradient
    descend(lower, 0)
    noise = torch.randn(flat.master.shape, generator=torch.Generator().manual_seed(1))
    theta, v = flat.master.clone(), flat.master + 1e-3 * noise * (flat.master != 0)  # padding stays zero
    batch, answers = upper.batches(0), suppression.lower.answers

    def gradient(weights, losses):
        flat.rows.copy_(weights)
        gradient_of(losses(), 1, flat)
        found = flat.gradient.double()
        flat.rows.copy_(theta)
        return found

    def penalty():
        return [lower.gradient.loss(answered) for answered in answers.last]

    g = gradient(theta, lambda: [suppression.eraser.loss(flat.module, answers, batch)])
    r, at_v = gradient(theta, penalty), gradient(v, penalty)
    suppression.envelope.v.copy_(v)
    if recording:
        with Recording():
            suppression(batch)
    else:
        suppression(batch)
    assert torch.equal(flat.master, theta), "theta is not where it was"
    if flat.rows is not flat.master:
        assert torch.equal(flat.rows, theta.to(dtype)), "the network does not compute with theta"
    theta, v = theta.double(), v.double()
    stepped = v - A * (at_v + GAMMA * (v - theta))
    wanted = g + LAMBDA * (r - GAMMA * (theta - stepped))
    off = (suppression.envelope.v.double() - stepped).norm() / (stepped - v).norm()
    return off.item(), ((flat.gradient.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_step_is_the_formula(dtype, close):
    """v, then d with the new v; where the network computes in bf16, v is fp32. Nothing is read from the device."""
    assert max(gaps(dtype=dtype, recording=True)) < close


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("alpha=-self.gamma", "alpha=self.gamma"),
        ("self.rate * self.gamma * finite.float()", "self.rate * finite.float()"),
        ("alpha=-self.rate)", "alpha=self.rate)"),
        ("with self.flat.at(self.v):", "with torch.enable_grad():"),
        ("flat.master - self.v", "self.v - flat.master"),
    ],
)
def test_a_bug_in_the_step_is_seen(old, new, tmp_path):
    assert max(gaps(mutated(envelope.__file__, old, new, tmp_path))) > 1e-3


def test_it_costs_one_pass_of_the_student_more():
    lower, upper = world()
    passes = []
    lower.gradient(lower.batches(0))
    lower.gradient.student.register_forward_hook(lambda *_: passes.append(1))
    upper.gradient(upper.batches(0))
    assert len(passes) == 3


def test_a_gradient_that_is_not_finite_leaves_v_alone():
    lower, upper = world()
    descend(lower, 0)
    v, last = upper.gradient.envelope.v.clone(), lower.gradient.answers.last
    last[0].noised.target[0, 0, 0, 0] = torch.nan
    upper.gradient.envelope.follow()
    assert torch.equal(upper.gradient.envelope.v, v)


def test_replayed_and_resumed_it_is_the_same_run():
    def walk(steps, graphs=None, state=None):
        lower, upper = world()
        training = StudentTraining(lower, upper, 1, torch.device("cpu"), graphs=False)
        if state:
            flat, optimizers, extras, start = state
            training.flat.load_state_dict(flat)
            for name, optimizer in training.optimizers.items():
                optimizer.load_state_dict(optimizers[name])
            training.load_extras(extras)
            lower.gradient.answers.last = ()
        start = state[-1] if state else 0
        for _ in bilevel(lower, upper, 1, start, steps, *([] if graphs is None else [graphs])):
            pass
        optimizers = {name: optimizer.state_dict() for name, optimizer in training.optimizers.items()}
        return training.flat.state_dict(), optimizers, training.extras(), steps

    whole = walk(4)
    assert whole[2]["envelope"].keys() == whole[0].keys()
    assert any(not torch.equal(whole[2]["envelope"][name], value) for name, value in whole[0].items())
    for other in (walk(4, Graphs(on_the_cpu)), walk(4, state=walk(2))):
        for mine, wanted in ((other[0], whole[0]), (other[2]["envelope"], whole[2]["envelope"])):
            assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


def test_what_is_held_still_stays_still():
    """theta - v may be anywhere; an upper step moves its subset alone."""
    lower, upper = world()
    still = lower.optimizer.flat.gradients(["conv_in.weight"])[0]
    upper.gradient._hold = lambda: (lower.optimizer.flat.settle(), still.zero_())
    descend(lower, 0)
    upper.gradient.envelope.v.add_(0.1)
    upper.gradient(upper.batches(0))
    assert not still.any()
    assert lower.optimizer.flat.gradient.any()


def test_the_memory_model_counts_v():
    held = erasers.holds(Upper(solver="meha", penalty_norm="raw"), graphs=False)
    assert held["envelope"]
    assert held["second"], "a lambda that rises is a tensor: both gradients are there at once"
    assert not erasers.holds(Upper(), graphs=False)["envelope"]


def test_its_settings_reach_it():
    upper = parse(["--upper.solver", "meha", "--upper.meha.rate", "0.2", "--upper.meha.gamma", "3"]).upper
    assert upper.meha == Meha(0.2, 3.0)
