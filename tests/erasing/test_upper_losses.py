"""Losses of the upper level's erasers, each against a plain transcription; the masks and words that go into them."""

import pytest
import torch
import torch.nn.functional as F

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.data.sources import MemorySource
from bilevel_fast.erasing.attention import ForgetMeNot, Words
from bilevel_fast.erasing.esd import Esd
from bilevel_fast.erasing.references import Itself, Start
from bilevel_fast.erasing.saliency import Relabel, salient
from bilevel_fast.erasing.targets import ConceptAblation, Guidance
from bilevel_fast.models.diffusion import Schedule, noise
from bilevel_fast.models.mini import MiniTextEncoder, WordTokenizer
from bilevel_fast.ops.randomness import Stream, integers
from bilevel_fast.training.levels import bilevel
from bilevel_fast.training.lower import Answers
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.worlds.mini.world import WORDS
from world import SEED, B, make_batch, make_levels, make_models


@pytest.fixture(autouse=True)
def _torch_ops(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")  # native code reads its numbers on the CPU, as no graph can


def upper_loss(eraser, batch=None, **settings):
    """The loss of an eraser on a concept batch, after one lower step, and the world it was made in."""
    lower, upper = make_levels(*make_models(), penalty=0.0, eraser=eraser, **settings)
    lower.gradient(lower.batches(0))
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
    encoder, nothing = MiniTextEncoder(WordTokenizer(WORDS)), torch.zeros(1, 1, 8, 8, 8)
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
    assert len(kept) == sum(name.endswith(".attn2") for name, _ in student.named_modules()) > 2
    for a, b in zip(gradients(loss.total, student), gradients(expected, plain), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    assert student.recompute == recompute
    assert not any(module._forward_pre_hooks for module in student.modules()), "hooks must not stay"


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
    expected = salient_by_name(plain, 2, 0.3)
    found = flat.state_dict(mask.float())
    differ = sum((found[name].bool() != wanted).sum().item() for name, wanted in expected.items())
    assert differ <= 2e-4 * sum(p.numel() for p in plain.parameters()), "gradients that tie in their last bits may swap"
    assert mask.sum() == round(0.3 * sum(p.numel() for p in plain.parameters()))


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
