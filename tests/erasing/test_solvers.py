"""Solvers of the upper step: BOME and schedules of lambda against their formulas, resumed, and what is refused."""

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing import registry as erasers
from bilevel_fast.erasing.settings import ControllerSettings, Upper
from bilevel_fast.erasing.solvers import BARRIER, bome, weight_at
from bilevel_fast.train import parse
from bilevel_fast.training.graphs import Graphs
from bilevel_fast.training.levels import bilevel
from bilevel_fast.training.parameters import FlatParameters
from replay import Recording, on_the_cpu
from world import make_levels, make_models


@pytest.mark.parametrize("along", [-0.7, 0.0, 0.2, 0.5, 0.9])
def test_bome_is_the_nearest_direction_along_which_the_lower_loss_falls(along):
    """Its formula in fp64, and what it is the answer to: <r, d> >= eta |r|^2. Nothing is read from the device."""
    generator = torch.Generator().manual_seed(0)
    flat = FlatParameters(make_models()[1])
    g, r = torch.randn(2, len(flat.gradient), generator=generator)
    g = g - (r @ g) / (r @ r) * r + along * r
    flat.gradient.copy_(r)
    with Recording():
        bome(g.clone(), flat)
    d, g, r = flat.gradient.double(), g.double(), r.double()
    expected = g + max(0.0, 0.5 - (g @ r / (r @ r)).item()) * r
    torch.testing.assert_close(d, expected, rtol=1e-5, atol=1e-5)
    assert (r @ d / (r @ r)).item() == pytest.approx(max(BARRIER, along), abs=1e-4)


def test_bome_without_a_lower_gradient_is_suppression_alone():
    flat = FlatParameters(make_models()[1])
    g = torch.randn(len(flat.gradient), generator=torch.Generator().manual_seed(0))
    flat.gradient.zero_()
    bome(g.clone(), flat)
    assert torch.equal(flat.gradient, g)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("rising", lambda k: 2 * (k + 1) ** 0.25),
        ("linear", lambda k: 2 * min(10, (k + 1) / 10)),
        ("falling", lambda k: 2 + 0.2 * (k + 1) ** (-1 / 7)),
    ],
)
def test_schedules(schedule, wanted):
    steps = torch.zeros(())
    for k in range(150):
        assert weight_at(schedule, 2.0, steps).item() == pytest.approx(wanted(k), rel=1e-6)
        steps.add_(1)


def test_a_schedule_goes_on_in_a_replayed_step():
    """The optimizer's counter is what moves it: a recorded step sees it, and says which lambda it had."""

    def walk(graphs=None):
        lower, upper = make_levels(*make_models())
        upper.gradient.penalty = lambda: weight_at("rising", 1.0, upper.optimizer.steps)
        walked = bilevel(lower, upper, 1, 0, 5, *([] if graphs is None else [graphs]))
        return [step["upper/lambda"].item() for step in walked], upper.optimizer.flat.master

    (replayed, last), (expected, wanted) = walk(Graphs(on_the_cpu)), walk()
    assert replayed == expected == pytest.approx([(k + 1) ** 0.25 for k in range(5)])
    assert torch.equal(last, wanted)


BOME = ["--upper.solver", "bome"]
RISING = ["--upper.penalty-schedule", "rising"]
MEHA = ["--upper.solver", "meha"]


@pytest.mark.situation
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*BOME, "--upper.eraser", "uce"], "--upper.solver is bome, but eraser 'uce' does not read it"),
        ([*RISING, "--upper.eraser", "uce"], "--upper.penalty-schedule is rising, but eraser 'uce' does not read it"),
        ([*BOME, "--upper.eraser", "erasediff"], "--upper.solver bome given with eraser 'erasediff'"),
        ([*RISING, "--upper.eraser", "erasediff"], "--upper.penalty-schedule rising given with eraser 'erasediff'"),
        ([*BOME, "--upper.penalty", "2"], "--upper.penalty 2 given with --upper.solver bome, which has no lambda"),
        ([*BOME, "--upper.penalty-norm", "raw"], "--upper.penalty-norm raw given with --upper.solver bome"),
        ([*BOME, "--upper.surgery"], "--upper.surgery given with --upper.solver bome"),
        ([*BOME, *RISING], "--upper.penalty-schedule rising given with --upper.solver bome"),
        ([*BOME, "--upper.controller.enabled"], "--upper.controller.enabled given with --upper.solver bome"),
        ([*RISING, "--upper.controller.enabled"], "rising given with --upper.controller.enabled, which chooses lambda"),
        ([*MEHA, *RISING], "--upper.penalty-schedule rising given with --upper.solver meha, whose lambda rises from"),
        ([*MEHA, "--upper.surgery"], "--upper.surgery given with --upper.solver meha"),
        ([*MEHA, "--upper.penalty", "0"], "--upper.penalty 0 given with --upper.solver meha"),
        ([*MEHA, "--upper.controller.enabled"], "--upper.controller.enabled given with --upper.solver meha"),
        ([*MEHA, "--upper.eraser", "erasediff"], "--upper.solver meha given with eraser 'erasediff'"),
        ([*MEHA, "--upper.eraser", "selective-amnesia", "--upper.meha.gamma", "51"], "times --upper.meha.gamma is"),
        ([*MEHA, "--upper.meha.rate", "0"], "--upper.meha.rate is 0.0: wanted > 0 and finite"),
        (["--upper.meha.rate", "0.05"], "--upper.meha given with --upper.solver penalty, which does not read it"),
        ([*RISING, "--upper.penalty", "0"], "--upper.penalty-schedule rising given with --upper.penalty 0"),
    ],
)
def test_a_solver_and_what_it_would_not_read(flags, message):
    """A solver with an eraser that has no gradient, or with settings that it would not read: refused, by flag."""
    with pytest.raises(UserError) as refused:
        parse(flags)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_preset_s_lambda_is_nobody_s_choice():
    assert parse(["--preset", "paper", "--dry-run", *BOME]).upper.solver == "bome"


@pytest.mark.parametrize(
    "upper",
    [
        Upper(solver="bome", penalty=0.0),
        Upper(solver="bome", penalty_norm="raw"),
        Upper(penalty_norm="raw", penalty_schedule="rising"),
        Upper(controller=ControllerSettings(enabled=True)),
    ],
)
def test_a_second_gradient_is_counted_by_the_memory_model(upper):
    assert erasers.holds(upper, graphs=False)["second"]
