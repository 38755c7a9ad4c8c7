"""Selective Amnesia against a transcription: its three terms, the Fisher information, and the pull without a pass."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing import amnesia, registry
from bilevel_fast.erasing.settings import Upper
from bilevel_fast.models.diffusion import Schedule, noise
from bilevel_fast.train import parse
from bilevel_fast.training.lower import Answers
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.teacher import Teacher
from mutants import mutated
from world import SEED, B, Descent, make_batch, make_levels, make_models

WEIGHT, GRID, SAMPLES = 50.0, [0, 999], B + 1


@pytest.fixture(autouse=True)
def _torch_ops(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")


def denoising(student, batch, t=None):
    batch = batch.drawn(SEED, 1000)
    noised = noise(Schedule.sd(), batch.latents, batch.eps, batch.t if t is None else torch.full_like(batch.t, t))
    return F.mse_loss(student(noised.x, noised.t, batch.text).out, noised.target)


def by_hand(student, samples):
    """Mean over samples of the squared sum of gradients over the timesteps, by parameter."""
    total = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    for number in range(samples):
        one = make_batch(0, number // B).split(1)[number % B]
        student.zero_grad()
        for t in GRID:
            denoising(student, one, t).backward()
        for name, p in student.named_parameters():
            total[name] += (500 * p.grad) ** 2 / samples
        student.zero_grad()
    return total


@pytest.fixture(scope="module")
def wanted():
    return by_hand(make_models()[1], SAMPLES)


def information(module, wanted):
    teacher, student = make_models()
    flat = FlatParameters(student)
    answers = Answers(Teacher(teacher), Schedule.sd(), SEED)
    found = flat.views(module.fisher(student, answers, flat, partial(make_batch, 0), B, SAMPLES, len(GRID)))
    return max(((found[name] - value).norm() / value.norm()).item() for name, value in wanted.items() if value.any())


def test_fisher_information(wanted):
    assert information(amnesia, wanted) < 1e-3


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("found += flat.gradient", "found = flat.gradient.clone()"),  # of the last timestep alone
        ("total.addcmul_(found, found, value=", "total.add_(found.abs(), alpha="),
        ("== number]", "== 0]"),
    ],
)
def test_a_planted_bug_in_it_is_seen(old, new, wanted, tmp_path):
    source = mutated(amnesia.__file__, old, new, tmp_path)
    assert information(source, wanted) > 0.05


def gap_of_a_step(module, penalty):
    """How far an upper step's gradient is from that of the paper's loss; a step away from theta*."""
    lower, upper = make_levels(*make_models(), penalty=penalty, norm="raw", make=Descent, eraser=None)
    student, flat = lower.gradient.student, upper.optimizer.flat
    plain = copy.deepcopy(student)
    information = torch.rand(len(flat.master), generator=torch.Generator().manual_seed(0))
    pull = module.Remembered(flat, information, WEIGHT)
    star = [p.detach().clone() for p in plain.parameters()]
    upper.gradient.eraser, upper.gradient.pull = module.SelectiveAmnesia(pull), pull
    for step in range(2):  # the first has a learning rate of 0
        lower.gradient(lower.batches(step))
        lower.optimizer.step()
    plain.load_state_dict(student.state_dict())
    batch = upper.batches(0)
    found = upper.gradient(batch)
    held = flat.views(information).values()
    term = sum((h * (p - s) ** 2).sum() for h, p, s in zip(held, plain.parameters(), star, strict=True))
    total = denoising(plain, batch) + WEIGHT * term
    if penalty:
        answered = lower.gradient.answers.last[0]
        total = total + penalty * replace_loss(lower, plain, answered)
    assert term > 0
    assert found.terms["weights_held"].item() == pytest.approx((WEIGHT * term).item(), rel=1e-3)
    expected = torch.autograd.grad(total, list(plain.parameters()), allow_unused=True)
    views = flat.views(flat.gradient).values()
    return max(
        (v - e).norm() / e.norm() for v, e in zip(views, expected, strict=True) if e is not None and e.any()
    ), found.total.item() / total.item()


def replace_loss(lower, plain, answered):
    """The lower loss of another copy of the student."""
    fine_tuning = copy.copy(lower.gradient)
    fine_tuning.student = plain
    return fine_tuning.loss(answered).total


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_three_terms(gamma):
    gap, total = gap_of_a_step(amnesia, gamma)
    assert gap < 1e-3
    assert total == pytest.approx(1, rel=1e-3)


def test_half_a_pull_is_seen(tmp_path):
    module = mutated(amnesia.__file__, "alpha=2 * self.weight", "alpha=self.weight", tmp_path)
    assert gap_of_a_step(module, 0.0)[0] > 0.05


def test_in_place_of_the_lower_loss_it_costs_no_pass():
    """`--upper.solver ewc` with any eraser: the student is asked once, for the concept."""
    lower, upper = make_levels(*make_models(), penalty=0.0)
    student, flat, rows = lower.gradient.student, upper.optimizer.flat, []
    information = torch.ones_like(flat.master)
    upper.gradient.pull = amnesia.Remembered(flat, information, 3.0)
    lower.gradient(lower.batches(0))
    flat.master.add_(0.01)
    upper.gradient.pull.fisher[:] = 0
    without = upper.gradient(upper.batches(0)) and flat.gradient.clone()
    upper.gradient.pull.fisher[:] = 1
    student.register_forward_hook(lambda module, inputs, out: rows.append(len(out.out)))
    found = upper.gradient(upper.batches(0))
    assert rows == [B]
    assert set(found.terms) == {"suppression", "weights_held"}
    torch.testing.assert_close(flat.gradient - without, torch.full_like(without, 2 * 3.0 * 0.01), rtol=1e-3, atol=1e-5)


def test_another_start_is_refused():
    one, other = (amnesia.Remembered(FlatParameters(model), torch.zeros(()), 1.0) for model in make_models())
    one.load_state_dict(one.state_dict())
    with pytest.raises(UserError, match="held to the student as the run started, and that is another one now"):
        one.load_state_dict(other.state_dict())


@pytest.mark.parametrize(("upper", "on"), [(Upper(eraser="selective-amnesia"), True), (Upper(solver="ewc"), True)])
def test_the_memory_model_knows(upper, on):
    held = registry.holds(upper, graphs=False)
    assert held["remembered"] == on
    assert held["second"] == (upper.solver != "ewc")


@pytest.mark.situation
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--upper.amnesia.weight", "1"], "eraser 'guidance' does not read it; those that do: selective-amnesia"),
        (["--upper.fisher.samples", "2"], "eraser 'guidance' does not read it; those that do: selective-amnesia"),
        (["--upper.eraser", "selective-amnesia", "--upper.amnesia.weight", "-1"], "--upper.amnesia.weight is -1.0"),
        (["--upper.eraser", "selective-amnesia", "--upper.fisher.timesteps", "0"], "--upper.fisher.timesteps is 0"),
        (["--upper.eraser", "selective-amnesia", "--upper.solver", "ewc"], "which holds the weights already"),
        (["--upper.solver", "ewc", "--upper.surgery"], "ewc, which asks for no gradient of the lower loss"),
        (["--upper.eraser", "erasediff", "--upper.solver", "ewc"], "which weighs the two gradients by its own rule"),
    ],
)
def test_settings_that_nobody_would_read(flags, told):
    """Settings of Selective Amnesia that nobody would read, or out of range: one line with the flag."""
    with pytest.raises(UserError, match=told):
        parse(["--preset", "mini", *flags])


def test_its_settings_serve_the_solver_as_well():
    config = parse(["--preset", "mini", "--upper.solver", "ewc", "--upper.fisher.samples", "2"])
    assert config.upper.fisher.samples == 2
    assert replace(config.upper, solver="penalty") != config.upper
