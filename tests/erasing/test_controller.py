"""The controller: what it measures against plain formulas, what it decides, and that a step of it can be recorded."""

import copy
import json
import re
from itertools import pairwise

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing import registry as erasers
from bilevel_fast.erasing.controller import LEAST, MOST, Controller
from bilevel_fast.erasing.settings import ControllerSettings as Settings
from bilevel_fast.erasing.settings import Upper
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.folder import load_folder
from bilevel_fast.runs.assemble import fit, levels
from bilevel_fast.runs.session import gather, initial_student
from bilevel_fast.train import parse
from bilevel_fast.training import checkpoint
from bilevel_fast.training.graphs import Graphs
from bilevel_fast.training.levels import bilevel
from bilevel_fast.training.loop import Interrupted, Places, running
from bilevel_fast.training.lower import Answers
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.worlds.mini.materials import WORLD
from replay import on_the_cpu
from world import SEED, B, make_batch, make_levels, make_models

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _torch_ops(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")  # native code reads its numbers on the CPU, as no graph can


def make(penalty=1.0, every=2, steps=100, batch=B, **settings) -> Controller:
    return Controller(Upper(every, batch, penalty=penalty, controller=Settings(True, **settings)), steps, CPU)


def at(controller: Controller, progress: float, gap: float = 0.0, step: int = 0) -> Controller:
    """Put it where `progress` and the gap are so, after `step` lower steps of L_ft 1 without noise."""
    controller.way.copy_(torch.tensor([[progress, 1.0]]))
    controller.lower.copy_(torch.tensor([1.0, 0.1, 1 + gap, 0.0, 1.0, step]))
    return controller


def walk(controller: Controller, start=0, steps=9, both=None, graphs=None):
    """Run both levels under a controller; terms of all steps, and the levels."""
    if both is None:
        both = make_levels(*make_models(), penalty=controller.penalty)
        both = controller.take(*both)
    run = bilevel(*both, 10**9, start, steps, *([] if graphs is None else [graphs]))
    return [{name: value.item() for name, value in terms.items()} for terms in run], both


def test_the_gap_is_that_of_the_smoothed_loss():
    """Against floats, one by one; a loss that is not finite is none."""
    controller, horizon, slack = make(horizon=4, gap=0.02), 4, 0.02
    losses = [0.3, 3.0, 2.0, 1.5, 1.2, 1.0, 1.1, float("nan"), 0.9, 1.4, 1.6, 1.5, 1.9]
    weights, values, errors, least, seen = [], [], [], float("inf"), 0
    for loss in losses:
        controller.see(torch.tensor(loss))
        if loss != loss:
            continue
        before = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights) if weights else loss
        weights = [w * (1 - 1 / horizon) for w in weights] + [1 / horizon]
        values, errors, total = [*values, loss], [*errors, (loss - before) ** 2], sum(weights)
        smooth = sum(w * v for w, v in zip(weights, values, strict=True)) / total
        least = smooth if seen < horizon else min(least, smooth)
        seen += 1
        variance = sum(w * e for w, e in zip(weights, errors, strict=True)) / total
        noise = (variance * sum(w * w for w in weights)) ** 0.5 / total
        u = min(max((smooth - least) / max(slack * least, 5 * noise) - 1, 0), 1)
        found = [x.item() for x in controller.excess]
        assert found == pytest.approx([(smooth - least) / least, u], rel=1e-4, abs=1e-5)
    assert found[0] > 0.1


def test_noise_is_no_gap_and_a_rise_is_one():
    generator = torch.Generator().manual_seed(0)
    quiet, rising = make(horizon=10, gap=0.01), make(horizon=10, gap=0.01)
    heard = []
    for step in range(400):
        noise = 0.15 * torch.randn((), generator=generator)
        quiet.see(1 + noise)
        rising.see(1 + noise + (0.5 if step > 350 else 0.0))
        heard.append(quiet.excess[1].item())
    assert sum(u > 0 for u in heard) < 0.03 * len(heard)
    assert quiet.excess[0] > 0.01, "the bare gap is over its share, for noise alone"
    assert rising.excess[1] == 1


@pytest.mark.parametrize("eta", [0.0, 1.0, 2.5])
def test_progress_counts_the_way_to_the_anchor(eta):
    """0 at the concept, 1 at the anchor, 1 + eta at the target, whatever is wrong besides."""
    c, a, other = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    target, way = a - eta * (c - a), a - c
    other -= (other * way).sum() / way.square().sum() * way
    for out, expected in ((c, 0.0), (a, 1.0), (target, 1 + eta), (0.4 * c + 0.6 * a, 0.6)):
        controller = make(batch=2)
        controller.watch(out + 3 * other, c, target, 1 + eta)
        assert controller.progress.item() == pytest.approx(expected, abs=1e-5)
    controller.watch(c * float("nan"), c, target, 1 + eta)
    assert controller.progress.item() == pytest.approx(0.6, abs=1e-5)
    controller.watch(c, c, target, 1 + eta)  # the later step counts half, the one before a quarter
    assert controller.progress.item() == pytest.approx(0.2, abs=1e-5)


@pytest.mark.parametrize("name", [name for name, kind in erasers.ERASERS.items() if kind.watched])
def test_every_eraser_shows_what_it_does(name):
    """Its answer, the concept's, and its target: the loss is their distance, and the concept's is the source's."""
    (teacher, student), kind = make_models(), erasers.ERASERS[name]
    upper = Upper(eraser=name, eta=0.7)
    start, answers = erasers.start(upper, student, torch.float32), Answers(Teacher(teacher), Schedule.sd(), SEED)
    flat = FlatParameters(student)
    look = lambda batches, share: torch.ones_like(flat.master, dtype=torch.bool)  # noqa: E731
    null = torch.zeros(1, 5, 16)
    scene = erasers.EraserParts(answers.teacher, start, flat, null, lambda: None, look, lambda *_: flat.master)
    eraser, batch, seen = kind.make(upper, scene), make_batch(1, 0), []
    unwatched = eraser.loss(student, answers, batch)
    assert set(unwatched.terms) <= {"suppression", "anchor"}
    eraser.watch = lambda *what: seen.append(what)
    loss = eraser.loss(student, answers, batch)
    out, concept, target, reach, *order = seen[0]
    assert torch.equal(loss.total, unwatched.total)
    assert (out.detach() - target).square().mean().item() == pytest.approx(loss.terms["suppression"].item(), rel=1e-5)
    if name == "esd":
        x, t, rows = eraser.paint(student, answers, batch)
        with torch.no_grad():
            c, a = (start.unet(x, t, states[rows]).out for states in (batch.text, batch.anchor))
        assert torch.equal(order[0], rows)
    else:
        noised = answers.noise(batch)
        with torch.no_grad():
            c = teacher(noised.x, noised.t, batch.text).out
            source = {"start": start, "self": erasers.Itself(student)}.get(kind.source, answers.teacher)
            a = source.predict(noised, batch.anchor).out
    eta = upper.eta if "eta" in kind.reads else 0.0
    assert reach == 1 + eta
    torch.testing.assert_close(concept, c, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target, a - eta * (c - a), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("penalty", "progress", "gap", "step", "expected"),
    [
        (10.0, 0.0, 0.0, 0, 10.0),  # nothing is due yet
        (10.0, 0.0, 0.0, 50, 5.0),  # all the way behind
        (1.0, 0.36, 0.0, 25, 2 ** -(4 * (0.45 - 0.36) / 0.9)),  # a tenth of the way behind
        (1.0, 0.5, 0.06, 20, 2**0.2),  # on time, and the gap a fifth over its slack
        (1.0, 0.5, 3.0, 20, 2.0),
        (1.0, 0.0, 3.0, 50, 1.0),  # both
        (LEAST, 0.0, 0.0, 50, LEAST),
        (MOST, 0.5, 3.0, 20, MOST),
        (0.0, 0.5, 0.0, 20, LEAST),
        (1.0, 0.95, 3.0, 20, 1.0),  # gone: nothing moves, and lambda stays
    ],
)
def test_lambda(penalty, progress, gap, step, expected):
    controller = at(make(penalty, gone=0.9, by=0.5, gap=0.05), progress, gap, step)
    used = controller.penalty.item()
    terms = controller.decide()
    assert terms["lambda"].item() == used == pytest.approx(min(max(penalty, LEAST), MOST))
    assert controller.penalty.item() == pytest.approx(expected, rel=1e-5)
    assert (terms["gap"].item(), terms["progress"].item()) == pytest.approx((gap, progress), abs=1e-6)


def test_stop_and_go():
    controller = make(gone=0.9)
    found = [at(controller, q).decide()["stopped"].item() for q in (0.89, 0.9, 0.95, 0.86, 0.85, 0.88, 0.91)]
    assert found == [0, 1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "gone"), [({}, 1.2), ({"eta": 0.05}, 0.945), ({"eraser": "anchor-kd"}, 0.9), ({"eraser": "esd"}, 1.2)]
)
def test_where_the_concept_is_gone(settings, gone):
    assert Controller(Upper(**settings), 100, CPU).gone == pytest.approx(gone)
    given = Controller(Upper(**settings, controller=Settings(True, gone=0.5)), 100, CPU)
    assert given.gone == 0.5


def test_a_stopped_step_moves_no_bit():
    """Neither masters nor moments, though the gradient is there; and when it is not stopped, all of them."""
    controller = make(every=1)
    _, (_, upper) = walk(controller, steps=6)
    flat, rule = upper.optimizer.flat, upper.optimizer.rule
    for gone, moved in ((-1e9, False), (1e9, True)):
        controller.gone = gone
        controller.stopped.zero_()
        before = [x.clone() for x in (flat.master, rule.first, rule.second, rule.done)]
        terms = upper.gradient(upper.batches(9)).terms
        assert upper.optimizer.step() > 0
        assert terms["stopped"] == (not moved)
        after = (flat.master, rule.first, rule.second, rule.done)
        assert [torch.equal(x, y) for x, y in zip(before, after, strict=True)] == [not moved] * 4
    assert upper.optimizer.bad_in_a_row == 0


def test_lambda_weighs_the_penalty():
    """The same two gradients under the level's own optimizer: g + lambda |g| / |r| r."""
    controller = make(penalty=3.0, every=1)
    _, (_, upper) = walk(controller, steps=1)
    flat = upper.optimizer.flat

    def gradient(penalty: float):
        controller.penalty.fill_(penalty)
        upper.gradient(upper.batches(0))
        return flat.gradient.clone()

    g, one, four = (gradient(x) for x in (0.0, 1.0, 4.0))
    torch.testing.assert_close(four - g, 4 * (one - g), rtol=1e-4, atol=1e-5)
    assert (one - g).norm().item() == pytest.approx(g.norm().item(), rel=1e-4)


def test_of_several_concepts_the_least_counts():
    """Every third sample shows the second concept: sums by hand, also of rows in another order, as ESD's are."""
    upper = Upper(batch=4, every=1, controller=Settings(True, gone=0.9))
    controller = Controller(upper, 100, CPU, 2, lambda sample: int(sample % 3 == 2))
    c, a = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    way = torch.zeros(2, 2)
    for step, gone in enumerate(([0.2, 0.4, 0.6, 0.8], [1.0, 0.9, 0.8, 0.7], [0.5, 0.5, 0.5, 0.5])):
        assert controller.due(step) == step
        concepts = [[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1]][step]
        share, size, new = torch.tensor(gone), (a - c).square().sum((1, 2, 3)), torch.zeros(2, 2)
        for row, k in enumerate(concepts):
            new[k] += torch.tensor([share[row] * size[row], size[row]])
        way = 0.5 * way + 0.5 * new
        out = c + share[:, None, None, None] * (a - c)
        order = torch.tensor([2, 0, 3, 1]) if step == 1 else None
        rows = slice(None) if order is None else order
        controller.watch(out[rows], c[rows], a[rows], 1.0, order)
        assert controller.progress.item() == pytest.approx((way[:, 0] / way[:, 1]).min().item(), rel=1e-5)
    one_is_left = Controller(upper, 100, CPU, 2)
    one_is_left.way.copy_(torch.tensor([[2.0, 1.0], [0.5, 1.0]]))
    assert one_is_left.decide()["stopped"] == 0
    one_is_left.way[1, 0] = 0.9
    assert one_is_left.decide()["stopped"] == 1


def test_pace():
    controller = make(every=4, horizon=8, steps=100, by=0.5, gone=0.9)

    def numbers(steps, **state):
        at(controller, **state)
        return {step: n for step in steps if (n := controller.due(step)) is not None}

    assert numbers(range(8), progress=0.0) == {3: 0, 7: 1}
    assert numbers(range(8, 15), progress=0.5, step=10) == {11: 2}
    controller.penalty.fill_(5.0)
    assert numbers([15], progress=0.0, step=50) == {15: 3}
    assert controller.every == 4, "lambda first"
    controller.penalty.fill_(1.0)
    assert numbers(range(16, 24), progress=0.0, step=50) == {19: 4, 23: 5}
    assert controller.every == 2
    assert numbers(range(24, 40), progress=0.0, step=50) == {
        n: k for k, n in enumerate([25, 27, 29, *range(31, 40)], 6)
    }
    assert controller.every == 1
    assert numbers(range(40, 48), progress=0.5, gap=1.0, step=10) == {n: k for k, n in enumerate(range(40, 47), 18)}
    assert controller.every == 2
    controller.stopped.fill_(1.0)
    for step in range(48, 80):
        at(controller, 0.95)
        controller.due(step)
    assert controller.every == 4 * 4
    assert numbers(range(80, 96), progress=0.87)
    assert controller.every == 4, "stopped and on its way back: looked at again as often as set"


def test_a_controlled_run_is_recorded_and_is_resumed():
    """Replayed steps, and steps of a controller that took over in the middle, are the same steps to the bit."""
    settings = {"penalty": 10.0, "every": 1, "steps": 9, "by": 0.6, "gone": 0.7, "horizon": 4}
    whole, (_, upper) = walk(make(**settings), steps=9)
    recorded = []
    replayed, (_, again) = walk(
        make(**settings), steps=9, graphs=Graphs(lambda call: (recorded.append(call), on_the_cpu(call))[1])
    )
    assert len(recorded) == 2
    assert replayed == whole
    assert torch.equal(again.optimizer.flat.master, upper.optimizer.flat.master)

    first = make(**settings)
    begun, both = walk(first, steps=5)
    state = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in first.state_dict().items()}
    second = make(**settings)
    own = make_levels(*make_models(), penalty=second.penalty)
    for old, new in zip(both, own, strict=True):
        new.optimizer.flat.load_state_dict(old.optimizer.flat.state_dict())
        new.optimizer.load_state_dict(old.optimizer.state_dict())
    taken = second.take(*own)
    second.load_state_dict(state)
    ended, _ = walk(second, start=5, steps=9, both=taken)
    assert begun + ended == whole
    seen = [terms for terms in whole if "upper/lambda" in terms]
    assert {terms["upper/stopped"] for terms in seen} == {0.0, 1.0}
    assert any(b["upper/lambda"] < a["upper/lambda"] for a, b in pairwise(seen))
    assert seen[0]["upper/lambda"] == 10.0


class After:
    """Asks for the end of a training once a step is saved."""

    def __init__(self, checkpoints, step):
        self.saved = checkpoints / f"step-{step or 0:06d}"

    @property
    def requested(self):
        return self.saved.exists()


def test_a_training_is_the_same_when_it_is_stopped_in_between(small_teacher, tmp_path):
    """Through `fit` and its checkpoints, on the mini world: weights and statistics, with K changed before the stop."""
    flags = ["--upper.controller.enabled", "--upper.controller.horizon", "2", "--upper.controller.by", "0.1"]
    small = ["--preset", "smoke", "--lower.batch", "2", "--upper.batch", "2", "--upper.every", "2", "--mini.bank", "2"]
    config = parse([*small, *flags, "--checkpoint-every", "1", "--log-every", "1"])
    folder = load_folder(small_teacher)
    start = initial_student(config, folder, 1)
    materials = gather(config, folder, folder.unet(), WORLD.erased_concepts(config.erase), tmp_path)

    def train(name, until=None):
        student, out = copy.deepcopy(start), tmp_path / name
        out.mkdir(exist_ok=True)
        places = Places(out / "checkpoints", out / "stats.jsonl", out / "events")
        progress = fit(config, student, materials, places, After(places.checkpoints, until), CPU)
        return progress.upper_steps, student.state_dict(), places

    count, whole, places = train("whole")
    rows = [json.loads(line) for line in places.stats.read_text().splitlines()]
    assert [row["upper/every"] for row in rows] == [2, 2, 2, 1, 1, 1, 1, 1]
    assert [row["step"] for row in rows if "upper/lambda" in row] == [2, 4, 5, 6, 7, 8]
    assert count == 6
    upper = [{name.removeprefix("upper/"): x for name, x in row.items()} for row in rows if "upper/lambda" in row]
    for row in upper:
        assert row["loss"] == pytest.approx(row["suppression"] + row["lambda"] * row["penalty"], rel=1e-5)
    assert upper[0]["lambda"] > upper[-1]["lambda"]
    with pytest.raises(Interrupted):
        train("parts", until=3)  # asked for while step 4 runs
    saved = checkpoint.latest(tmp_path / "parts" / "checkpoints")
    assert (saved.step, saved.state["upper_steps"], saved.optimizers["pace"]["every"]) == (4, 2, 1)
    count, resumed, places = train("parts")  # goes on from there
    assert count == 6
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    again = [json.loads(line) for line in places.stats.read_text().splitlines()]
    timed = ("seconds", "images_per_second")
    assert [{k: v for k, v in row.items() if k not in timed} for row in again] == [
        {k: v for k, v in row.items() if k not in timed} for row in rows
    ]


def test_the_engine_says_which_row_shows_which_concept(small_teacher, tmp_path):
    """Two styles, one in three quarters of the samples: as the captions of the upper batches have it."""
    flags = ["--preset", "smoke", "--upper.controller.enabled", "--erase", "waves", "pointillism", "--mini.bank", "2"]
    config = parse([*flags, "--concept-weights", "1", "3", "--mini.images", "4"])
    folder = load_folder(small_teacher)
    materials = gather(config, folder, folder.unet(), [], tmp_path)
    both = levels(config, initial_student(config, folder, 1), materials, CPU)
    _, upper = both
    with running(both, CPU):
        for number in range(3):
            assert upper.pace.due(4 * number + 3) == number
            captions = upper.batches(number).captions
            assert upper.pace.concepts.tolist() == [int("pointillism" in caption) for caption in captions]
            assert upper.pace.concepts.sum() == 3
    assert upper.pace.way.shape == (2, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--upper.eraser", "forget-me-not"], "eraser 'forget-me-not', whose progress it cannot measure or steer; use"),
        (["--upper.eraser", "erasediff"], "eraser 'erasediff', whose progress it cannot measure or steer"),
        (["--upper.penalty-norm", "raw"], "given with --upper.penalty-norm raw; its lambda is one of `grad`"),
        (["--upper.every", "0"], "given with --upper.every 0, which runs no upper steps"),
        (["--upper.controller.gone", "0"], "--upper.controller.gone is 0.0: wanted > 0"),
        (["--upper.controller.gone", "2"], "gone is 2.0, but the target of eraser 'guidance' lies at 2: the concept"),
        (["--upper.eraser", "anchor-kd", "--upper.controller.gone", "1"], "the target of eraser 'anchor-kd' lies at 1"),
        (["--upper.controller.by", "0"], "--upper.controller.by is 0.0: wanted > 0 and <= 1"),
        (["--upper.controller.horizon", "0"], "--upper.controller.horizon is 0: wanted >= 1"),
    ],
)  # fmt: skip
def test_refused(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(["--upper.controller.enabled", *flags])


def test_off_by_default():
    for preset in ("mini", "smoke"):
        assert not parse(["--preset", preset]).upper.controller.enabled
    assert parse(["--upper.controller.enabled"]).upper.controller == Settings(True, horizon=10)
    _, upper = make_levels(*make_models())
    assert (upper.pace, upper.optimizer.held, upper.eraser.watch) == (None, None, None)
