"""Erasers of the upper level: each loss against a plain transcription, what moves and what must not, resumed runs."""

import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bilevel_fast.bilevel import Answers, bilevel, project
from bilevel_fast.config import Ablation, Erasediff, Salun, Upper
from bilevel_fast.config import Esd as EsdSettings
from bilevel_fast.data.batches import Batch
from bilevel_fast.data.sources import MemorySource
from bilevel_fast.diffusion import Schedule, noise
from bilevel_fast.erasing import upper as erasers
from bilevel_fast.erasing.attention import ForgetMeNot, Words
from bilevel_fast.erasing.esd import Esd
from bilevel_fast.erasing.saliency import EraseDiff, Relabel, SalUn, salient
from bilevel_fast.erasing.sources import Itself, Start
from bilevel_fast.erasing.subsets import subset
from bilevel_fast.erasing.targets import ConceptAblation, Guidance
from bilevel_fast.errors import UserError
from bilevel_fast.graphs import Graphs
from bilevel_fast.mini.text import MiniTextEncoder, WordTokenizer
from bilevel_fast.parameters import FlatParameters, dot
from bilevel_fast.randomness import Stream, integers
from bilevel_fast.teacher import Teacher
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


CAPTIONS = {
    "a red star in the style of mosaic": "a red star",
    "in the style of line art a blue ring": "a blue ring",
    "a green mosaic cross": "a green cross",
    "a green plain cross": "a green red circle cross",
}


def bank():
    captions = list(CAPTIONS)
    return MemorySource(torch.zeros(len(captions), 1, 8, 8, 8), [[c] for c in captions], list(CAPTIONS.values()))


def test_the_words_of_a_concept():
    """Token 0 begins a prompt. At the end, at the beginning, within; one word for two others."""
    encoder, nothing = MiniTextEncoder(WordTokenizer()), torch.zeros(1, 1, 8, 8, 8)
    found = [row.nonzero()[:, 0].tolist() for row in Words(encoder, bank())(list(CAPTIONS))]
    assert found == [[4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6], [3], [3]]
    with pytest.raises(UserError, match="caption 'a red star' has no word that its anchor 'a red star' lacks"):
        Words(encoder, MemorySource(nothing, [["a red star"]], ["a red star"]))
    with pytest.raises(UserError, match="wants a bank of concepts"):
        Words(encoder, MemorySource(nothing, [["a red star"]]))


@pytest.mark.parametrize("recompute", [False, True])
def test_forget_me_not(recompute):
    """The norm of all attention to the concept's tokens, by attention that keeps its probabilities."""
    teacher, student = make_models()
    batch = make_batch(1, 0).drawn(SEED, 1000)
    concept = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    kept = []

    def attention(module, q, k, v):
        q, k, v = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (q, k, v))
        probabilities = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5, -1)
        if k.shape[2] == 5:
            kept.append(torch.cat([probabilities[row][:, :, concept[row]].flatten() for row in range(B)]))
        return (probabilities @ v).transpose(1, 2).flatten(2)

    plain = make_models()[1]
    for name, module in plain.named_modules():
        if name.endswith(("attn1", "attn2")):
            module.forward = lambda x, c, m=module: m.to_out[0](attention(m, m.to_q(x), m.to_k(c), m.to_v(c)))
    plain(noised(batch).x, batch.t, batch.text)
    expected = torch.cat(kept).norm()
    student.recompute = recompute
    eraser = ForgetMeNot(lambda captions: concept)
    loss = eraser.loss(student, Answers(Teacher(teacher), Schedule.sd(), SEED), batch)
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=0)
    assert len(kept) == sum(name.endswith(".attn2") for name, _ in student.named_modules()) > 3
    for a, b in zip(gradients(loss.total, student), gradients(expected, plain), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    assert student.recompute == recompute
    assert not any(module._forward_pre_hooks for module in student.modules()), "hooks must not stay"


def make(upper, dtype=torch.float32):
    """An eraser as the engine makes it, and its scene."""
    teacher, student = make_models()
    start, answers = erasers.start(upper, student, dtype), Answers(Teacher(teacher), Schedule.sd(), SEED)
    flat = FlatParameters(student, dtype)
    words = partial(Words, MiniTextEncoder(WordTokenizer()), bank())
    look = partial(salient, student, answers, flat, lambda step: make_batch(1, step))
    scene = erasers.Scene(answers.teacher, start, flat, torch.zeros(1, 5, 16), words, look)
    return erasers.make(upper, scene), scene


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


@pytest.mark.parametrize("source", ["self", "teacher"])
def test_relabelling(source):
    """The loss of SalUn and EraseDiff: the anchor's answer, without gradient, for the concept."""
    teacher, student = make_models()
    batch = make_batch(1, 0).drawn(SEED, 1000)
    x, t = noised(batch).x, batch.t
    target = {"self": student, "teacher": teacher}[source](x, t, batch.anchor).out.detach()
    expected = F.mse_loss(student(x, t, batch.text).out, target)
    eraser = Relabel({"self": Itself(student), "teacher": Teacher(teacher)}[source])
    loss = eraser.loss(student, Answers(Teacher(teacher), Schedule.sd(), SEED), batch)
    torch.testing.assert_close(loss.total, expected)
    for a, b in zip(gradients(loss.total, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(a, b)


def salient_by_name(student, count, share):
    """SalUn's mask from its formula, parameter by parameter."""
    total = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    for step in range(count):
        batch = make_batch(1, step).drawn(SEED, 1000)
        abar = Schedule.sd().alphas_cumprod[batch.t][:, None, None, None]
        v = abar.sqrt() * batch.eps - (1 - abar).sqrt() * batch.latents
        out = student(noised(batch).x, batch.t, batch.text).out
        for sums, gradient in zip(total.values(), gradients((out - v).square().mean(), student), strict=True):
            sums += gradient
    values = torch.cat([sums.abs().flatten() for sums in total.values()])
    gamma = values.sort(descending=True).values[round(share * len(values)) - 1]
    return {name: sums.abs() >= gamma for name, sums in total.items()}


@pytest.mark.parametrize("align", [1, 8])
def test_saliency_mask(align):
    """The largest gradients over two batches; neither padding nor what lies between parameters counts."""
    teacher, plain = make_models()
    student = teacher.cut(plain.structure, align)
    flat, answers = FlatParameters(student), Answers(Teacher(teacher), Schedule.sd(), SEED)
    mask = salient(student, answers, flat, lambda step: make_batch(1, step), 2, 0.3)
    assert not flat.gradient.any()
    expected = salient_by_name(plain, 2, 0.3)
    found = flat.state_dict(mask.float())
    differ = sum((found[name].bool() != wanted).sum().item() for name, wanted in expected.items())
    assert differ <= 2e-4 * sum(p.numel() for p in plain.parameters()), "gradients that tie in their last bits may swap"
    assert mask.sum() == round(0.3 * sum(p.numel() for p in plain.parameters()))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_salun_moves_only_what_is_salient(penalty):
    lower, upper = make_levels(*make_models(), penalty=penalty)
    student, flat = lower.gradient.student, upper.optimizer.flat
    mask = salient(student, lower.gradient.answers, flat, upper.batches, 1, 0.3)
    upper.gradient.eraser, upper.optimizer.warmup = SalUn(Itself(student), flat, mask), 0
    lower.gradient(lower.batches(0))
    before = flat.master.clone()
    for step in range(2):
        upper.optimizer.zero_grad()
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


@pytest.mark.parametrize("source", ["start", "teacher", "self"])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_concept_ablation(source, keep):
    teacher, student = make_models()
    _, moved = make_models()
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1.05)
    frozen = {"start": Start(student, torch.float32), "teacher": Teacher(teacher), "self": Itself(moved)}[source]
    answers = Answers(Teacher(teacher), Schedule.sd(), SEED)
    batch = make_batch(1, 0).drawn(SEED, 1000)
    loss = ConceptAblation(frozen, keep).loss(moved, answers, batch)
    x, t, abar = noised(batch).x, batch.t, Schedule.sd().alphas_cumprod[batch.t][:, None, None, None]
    target = {"start": student, "teacher": teacher, "self": moved}[source](x, t, batch.anchor).out.detach()
    expected = F.mse_loss(moved(x, t, batch.text).out, target)
    torch.testing.assert_close(loss.terms["suppression"], expected.detach(), rtol=1e-4, atol=0)
    if keep:
        v = abar.sqrt() * batch.eps - (1 - abar).sqrt() * batch.latents
        anchor = F.mse_loss(moved(x, t, batch.anchor).out, v)
        torch.testing.assert_close(loss.terms["anchor"], anchor.detach(), rtol=1e-4, atol=0)
        expected = expected + keep * anchor
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=0)
    mine, theirs = gradients(loss.total, moved), gradients(expected, moved)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in (*teacher.parameters(), *frozen.unet.parameters()))


def test_the_frozen_copy_stays_where_it_was():
    """The student moves, its parameters lie in flat buffers; the copy has its own, in what it computes with."""
    student = make_models()[1]
    start = Start(student, torch.bfloat16)
    lower, upper = make_levels(make_models()[0], student, eraser=ConceptAblation(start, 1.0))
    for _ in bilevel(lower, upper, 1, 0, 4):
        pass
    for (name, p), before in zip(start.unet.named_parameters(), make_models()[1].parameters(), strict=True):
        assert torch.equal(p, before.bfloat16()), name
        assert p.untyped_storage().data_ptr() != student.get_parameter(name).untyped_storage().data_ptr()


def test_the_student_itself_is_asked_as_it_is_now():
    student = make_models()[1]
    lower, upper = make_levels(make_models()[0], student, penalty=0.0, eraser=ConceptAblation(Itself(student), 0.0))
    assert all(p.requires_grad for p in student.parameters())
    batch = upper.batches(0)
    for factor in (1.0, 1.1):
        with torch.no_grad():
            upper.optimizer.flat.master.mul_(factor)
        x = noised(batch).x
        with torch.no_grad():
            expected = F.mse_loss(student(x, batch.t, batch.text).out, student(x, batch.t, batch.anchor).out)
        lower.gradient(lower.batches(0))
        torch.testing.assert_close(upper.gradient(batch).total, expected, rtol=1e-4, atol=0)


STEPS = 10  # of a whole sample; the grid of 1000 timesteps is 901, 801, ..., 1


def painted(student, null, batch, guidance):
    """ESD's samples one by one, with nothing of the engine but the random numbers and the UNet."""
    abar = Schedule.sd().alphas_cumprod
    done = 1 + integers(SEED, Stream.TIMESTEP, batch.index, STEPS - 2)
    for row, n in enumerate(done.tolist()):
        x, text = batch.eps[row : row + 1], batch.text[row : row + 1]
        for k in range(n):
            t = 901 - 100 * k
            now = torch.tensor([t])
            v_u, v_c = student(x, now, null).out, student(x, now, text).out
            v = v_u + guidance * (v_c - v_u)
            x0, eps = abar[t].sqrt() * x - (1 - abar[t]).sqrt() * v, abar[t].sqrt() * v + (1 - abar[t]).sqrt() * x
            x = abar[t - 100].sqrt() * x0 + (1 - abar[t - 100]).sqrt() * eps
        yield x, n


@pytest.mark.parametrize("compat", [False, True])
def test_esd(compat):
    teacher, student = make_models()
    start, null = Start(make_models()[1], torch.float32), torch.randn(1, 5, 16)
    answers = Answers(Teacher(teacher), Schedule.sd(), SEED)
    batch = make_batch(1, 1)
    loss = Esd(start, null, 0.7, 3.0, STEPS, compat).loss(student, answers, batch)
    batch, errors, counts = batch.drawn(SEED, 1000), [], set()
    with torch.no_grad():
        samples = list(painted(student, null, batch, 3.0))
    for row, (x, n) in enumerate(samples):
        counts.add(n)
        # 901 - 100 n is the noise that is in x; the other one is 99 more, as 1000 - 20 n is 19 more at 50 steps
        t = torch.tensor([1000 - 100 * n if compat else 901 - 100 * n])
        text, anchor = batch.text[row : row + 1], batch.anchor[row : row + 1]
        c, a = (start.unet(x, t, states).out for states in (text, anchor))
        errors.append(F.mse_loss(student(x, t, text).out, a - 0.7 * (c - a)))
    expected = torch.stack(errors).mean()
    assert len(counts) > 1, "samples must take different numbers of steps"
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=0)
    for a, b in zip(gradients(loss.total, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    # the frozen copy saw two prompts per sample; the teacher was not asked
    assert (start.images, answers.teacher.images) == (2 * B, 0)


def test_esd_at_fifty_steps():
    esd = Esd(Teacher(make_models()[0]), torch.zeros(1, 5, 16), 1.0, 3.0, 50, False)
    assert [esd.timestep(Schedule.sd(), n) for n in (1, 24, 48)] == [961, 501, 21]
    esd.compat = True
    assert [esd.timestep(Schedule.sd(), n) for n in (1, 24, 48)] == [980, 520, 40]


def test_an_esd_sample_does_not_depend_on_its_batch():
    _, student = make_models()
    answers = Answers(Teacher(make_models()[0]), Schedule.sd(), SEED)
    esd = Esd(answers.teacher, torch.zeros(1, 5, 16), 1.0, 3.0, STEPS, False)
    batch = make_batch(1, 0)
    alone = Batch(batch.latents[1:2], batch.text[1:2], batch.anchor[1:2], batch.index[1:2])
    together, alone = esd.paint(student, answers, batch), esd.paint(student, answers, alone)
    (place,) = (together[2] == 1).nonzero()[0].tolist()
    torch.testing.assert_close(together[0][place], alone[0][0], rtol=1e-4, atol=1e-4)
    assert together[1][place] == alone[1][0]


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
        (["--upper.eraser", "salun", "--upper.salun.share", "0"], "--upper.salun.share is 0.0, outside its range"),
        (["--upper.eraser", "erasediff", "--upper.surgery"], "--upper.surgery given with eraser 'erasediff'"),
        (["--upper.eraser", "guidence"], "--upper.eraser 'guidence' does not exist; did you mean 'guidance'?"),
        (["--upper.eraser", "anchor-kd", "--upper.eta", "2"], "--upper.eta is 2.0, but eraser 'anchor-kd' does not"),
        (
            ["--upper.source", "self"],
            "--upper.source is self, but eraser 'guidance' does not read it; those that do: co",
        ),
        (
            ["--upper.esd.steps", "20"],
            "--upper.esd.steps is 20, but eraser 'guidance' does not read it; those that do: e",
        ),
        (["--upper.eraser", "esd", "--upper.esd.steps", "2"], "--upper.esd.steps is 2, outside its range"),
        (
            ["--upper.eraser", "concept-ablation", "--upper.ablation.keep", "-1"],
            "--upper.ablation.keep is -1.0, outside",
        ),
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
