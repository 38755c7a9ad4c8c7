"""Erasers of the upper level: each loss against a plain transcription, what moves and what must not, resumed runs."""

import logging

import pytest
import torch
import torch.nn.functional as F

from bilevel_fast.bilevel import bilevel, project
from bilevel_fast.config import Upper
from bilevel_fast.diffusion import Schedule, noise
from bilevel_fast.erasing import upper as erasers
from bilevel_fast.erasing.subsets import subset
from bilevel_fast.erasing.targets import Guidance
from bilevel_fast.errors import UserError
from bilevel_fast.graphs import Graphs
from bilevel_fast.parameters import FlatParameters, dot
from bilevel_fast.train import parse
from replay import on_the_cpu
from world import ETA, SEED, B, Descent, make_batch, make_levels, make_models


@pytest.fixture(autouse=True)
def _torch_ops(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")  # native code reads its numbers on the CPU, as no graph can


def upper_loss(eraser, batch=None, **settings):
    """The loss of an eraser on a concept batch, after one lower step, and the world it was made in."""
    lower, upper = make_levels(*make_models(), penalty=0.0, eraser=eraser, **settings)
    lower.gradient(lower.batches(0))
    upper.optimizer.zero_grad()
    return upper.gradient(upper.batches(0) if batch is None else batch), lower, upper


def noised(batch):
    return noise(Schedule.sd(), batch.latents, batch.eps, batch.t)


def gradients(loss, student):
    return torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)


def same_gradient(upper, expected, **tolerance):
    """The flat gradient of an upper step, and one gradient per parameter."""
    views = upper.optimizer.flat.views(upper.optimizer.flat.gradient)
    assert any(view.any() for view in views.values())
    for (name, view), wanted in zip(views.items(), expected, strict=True):
        torch.testing.assert_close(view, torch.zeros_like(view) if wanted is None else wanted, msg=name, **tolerance)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_guidance_and_anchor_kd(eta):
    teacher, student = make_models()
    batch = make_batch(1, 0).drawn(SEED, 1000)
    x, t = noised(batch).x, batch.t
    c, a = (teacher(x, t, text).out for text in (batch.text, batch.anchor))
    expected = F.mse_loss(student(x, t, batch.text).out, (a - eta * (c - a)).detach())
    loss, lower, upper = upper_loss(Guidance(eta))
    torch.testing.assert_close(loss.total, expected.detach())
    same_gradient(upper, gradients(expected, student), rtol=1e-4, atol=1e-6)
    # a lower step asked for B images, an upper one for the anchor, and for the concept where it is steered from it
    assert lower.gradient.answers.teacher.images == B + (2 * B if eta else B)


def test_names():
    assert (erasers.make(Upper()).eta, erasers.make(Upper(eta=0.3)).eta) == (1.0, 0.3)
    assert erasers.make(Upper(eraser="anchor-kd")).eta == 0.0


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
        upper.optimizer.zero_grad()
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
        flat.zero_grad()
        loss.backward()
        return torch.cat([v.flatten() for n, v in flat.views(flat.gradient).items() if ".attn1." in n]).clone()

    s = only(upper.gradient.eraser.loss(lower.gradient.student, lower.gradient.answers, upper.batches(0)).total)
    r = only(lower.gradient.loss(lower.gradient.answers.last).total)
    upper.gradient._hold = erasers.holder(flat, "*.attn1.*")
    upper.optimizer.zero_grad()
    upper.gradient(upper.batches(0))
    whole = torch.cat([v.flatten() for n, v in flat.views(flat.gradient).items() if ".attn1." in n])
    torch.testing.assert_close(whole, s + r * (s.norm() / r.norm()), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(flat.gradient.norm(), whole.norm())


def test_a_subset_is_recorded_as_well():
    def subset_run(walk=None):
        lower, upper = make_levels(*make_models(), surgery=True)
        upper.gradient._hold = erasers.holder(upper.optimizer.flat, "esd-u")
        for _ in bilevel(lower, upper, 1, 0, 6, *([] if walk is None else [walk])):
            pass
        return lower.optimizer.flat.master

    assert torch.equal(subset_run(Graphs(on_the_cpu)), subset_run())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_projection(sign):
    """PCGrad: only where the two conflict, and then nothing is left along the other."""
    generator = torch.Generator().manual_seed(0)
    g, r = torch.randn(2, 2**17, generator=generator, dtype=torch.float64)
    g = g + sign * 0.5 * r
    mine, other = g.float(), r.float()
    project(mine, other)
    expected = g - min(0.0, (g @ r).item()) / (r @ r).item() * r
    torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine, g.float()) == (sign > 0)
    nothing = torch.zeros_like(other)
    project(mine, nothing)
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
            loss = lower.gradient.loss(answers.last)
            other = super().loss(student, answers, batch)
            return type(loss)(other.total - 0.5 * loss.total, other.terms)

    eraser = upper.gradient.eraser = Opposed(ETA)
    flat.zero_grad()
    eraser.loss(lower.gradient.student, lower.gradient.answers, upper.batches(0)).total.backward()
    g = flat.gradient.double().clone()
    flat.zero_grad()
    lower.gradient.loss(lower.gradient.answers.last).total.backward()
    r = flat.gradient.double().clone()
    assert g @ r < 0, "there must be a conflict to solve"
    g = g - (g @ r) / (r @ r) * r
    expected = g + penalty * (g.norm() / r.norm() if norm == "grad" else 1) * r
    upper.optimizer.zero_grad()
    upper.gradient(upper.batches(0))
    torch.testing.assert_close(flat.gradient.double(), expected, rtol=1e-3, atol=1e-6)


class Unrecorded(Guidance):
    eager = "it looks at the weather"


def test_what_cannot_be_recorded_runs_eagerly_beside_a_recorded_lower_level(caplog):
    expected = run(12, eraser=Guidance(ETA), make=Descent)
    recorded = []

    def counting(call):
        recorded.append(call)
        return on_the_cpu(call)

    with caplog.at_level(logging.INFO):
        replayed = run(12, walk=Graphs(counting), eraser=Unrecorded(ETA), make=Descent)
    assert replayed[0] == expected[0]
    assert len(recorded) == 1
    assert caplog.messages == ["no CUDA graph of the upper step, it runs without: it looks at the weather"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--upper.eraser", "guidence"], "--upper.eraser 'guidence' does not exist; did you mean 'guidance'?"),
        (["--upper.eraser", "anchor-kd", "--upper.eta", "2"], "--upper.eta is 2.0, but eraser 'anchor-kd' does not"),
    ],
)
def test_refused(flags, message):
    with pytest.raises(UserError) as refused:
        parse(flags)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_subset_that_holds_nothing():
    flat = FlatParameters(make_models()[1])
    with pytest.raises(UserError, match="parameter subset 'esd-y' holds nothing of this UNet; did you mean 'esd-x'"):
        erasers.holder(flat, "esd-y")
