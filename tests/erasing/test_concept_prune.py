"""ConceptPrune against a plain transcription of its formulas that keeps every activation."""

import math

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing import concept_prune
from bilevel_fast.erasing.concept_prune import FIRST, FRAMES, ConceptPrune, collect, mask
from bilevel_fast.erasing.edit import Job
from bilevel_fast.erasing.pairs import Frame, Pair, framed
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.sampling.samplers import guided, sample
from mini_folder import TINY, make_mini_folder

GONE = "down_blocks.1.attentions.0"
TRANSFORMERS = [site.name for site in sites(TINY) if site.kind == "transformer"]
STEPS, GUIDANCE, RATIO = 2, 3.0, 0.05
SETTINGS = ConceptPrune(ratio=RATIO, steps=STEPS, batch=2, seed=3)
WAVES, DOTS = Pair("in the style of waves"), Pair("in the style of pointillism")
RED = (Frame.of("a red star"), Frame.of("a {} ring"), Frame.of("an orange cross"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return load_folder(make_mini_folder(tmp_path_factory.mktemp("models") / "teacher"))


def student(drop=(GONE,)):
    torch.manual_seed(1)
    return UNet(TINY, Structure.uniform(TINY, 0.7, drop)).requires_grad_(False).eval()


def activations(unet, folder, prompts):
    """What goes into the second linear layer of each feed-forward net: rows (tokens, F), by layer, for each step."""
    kept = {name: [[] for _ in range(STEPS)] for name, _ in unet.named_modules() if name.endswith("ff.net.2")}
    hooks = [
        unet.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: kept[name][calls[0]].append(x[0][:]))
        for name in kept
    ]
    null = folder.text_encoder.encode([""])
    for i, prompt in enumerate(prompts):
        calls = [-1]
        predict = guided(unet, folder.text_encoder.encode([prompt]), null, GUIDANCE)

        def counted(x, t, calls=calls, predict=predict):
            calls[0] += 1
            return predict(x, t)

        x = normal(SETTINGS.seed, Stream.INITIAL, [FIRST + i], (TINY.in_channels, 8, 8))
        sample(counted, x, folder.schedule, STEPS, "ddim")
    for hook in hooks:
        hook.remove()
    return {name: [torch.cat(step).flatten(0, 1).double() for step in steps] for name, steps in kept.items()}


def plain_masks(unet, folder, pair, frames):
    """The formulas, weight by weight."""
    rows = framed([pair], frames)
    concept, base = (activations(unet, folder, [getattr(row, side) for row in rows]) for side in ("erase", "guide"))
    masks = {}
    for name in concept:
        w = unet.get_submodule(name).weight.double()
        count = math.floor(RATIO * w.shape[1])
        masks[name] = torch.zeros(w.shape, dtype=torch.bool)
        for step in range(STEPS):
            rows = (concept[name][step], base[name][step])
            n_concept, n_base = ((a / a.norm(dim=1, keepdim=True)).square().sum(0).sqrt() for a in rows)
            for i in range(w.shape[0]):
                with_it, without = (w[i].abs() * n_concept).tolist(), (w[i].abs() * n_base).tolist()
                for j in sorted(range(w.shape[1]), key=with_it.__getitem__, reverse=True)[:count]:
                    masks[name][i, j] |= with_it[j] > without[j]
    return masks


def masked_of(before, unet):
    """Which weights an edit has zeroed; all others must be what they were."""
    found = {}
    for name, p in unet.named_parameters():
        if name.endswith("ff.net.2.weight"):
            found[name.removesuffix(".weight")] = (p == 0) & (before[name] != 0)
            assert torch.equal(p, before[name].masked_fill(p == 0, 0))
        else:
            assert torch.equal(p, before[name])
    return found


def edited(pairs, folder, frames=RED, settings=SETTINGS, unet=None, **job):
    unet = student() if unet is None else unet
    before = {name: p.clone() for name, p in unet.named_parameters()}
    outcome = settings.edit(unet, Job(folder, tuple(pairs), frames, **job))
    return masked_of(before, unet), outcome


def test_masks_equal_the_plain_transcription_and_unite(folder):
    unet, calls = student(), []
    masks, outcome = edited([WAVES, DOTS], folder, progress=lambda done, total: calls.append((done, total)))
    wanted = [plain_masks(unet, folder, pair, RED) for pair in (WAVES, DOTS)]
    assert masks.keys() == wanted[0].keys() == {f"{s}.transformer_blocks.0.ff.net.2" for s in TRANSFORMERS if s != GONE}
    for name, found in masks.items():
        assert torch.equal(found, wanted[0][name] | wanted[1][name])
    assert any((wanted[0][name] != wanted[1][name]).any() for name in masks)  # or a union would prove little
    share = sum(m.sum() for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert outcome.table["ff.net.2"]["zeroed"] == pytest.approx(share.item())
    assert RATIO / 2 < share < 2 * STEPS * RATIO
    assert outcome.record.skipped == (GONE,)
    # three batches of prompts, for two concepts and the guide that they share: the second time it costs nothing
    assert calls == [(2, 12), (3, 12), (5, 12), (6, 12), (8, 12), (9, 12)]


def test_concepts_one_after_another_stay_zero(folder):
    unet = student()
    edited([WAVES], folder, unet=unet)
    first = {name: p == 0 for name, p in unet.named_parameters()}
    masks, _ = edited([DOTS], folder, unet=unet)
    assert any(m.any() for m in masks.values())
    assert all((unet.get_parameter(name)[zero] == 0).all() for name, zero in first.items())


def test_the_table(folder):
    unet = student()
    masks, outcome = edited([WAVES], folder, unet=unet)
    row = outcome.table["ff.net.2"]
    old = {name: student().get_submodule(name).weight.double() for name in masks}
    lost = sum(old[name][m].square().sum() for name, m in masks.items())
    assert row["weights"] == pytest.approx((lost / sum(w.square().sum() for w in old.values())).sqrt().item())
    assert row["matrices"] == len(masks) == 6
    x = normal(SETTINGS.seed, Stream.INITIAL, range(FIRST, FIRST + 3), (TINY.in_channels, 8, 8))
    text = folder.text_encoder.encode([pair.guide for pair in framed([WAVES], RED)])
    before, after = (u(x, torch.full((3,), 999), text).out for u in (student(), unet))
    assert row["guides moved"] == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-5)
    assert 0 < row["erased moved"] < 1


def test_timesteps_are_counted():
    """A weight that one of four timesteps chooses, and one that two choose."""
    w = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    concept = torch.tensor([[4, 1, 1, 1], [1, 4, 1, 1], [1, 4, 1, 1], [1, 1, 1, 4]]).double()
    base = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 4]]).double()

    def chosen(**settings):
        return mask(w, concept, base, 0.25, **settings).tolist()[0]

    assert chosen() == [True, True, False, False]  # the last is no more than the base's
    assert chosen(select=0.24) == [True, True, False, False]
    assert chosen(select=0.25) == [False, True, False, False]
    assert chosen(select=0.5) == [False, False, False, False]


def test_concept_and_base_alike_choose_nothing(folder):
    unet = student()
    masks, _ = edited([Pair("in the style of waves", "in the style of waves")], folder, unet=unet)
    assert not any(m.any() for m in masks.values())


def test_statistics_stay_on_the_device_and_take_no_more_room(folder):
    """On the meta device a read of any number raises; a row of sums is all that is kept."""
    prompts = ["a red star"] * 5
    settings = {"seed": 0, "size": 8, "guidance": GUIDANCE, "steps": STEPS, "batch": 2}
    unet = student().to("meta")
    norms = collect(unet, folder.schedule, folder.text_encoder, prompts, **settings)
    for name, total in norms.items():
        assert (total.device.type, total.shape) == ("meta", (STEPS, unet.get_parameter(name).shape[1]))
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_sentences_of_the_paper():
    things, people = (framed([pair], FRAMES[name]) for name, pair in (("things", WAVES), ("people", Pair("naked"))))
    assert (len(things), len(people)) == (20, 18)
    assert things[0] == Pair("a cat in the style of waves", "a photo of a cat")
    assert people[16] == Pair("a photo of a naked group of friends", "a photo of a group of friends")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, "--ratio is 0.0; wanted 0 < ratio <= 1"),
        ({"select": 1.0}, "--select is 1.0; wanted 0 <= select < 1"),
        ({"batch": 0}, "--batch is 0; wanted 1 or more"),
        ({"steps": 0}, "--steps is 0; wanted 1 or more"),
        ({"ratio": 0.001}, "--ratio 0.001 of 80 weights, the widest row here, is none; wanted more"),
        ({"ratio": 0.5, "size": 6}, "--size is 6; wanted a multiple of the UNet's stride 4, 1448 at most"),
    ],
)
def test_refusals(settings, message, folder):
    with pytest.raises(UserError) as error:
        ConceptPrune(**settings).edit(student(), Job(folder, (WAVES,), RED))
    assert str(error.value) == message


def test_nothing_left_to_edit(folder):
    with pytest.raises(UserError, match="all 7 Transformers of the model were dropped"):
        SETTINGS.edit(student(TRANSFORMERS), Job(folder, (WAVES,), RED))


def test_the_noise_is_far_from_the_judges():
    assert FIRST > 1 << 44
    assert concept_prune.FRAMES.keys() == {"things", "people"}
