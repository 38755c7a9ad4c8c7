"""Distillation of self-attentions and of layers against the formulas, each output found by another way than hooks."""

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import Sites, UNet
from bilevel_fast.ops.dispatch import Branch
from bilevel_fast.training.features import listened_to
from bilevel_fast.training.losses import LossWeights
from bilevel_fast.training.lower import Answers, FineTuning
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.teacher import Teacher
from world import SEED, TINY, make_batch, make_models

BOTH = LossWeights(diffusion=0, output=0, feature=0, self_attention=0.5, layer=0.25)


def found(unet, noised, text):
    """Outputs of self-attentions and of layers, from the inside of a dense UNet."""
    attentions, layers = [], []

    def resnet(name, module, h, skip, time):
        layers.append(module(h, skip, time))
        return layers[-1]

    def attend(kind, module, x, context):
        out = module(x, context)
        if kind == "attn1":
            attentions.append(out.whole() if isinstance(out, Branch) else out)
        return out

    def transformer(name, module, h, text):
        layers.append(module(h, text, lambda _, block, h, text: block(h, text, attend)))
        return layers[-1]

    unet(noised.x, noised.t, text, Sites(resnet, transformer))
    return attentions, layers


def mean_of_means(mine, theirs):
    total = sum((a.double() - b.double()).square().sum() / a.numel() for a, b in zip(mine, theirs, strict=True))
    return (total / len(mine)).item()


def training(teacher, student, weights=BOTH, recompute=False):
    student.recompute = recompute
    return FineTuning(FlatParameters(student), Answers(Teacher(teacher), Schedule.sd(), SEED), weights)


def test_the_terms_are_the_formulas():
    torch.manual_seed(0)
    teacher, student = UNet(TINY), UNet(TINY)
    batch = make_batch(0, 0).drawn(SEED, 1000)
    lower = training(teacher, student)
    noised = lower.answers.noise(batch)
    with torch.no_grad():
        mine, theirs = (found(unet, noised, batch.text) for unet in (student, teacher))
    assert (len(mine[0]), len(mine[1])) == (4, 12)
    wanted = [mean_of_means(a, b) for a, b in zip(mine, theirs, strict=True)]
    loss = lower(batch)
    assert list(loss.terms) == ["self_attention", "layer"]
    assert [term.item() for term in loss.terms.values()] == pytest.approx(wanted, rel=1e-5)
    assert loss.total.item() == pytest.approx(0.5 * wanted[0] + 0.25 * wanted[1], rel=1e-5)


def test_a_pruned_student_is_compared_where_it_has_something():
    student = make_models()[1]
    names = listened_to(student, BOTH)
    assert {name.partition(".transformer_blocks")[0] for name in names} == {
        site.name for site in sites(TINY) if site.name not in student.structure.dropped
    }
    gradients = []
    for recompute in (False, True):
        lower = training(*make_models(), recompute=recompute)
        loss = lower(make_batch(0, 0).drawn(SEED, 1000))
        assert all(term > 0 for term in loss.terms.values())
        gradients.append(lower.flat.gradient.clone())
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-7)


def test_the_teacher_is_heard_by_all_students_that_share_it():
    teacher, student = make_models()
    answers = Answers(Teacher(teacher), Schedule.sd(), SEED)
    FineTuning(FlatParameters(student), answers, LossWeights(layer=1.0))
    FineTuning(FlatParameters(make_models()[1]), answers)
    layers = set(listened_to(student, LossWeights(layer=1.0)))
    assert set(answers.ask(make_batch(0, 0)).heard) == layers == set(answers.listens)
    assert not teacher.get_submodule(answers.listens[0])._forward_hooks, "no hook is left behind"


def test_a_student_without_self_attention():
    gone = [site.name for site in sites(TINY) if site.kind == "transformer"]
    student = UNet(TINY, Structure.uniform(TINY, 1.0, gone))
    with pytest.raises(UserError, match="this student has no self-attention left"):
        listened_to(student, BOTH)
    with pytest.raises(UserError, match="must not be negative"):
        LossWeights(layer=-1.0)
