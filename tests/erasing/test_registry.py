"""The upper step around an eraser: names and settings, what moves and what must not, two gradients in one, graphs."""

import logging
import subprocess
import sys
from functools import partial

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.erase import EDITS
from bilevel_fast.erasing import registry as erasers
from bilevel_fast.erasing.references import Itself
from bilevel_fast.erasing.saliency import EraseDiff, SalUn, salient
from bilevel_fast.erasing.settings import Ablation, Erasediff, EsdSettings, Salun, Upper
from bilevel_fast.erasing.subsets import subset
from bilevel_fast.erasing.targets import ConceptAblation, Guidance
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.train import parse
from bilevel_fast.training.graphs import Graphs
from bilevel_fast.training.levels import bilevel
from bilevel_fast.training.lower import Answers
from bilevel_fast.training.parameters import FlatParameters, dot
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.training.upper import project
from replay import on_the_cpu
from world import ETA, SEED, Descent, make_batch, make_levels, make_models


@pytest.fixture(autouse=True)
def _torch_ops(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")  # native code reads its numbers on the CPU, as no graph can


def make(upper, dtype=torch.float32):
    """An eraser as the engine makes it, and its scene."""
    teacher, student = make_models()
    start, answers = erasers.start(upper, student, dtype), Answers(Teacher(teacher), Schedule.sd(), SEED)
    flat = FlatParameters(student, dtype)
    look = partial(salient, student, answers, flat, lambda step: make_batch(1, step))
    null = torch.zeros(1, 5, 16)
    scene = erasers.EraserParts(answers.teacher, start, flat, null, lambda: None, look, lambda *_: flat.master)
    return erasers.ERASERS[upper.eraser].make(upper, scene), scene


def test_names():
    assert (make(Upper())[0].eta, make(Upper(eta=0.3))[0].eta) == (1.0, 0.3)
    assert make(Upper(eraser="anchor-kd"))[0].eta == 0.0
    ablation, scene = make(Upper(eraser="concept-ablation", ablation=Ablation(0.5)))
    assert (ablation.keep, ablation.source) == (0.5, scene.start)
    esd, scene = make(Upper(eraser="esd", eta=0.5, source="teacher", esd=EsdSettings(2.0, 10, True)))
    assert (esd.eta, esd.guidance, esd.steps, esd.compat) == (0.5, 2.0, 10, True)
    assert esd.source is scene.teacher
    assert scene.start is None, "no copy that nobody asks"
    itself, scene = make(Upper(eraser="esd", source="self"))
    assert itself.source.unet is scene.student
    salun, scene = make(Upper(eraser="salun", salun=Salun(share=0.2, batches=1)))
    assert salun.source.unet is scene.student
    assert (~salun.still).float().mean() < 0.21
    erasediff, scene = make(Upper(eraser="erasediff", erasediff=Erasediff(0.3)))
    assert (erasediff.barrier, erasediff.source.unet) == (0.3, scene.student)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_salun_moves_only_what_is_salient(penalty):
    lower, upper = make_levels(*make_models(), penalty=penalty)
    student, flat = lower.gradient.student, upper.optimizer.flat
    mask = salient(student, lower.gradient.answers, flat, upper.batches, 1, 0.3)
    upper.gradient.eraser, upper.optimizer.warmup = SalUn(Itself(student), flat, mask), 0
    lower.gradient(lower.batches(0))
    before = flat.master.clone()
    for step in range(2):
        upper.gradient(upper.batches(step))
        upper.optimizer.step()
    moved = flat.master != before
    assert not (moved & ~mask).any()
    assert (moved & mask).sum() > 0.9 * mask.sum()


def test_a_saved_mask_takes_the_place_of_another():
    """By the names of the parameters, without padding: it goes back to where widths are padded otherwise."""
    teacher, plain = make_models()
    erasers_ = []
    for align, step in ((1, 0), (8, 1)):
        student = teacher.cut(plain.structure, align)
        flat, answers = FlatParameters(student), Answers(Teacher(teacher), Schedule.sd(), SEED)
        mask = salient(student, answers, flat, lambda _, step=step: make_batch(1, step), 1, 0.3)
        erasers_.append(SalUn(Itself(student), flat, mask))
    first, second = erasers_
    address, state = second.still.data_ptr(), first.state_dict()
    found = second.state_dict()["still"]
    assert any(not torch.equal(found[name], value) for name, value in state["still"].items())
    second.load_state_dict(state)
    found = second.state_dict()["still"]
    assert all(torch.equal(found[name], value) for name, value in state["still"].items())
    assert second.still.data_ptr() == address


@pytest.mark.parametrize(("barrier", "along"), [(0.5, -0.2), (0.5, 0.2), (0.5, 0.9), (0.0, 0.3)])
def test_erasediff_takes_the_nearest_direction_that_erases(barrier, along):
    """d = r + lambda g meets <g, d> >= barrier |g|^2, and no direction nearer to r does."""
    generator = torch.Generator().manual_seed(0)
    flat = FlatParameters(make_models()[1])
    g, r = torch.randn(2, len(flat.gradient), generator=generator)
    r = r - (r @ g) / (g @ g) * g + along * g
    flat.gradient.copy_(r)
    EraseDiff(Teacher(make_models()[0]), barrier).rule(g.clone(), flat)
    d, g, r = flat.gradient.double(), g.double(), r.double()
    wanted = max(barrier, along)  # of <g, d> / |g|^2: the constraint holds with equality, or was met by r itself
    torch.testing.assert_close((g @ d / (g @ g)).item(), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(d, r + (wanted - along) * g, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["salun", "erasediff", "concept-ablation"])
def test_erasers_that_are_recorded(name):
    """Replayed steps are the same steps: nothing is read back, no mask or copy moves. One with subset and surgery."""

    def walk(graphs=None):
        lower, upper = make_levels(*make_models(), surgery=name == "concept-ablation")
        student, flat, answers = lower.gradient.student, upper.optimizer.flat, lower.gradient.answers
        made = {
            "salun": lambda: SalUn(Itself(student), flat, salient(student, answers, flat, upper.batches, 1, 0.5)),
            "erasediff": lambda: EraseDiff(Itself(student), 0.5),
            "concept-ablation": lambda: ConceptAblation(Teacher(make_models()[1]), 1.0),
        }
        upper.gradient.eraser = made[name]()
        if name == "concept-ablation":
            upper.gradient._hold = erasers.holder(flat, "esd-u")
        for _ in bilevel(lower, upper, 1, 0, 4, *([] if graphs is None else [graphs])):
            pass
        return flat.master

    recorded = []
    replayed = walk(Graphs(lambda call: (recorded.append(call), on_the_cpu(call))[1]))
    assert len(recorded) == 2
    assert torch.equal(replayed, walk())


def run(steps, every=2, walk=None, **settings):
    lower, upper = make_levels(*make_models(), **settings)
    start = {name: p.detach().clone() for name, p in lower.gradient.student.named_parameters()}
    terms = [
        {name: value.item() for name, value in step.items()}
        for step in bilevel(lower, upper, every, 0, steps, *([] if walk is None else [walk]))
    ]
    return terms, start, lower.gradient.student


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_an_upper_step_moves_nothing_outside_its_subset(penalty):
    """AdamW: after several upper steps, with the lower level at rest, other parameters have kept every bit."""
    lower, upper = make_levels(*make_models(), penalty=penalty)
    student = lower.gradient.student
    upper.gradient._hold = erasers.holder(upper.optimizer.flat, "esd-x")
    upper.optimizer.warmup = 0
    lower.gradient(lower.batches(0))
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    for step in range(3):
        upper.gradient(upper.batches(step))
        upper.optimizer.step()
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, start[name])}
    assert moved == set(subset(student, "esd-x"))
    assert moved


def test_the_norm_of_the_penalty_is_that_of_the_subset():
    """What is held counts in neither norm: the penalty's share is as long as the suppression's."""
    lower, upper = make_levels(*make_models(), penalty=1.0)
    flat = upper.optimizer.flat
    lower.gradient(lower.batches(0))

    def only(loss):
        loss.backward()
        flat.collect()
        return torch.cat([v.flatten() for n, v in flat.views(flat.gradient).items() if ".attn1." in n]).clone()

    s = only(upper.gradient.eraser.loss(lower.gradient.student, lower.gradient.answers, upper.batches(0)).total)
    r = only(lower.gradient.loss(*lower.gradient.answers.last).total)
    upper.gradient._hold = erasers.holder(flat, "*.attn1.*")
    upper.gradient(upper.batches(0))
    whole = torch.cat([v.flatten() for n, v in flat.views(flat.gradient).items() if ".attn1." in n])
    torch.testing.assert_close(whole, s + r * (s.norm() / r.norm()), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(flat.gradient.norm(), whole.norm())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_projection(sign):
    """PCGrad: only where the two conflict, and then nothing is left along the other."""
    generator = torch.Generator().manual_seed(0)
    g, r = torch.randn(2, 2**17, generator=generator, dtype=torch.float64)
    g = g + sign * 0.5 * r
    mine, other = g.float(), r.float()
    project(mine, other, dot)
    expected = g - min(0.0, (g @ r).item()) / (r @ r).item() * r
    torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine, g.float()) == (sign > 0)
    nothing = torch.zeros_like(other)
    project(mine, nothing, dot)
    assert mine.isfinite().all()


def test_inner_product_of_bf16():
    a, b = torch.randn(2, 2**17, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.testing.assert_close(dot(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("penalty", "norm"), [(0.0, "grad"), (0.5, "grad"), (2.0, "raw")])
def test_surgery_in_the_upper_step(penalty, norm):
    """g - min(0, <g, r>) / |r|^2 r, then the penalty as ever, against both gradients by themselves."""
    lower, upper = make_levels(*make_models(), penalty=penalty, norm=norm, surgery=True)
    flat = upper.optimizer.flat
    lower.gradient(lower.batches(0))

    class Opposed(Guidance):
        """Suppression that runs against what the lower level has learnt: the conflict that surgery is for."""

        def loss(self, student, answers, batch):
            loss = lower.gradient.loss(*answers.last)
            other = super().loss(student, answers, batch)
            return type(loss)(other.total - 0.5 * loss.total, other.terms)

    eraser = upper.gradient.eraser = Opposed(ETA)
    eraser.loss(lower.gradient.student, lower.gradient.answers, upper.batches(0)).total.backward()
    flat.collect()
    g = flat.gradient.double().clone()
    lower.gradient.loss(*lower.gradient.answers.last).total.backward()
    flat.collect()
    r = flat.gradient.double().clone()
    assert g @ r < 0, "there must be a conflict to solve"
    g = g - (g @ r) / (r @ r) * r
    expected = g + penalty * (g.norm() / r.norm() if norm == "grad" else 1) * r
    upper.gradient(upper.batches(0))
    torch.testing.assert_close(flat.gradient.double(), expected, rtol=1e-3, atol=1e-6)


class Unrecorded(Guidance):
    eager = "it looks at the weather"


def test_what_cannot_be_recorded_runs_eagerly_beside_a_recorded_lower_level(caplog):
    expected = run(6, eraser=Guidance(ETA), make=Descent)
    recorded = []

    def counting(call):
        recorded.append(call)
        return on_the_cpu(call)

    with caplog.at_level(logging.INFO):
        replayed = run(6, walk=Graphs(counting), eraser=Unrecorded(ETA), make=Descent)
    assert replayed[0] == expected[0]
    assert len(recorded) == 1
    assert caplog.messages == ["no CUDA graph of the upper step, it runs without: it looks at the weather"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--upper.every", "-1"], "--upper.every is -1: wanted >= 0"),
        (["--upper.batch", "0"], "--upper.batch is 0: wanted >= 1"),
        (["--upper.lr", "0"], "--upper.lr is 0.0: wanted > 0"),
        (["--upper.penalty", "-1"], "--upper.penalty is -1.0: wanted >= 0"),
        (["--upper.warmup", "-1"], "--upper.warmup is -1: wanted >= 0"),
        (["--upper.eta", "nan"], "--upper.eta is nan: wanted finite"),
        (["--lower.warmup", "-1"], "--lower.warmup is -1: wanted >= 0"),
        (["--lower.snr-gamma", "0"], "--lower.snr-gamma is 0.0: wanted > 0"),
        (["--max-bad-steps", "0"], "--max-bad-steps is 0: wanted >= 1"),
        (["--mini.judge-kept", "0"], "--mini.judge-kept is 0: wanted >= 1"),
        (["--upper.salun.batches", "0"], "--upper.salun.batches is 0: wanted >= 1"),
        (["--upper.erasediff.barrier", "-1"], "--upper.erasediff.barrier is -1.0: wanted >= 0"),
        (["--upper.eraser", "salun", "--upper.salun.share", "0"], "--upper.salun.share is 0.0: wanted > 0 and <= 1"),
        (["--upper.eraser", "erasediff", "--upper.surgery"], "--upper.surgery given with eraser 'erasediff'"),
        (["--upper.eraser", "guidence"], "--upper.eraser 'guidence' does not exist; did you mean 'guidance'"),
        (["--upper.eraser", "anchor-kd", "--upper.eta", "2"], "--upper.eta is 2.0, but eraser 'anchor-kd' does not"),
        (
            ["--upper.source", "self"],
            "--upper.source is self, but eraser 'guidance' does not read it; those that do: co",
        ),
        (
            ["--upper.esd.steps", "20"],
            "--upper.esd.steps is 20, but eraser 'guidance' does not read it; those that do: e",
        ),
        (
            ["--upper.eraser", "separable", "--upper.anchor", "null"],
            "--upper.anchor is null, but eraser 'separable' does not read it; those that do: guidance, ",
        ),
        (["--upper.eraser", "esd", "--upper.esd.steps", "2"], "--upper.esd.steps is 2: wanted >= 3"),
        (
            ["--upper.eraser", "concept-ablation", "--upper.ablation.keep", "-1"],
            "--upper.ablation.keep is -1.0: wanted >= 0",
        ),
    ],
)
def test_refused(flags, message):
    with pytest.raises(UserError) as refused:
        parse(flags)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("upper", "held"),
    [
        (Upper(), {"upper", "second"}),
        (Upper(penalty=0.0), {"upper"}),
        (Upper(penalty_norm="raw"), {"upper"}),
        (Upper(penalty_norm="raw", surgery=True), {"upper", "second"}),
        (Upper(eraser="erasediff", penalty=0.0), {"upper", "second"}),
        (Upper(eraser="salun"), {"upper", "second", "mask"}),
        (Upper(eraser="esd"), {"upper", "second", "start", "eager"}),
        (Upper(eraser="esd", source="teacher"), {"upper", "second", "eager"}),
        (Upper(eraser="uce"), set()),
        (Upper(every=0, eraser="esd"), set()),
    ],
)
def test_what_an_eraser_holds_in_memory(upper, held):
    assert {name for name, held in erasers.holds(upper, graphs=True).items() if held} == held
    assert not erasers.holds(upper, graphs=False)["eager"]


@pytest.mark.parametrize("name", [n for n, k in erasers.ERASERS.items() if isinstance(k, erasers.GradientKind)])
def test_who_is_eager_says_why(name):
    assert bool(make(Upper(eraser=name))[0].eager) == erasers.ERASERS[name].eager


def test_a_command_for_every_edit():
    assert EDITS.keys() == {name for name, kind in erasers.ERASERS.items() if isinstance(kind, erasers.EditKind)}


def test_settings_are_read_without_torch():
    """So that `--help` does not wait for it."""
    code = "import bilevel_fast.runs.config, sys; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_a_subset_that_holds_nothing():
    flat = FlatParameters(make_models()[1])
    with pytest.raises(UserError, match="parameter subset 'esd-y' holds nothing of this UNet; did you mean 'esd-x'"):
        erasers.holder(flat, "esd-y")
