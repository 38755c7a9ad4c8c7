"""UCE against a least-squares solver, matrix by matrix, and what it must leave alone."""

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.edit import Job
from bilevel_fast.erasing.pairs import Frame, Pair, framed
from bilevel_fast.erasing.uce import Uce
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from mini_folder import TINY, make_mini_folder

GONE = "up_blocks.2.attentions.1"
TRANSFORMERS = [site.name for site in sites(TINY) if site.kind == "transformer"]
WAVES, DOTS = Pair("in the style of waves", "in the style of mosaic", 2.5), Pair("pointillism")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return load_folder(make_mini_folder(tmp_path_factory.mktemp("models") / "teacher"))


def student(keep=0.6, drop=(GONE,)):
    torch.manual_seed(1)
    return UNet(TINY, Structure.uniform(TINY, keep, drop)).requires_grad_(False)


def is_edited(name):
    return name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))


def matrices(unet):
    return {name: p.double() for name, p in unet.named_parameters() if is_edited(name)}


def weights(unet):
    return {name: value.clone() for name, value in unet.state_dict().items()}


def tokens(folder, pair):
    """States of the matched tokens: from the last word of each text on, as long as both last."""
    e, g = len(pair.erase.split()), len(pair.guide.split())  # the token before the first word begins the text
    count = 12 - max(e, g)
    erased, guide = folder.text_encoder.encode([pair.erase, pair.guide]).double()
    return erased[e : e + count], guide[g : g + count]


def rows(weight, k, target):
    return weight**0.5 * k, weight**0.5 * target


def stacked(parts):
    """W' of min sum |W' k - target|^2, by SVD."""
    k, target = (torch.cat(side) for side in zip(*parts, strict=True))
    return torch.linalg.lstsq(k, target, driver="gelsd").solution.T


def objective(folder, w, pairs, preserve, scale, ridge):
    """Rows of the objective for one W: its own targets."""
    eye = torch.eye(w.shape[1], dtype=torch.float64)
    parts = [rows(ridge, eye, w.T)]
    for pair in pairs:
        k, guide = tokens(folder, pair)
        parts.append(rows(pair.weight, k, guide @ w.T))
    kept = folder.text_encoder.encode(preserve).double().flatten(0, 1)
    return [*parts, rows(scale, kept, kept @ w.T)]


def differs(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("keep", "drop"), [(1.0, ()), (0.6, (GONE,))], ids=["dense", "pruned"])
@pytest.mark.parametrize("scale", [None, 0.02], ids=["default scale", "given scale"])
def test_equals_least_squares(keep, drop, scale, folder):
    unet = student(keep, drop)
    before, all_before = matrices(unet), weights(unet)
    frames, preserve = (Frame.of("a red star"), Frame.of("a {} ring")), ("a blue ring", "a green cross in waves")
    job = Job(folder, (WAVES, DOTS), frames, preserve)
    outcome = Uce(ridge=0.3, preserve_scale=scale).edit(unet, job)

    assert outcome.record.skipped == drop
    pairs = [WAVES, DOTS, *framed([WAVES, DOTS], frames)]
    assert len(pairs) == 6
    assert len(before) == 2 * (len(TRANSFORMERS) - len(drop))
    for name, w in matrices(unet).items():
        wanted = stacked(objective(folder, before[name], pairs, ["", *preserve], scale or 1 / 3, 0.3))
        assert differs(w, wanted) < 1e-6
        assert differs(w, before[name]) > 0.05
    after = unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in all_before.items() if not is_edited(name))


def test_the_default_scale_has_a_floor(folder):
    many = tuple(f"a {color} {thing}" for color in ("red", "blue", "green") for thing in ("star", "ring", "cross", "a"))
    record = Uce().edit(student(), Job(folder, (DOTS,), (), many)).record
    assert record.settings == {"ridge": 0.5, "preserve_scale": 0.1}
    assert record.preserve == ("", *many)


def test_a_guide_that_is_the_text_changes_nothing(folder):
    unet = student()
    before = weights(unet)
    outcome = Uce().edit(unet, Job(folder, (Pair("a red star", "a red star"),), (), ("a blue ring",)))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert outcome.table["attn2.to_k"]["weights"] == outcome.table["attn2.to_k"]["erased moved"] == 0


def test_preserved_texts_keep_their_keys_and_values(folder):
    preserve = ("a blue ring",)
    states = folder.text_encoder.encode(["", *preserve]).double().flatten(0, 1)
    k, guide = tokens(folder, WAVES)
    moved = {}
    for scale in (1e-6, 1e6):
        unet = student()
        before = matrices(unet)
        Uce(preserve_scale=scale).edit(unet, Job(folder, (WAVES,), (), preserve))
        after = matrices(unet)
        moved[scale] = max(differs(states @ after[n].T, states @ before[n].T) for n in before)
        if scale == 1e6:  # and what should go has gone most of the way all the same
            for name, w in before.items():
                assert differs(k @ after[name].T, guide @ w.T) < 0.3 * differs(k @ w.T, guide @ w.T)
    assert moved[1e6] < 1e-4
    assert moved[1e-6] > 1e-2


def test_a_heavier_pair_comes_closer(folder):
    """Two pairs that want different things of similar texts; whichever weighs more gets nearer to its guide."""
    texts = ("a red star", "a red ring"), ("a red star in the style of waves", "")

    def left(weights):
        pairs = tuple(Pair(*text, weight) for text, weight in zip(texts, weights, strict=True))
        unet = student()
        before = matrices(unet)
        Uce(preserve_scale=1e-3).edit(unet, Job(folder, pairs))
        after, found = matrices(unet), []
        for pair in pairs:
            k, guide = tokens(folder, pair)
            found.append(sum(differs(k @ after[n].T, guide @ w.T) for n, w in before.items()))
        return found

    even, first, second = left((1, 1)), left((100, 1)), left((1, 100))
    assert first[0] < even[0] < second[0]
    assert second[1] < even[1] < first[1]


def test_one_after_another_minimises_all_objectives_together(folder):
    """The stacked objective of both edits from the first weights on; the second edit's targets are of its own time."""
    first = Pair("a red star in the style of waves", "a red star")
    second = Pair("a red star in the style of mosaic", "a blue ring", 2.0)
    unet = student()
    start = matrices(unet)
    job = Job(folder, (first,), (), ("a green cross",))
    record = Uce(preserve_scale=0.2).edit(unet, job).record
    between = matrices(unet)
    again = Job(folder, (second,), (), ("a blue cross",), earlier=(record,))
    outcome = Uce(preserve_scale=0.2).edit(unet, again)
    assert outcome.notes == ("kept: 1 earlier edit by uce",)

    alone = student()
    Uce(preserve_scale=0.2).edit(alone, job)
    Uce(preserve_scale=0.2).edit(alone, Job(folder, (second,), (), ("a blue cross",)))
    k, guide = tokens(folder, first)
    for name, w in matrices(unet).items():
        parts = objective(folder, start[name], [first], ["", "a green cross"], 0.2, 0.5)
        parts += objective(folder, between[name], [second], ["a blue cross"], 0.2, 0.5)[1:]  # lambda once
        assert differs(w, stacked(parts)) < 1e-5
        kept, lost = (differs(k @ x.T, guide @ start[name].T) for x in (w, matrices(alone)[name]))
        assert kept < 0.8 * lost


def test_what_is_erased_anew_is_no_longer_kept(folder):
    """Another guide for a text erased before, and erasing a text preserved before: the last word counts."""
    old = Uce(preserve_scale=0.2).edit(student(), Job(folder, (WAVES,), (), ("a blue cross",))).record
    anew = (Pair(WAVES.erase.upper(), "a red star"), Pair("a Blue cross", "a ring"))
    unet, plain = student(), student()
    outcome = Uce(preserve_scale=0.2).edit(unet, Job(folder, anew, earlier=(old,)))
    Uce(preserve_scale=0.2).edit(plain, Job(folder, anew))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in unet.state_dict().items())
    assert outcome.notes[1:] == (
        "no longer kept, as it is erased now: 'in the style of waves'",
        "no longer kept, as it is erased now: 'a blue cross'",
    )


def test_the_table_says_what_the_weights_do(folder):
    unet = student()
    before = matrices(unet)
    row = Uce().edit(unet, Job(folder, (WAVES,), (), ("a blue ring",))).table["attn2.to_v"]
    after = {n: w for n, w in matrices(unet).items() if "to_v" in n}
    before = {n: before[n] for n in after}
    k, guide = tokens(folder, WAVES)
    kept = folder.text_encoder.encode(["", "a blue ring"]).double().flatten(0, 1)

    def total(function):
        return sum(function(n).square().sum() for n in after).sqrt().item()

    wanted = {
        "weights": total(lambda n: after[n] - before[n]) / total(lambda n: before[n]),
        "erased moved": total(lambda n: k @ (after[n] - before[n]).T) / total(lambda n: k @ before[n].T),
        "left to guide": total(lambda n: k @ after[n].T - guide @ before[n].T)
        / total(lambda n: (k - guide) @ before[n].T),
        "preserved moved": total(lambda n: kept @ (after[n] - before[n]).T) / total(lambda n: kept @ before[n].T),
    }
    assert row == pytest.approx({"matrices": len(after), **wanted}, rel=1e-5)
    assert wanted["left to guide"] < 0.3
    assert wanted["preserved moved"] < 0.5 * wanted["erased moved"]


def test_refusals(folder):
    with pytest.raises(UserError, match="all 7 Transformers of the model were dropped"):
        Uce().edit(student(drop=TRANSFORMERS), Job(folder, (WAVES,)))
    for settings, message in (({"ridge": 0.0}, "--ridge is 0.0"), ({"preserve_scale": -1.0}, "--preserve-scale is -1")):
        with pytest.raises(UserError, match=message):
            Uce(**settings)
