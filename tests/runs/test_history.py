"""Concepts one after another: what a run records, what the next one goes on from, and what clashes."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_json
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.blend import Blend
from bilevel_fast.data.sources import MemorySource, exact_moments
from bilevel_fast.erasing.phrases import captions_of, clashes_of, held, pairs_of, phrases, plain, span
from bilevel_fast.models.folder import load_folder, load_unet, save_student
from bilevel_fast.runs import history
from bilevel_fast.runs.session import erased_concepts, gather, initial_student
from bilevel_fast.train import parse
from bilevel_fast.worlds.mini import TEACHER
from mini_folder import make_mini_folder

SMOKE = ["--preset", "smoke", "--no-twin", "--mini.bank", "3", "--mini.bank-steps", "2", "--mini.images", "72"]


def bank(*rows: tuple[str, str]) -> MemorySource:
    return MemorySource(exact_moments(torch.zeros(len(rows), 2, 4, 4)), [[c] for c, _ in rows], [a for _, a in rows])


MONET = bank(("a star in the style of Monet", "a star"), ("a house, in the style of monet.", "a house"))
DALI = bank(("a star by Dali", "a star"), ("a red house by dali", "a red house"))


def test_phrases_are_what_the_anchor_lacks():
    assert span("a red star in the style of waves", "a red star") == (3, 8)
    assert span("a naked man", "a man") == (1, 2)
    assert span("a man", "a man") == (2, 2)
    assert phrases(MONET) == ("in the style of monet",)
    assert phrases(DALI) == ("by dali",)
    assert [(pair.erase, pair.guide) for pair in pairs_of(DALI)] == [
        ("a star by Dali", "a star"),
        ("a red house by dali", "a red house"),
    ]
    assert {pair.guide for pair in pairs_of(DALI, to_null=True)} == {""}
    assert plain("A house,  In the Style of (Monet).") == "a house in the style of monet"


def test_a_phrase_is_found_as_whole_words():
    assert held("A star, BY DALI!", ["by dali"]) == "by dali"
    assert held("a star by dalia", ["by dali"]) is None
    assert held("nearby dali", ["by dali"]) is None


def test_captions_to_preserve_leave_out_what_is_erased():
    data = MemorySource(exact_moments(torch.zeros(4, 2, 4, 4)), [["a"], ["b by Dali"], ["a", "c"], ["d"]])
    assert captions_of(data, 10, ["by dali"]) == (("a", "c", "d"), 1)
    assert captions_of(data, 2, [])[0] == ("a", "c"), "from all over the source"
    assert clashes_of(data, ["by dali"]) == (1, 4, "b by Dali")


def erased(*names: str, weights=(1.0, 1.0, 1.0)) -> list[history.Erased]:
    return [history.Erased(name, f"banks/{name}", weight) for name, weight in zip(names, weights, strict=False)]


def test_together(caplog):
    caplog.set_level(logging.INFO)
    data = MemorySource(exact_moments(torch.zeros(1, 2, 4, 4)), [["a star"]])
    assert history.together(erased("monet"), [MONET], data, 0) is MONET
    assert not caplog.messages
    both = history.together(erased("monet", "dali", weights=(3.0, 1.0)), [MONET, DALI], data, 0)
    assert isinstance(both, Blend)
    assert (both.names, both.weights) == (("monet", "dali"), (3.0, 1.0))
    assert caplog.messages == ["2 concepts share the upper batches: monet 75%, dali 25%"]


def test_what_clashes(caplog):
    data = MemorySource(exact_moments(torch.zeros(2, 2, 4, 4)), [["a star"], ["a house by Dali"]])
    other = bank(("a cat by DALI", "a cat"))
    with pytest.raises(UserError, match=r"^banks/other erases 'by dali', which banks/dali erases as well; wanted each"):
        history.together(erased("dali", "other"), [DALI, other], data, 0)
    with pytest.raises(UserError, match=r"^banks/other erases 'by dali', which was erased by an earlier run \(dali\)"):
        history.together(erased("dali", "other"), [DALI, other], data, 1)
    history.together(erased("dali"), [DALI], data, 0)
    assert caplog.messages == [
        "1 of 2 lower captions hold a phrase to erase, such as 'a house by Dali': the levels work against each other"
    ]
    caplog.clear()
    swapped = bank(("a star by Picasso", "a star by Dali"))
    history.together(erased("picasso", "dali"), [swapped, DALI], MemorySource(data.moments([0], [0])[None], [["x"]]), 0)
    assert "picasso: anchor 'a star by Dali' holds a phrase that is to be erased, too" in caplog.messages


@pytest.fixture(scope="module")
def teacher():
    return load_folder(TEACHER)


def carry_out(config, teacher, out: Path) -> None:
    """A run without its training: what it is made of, what it leaves behind."""
    out.mkdir()
    write_json(out / "config.json", config.to_dict())
    student = initial_student(config, teacher, 1)
    gather(config, teacher, teacher.unet(), erased_concepts(config), out)
    with torch.no_grad():
        student.conv_in.bias.add_(1)  # it has learnt something
    save_student(out / "student", teacher, student)
    write_json(out / "summary.json", {})


@pytest.fixture(scope="module")
def first(tmp_path_factory, teacher) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    carry_out(parse([*SMOKE, "--erase", "waves", "mosaic", "--concept-weights", "3", "1"]), teacher, out)
    return out


def test_a_third_run_goes_on_from_the_second(first, teacher, tmp_path):
    second, third = tmp_path / "second", tmp_path / "third"
    carry_out(parse([*SMOKE, "--erase", "hatching", "--resume-concepts", str(first)]), teacher, second)
    config = parse([*SMOKE, "--erase", "pointillism", "--resume-concepts", str(second), "--concept-weights", "2"])
    assert len(erased_concepts(config)) == 4
    student, before = initial_student(config, teacher, 1), load_unet(second / "student")
    assert student.structure == before.structure
    assert torch.equal(student.conv_in.bias, before.conv_in.bias)
    materials = gather(config, teacher, teacher.unet(), erased_concepts(config), third)
    assert isinstance(materials.concepts, Blend)
    assert materials.concepts.names == ("waves", "mosaic", "hatching", "pointillism")
    assert materials.concepts.weights == (3.0, 1.0, 1.0, 2.0)
    captions = Batches(materials.concepts, teacher.text_encoder, 14, 0, level=1, anchor="phrase")(0).captions
    found = [sum(caption.endswith(name) for caption in captions) for name in materials.concepts.names]
    assert found == [6, 2, 2, 4], "earlier concepts are shown as well"
    lower = {materials.data.captions(i)[0] for i in range(len(materials.data))}
    assert not any(name in caption for caption in lower for name in materials.concepts.names)
    assert any("line" in caption for caption in lower)
    rows = json.loads((third / "concepts.json").read_text())["concepts"]
    assert [row["name"] for row in rows] == ["waves", "mosaic", "hatching", "pointillism"]
    assert [Path(row["bank"]).is_absolute() for row in rows] == [True, True, True, False]
    assert (third / rows[3]["bank"] / "index.json").exists()


def test_a_run_folder_may_move(first, teacher, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    past = history.read(moved)
    assert past.names == ("waves", "mosaic")
    assert [Path(concept.bank) for concept in past.concepts] == [moved / "concepts" / name for name in past.names]
    assert [len(found) for found in history.open_banks(past.concepts)] == [3, 3]
    shutil.rmtree(moved / "concepts" / "mosaic")
    with pytest.raises(UserError, match=r"the bank of 'mosaic', which an earlier run has erased: .*is not a cache"):
        history.open_banks(past.concepts)


def test_one_style_keeps_its_old_place(teacher, tmp_path):
    gather(parse([*SMOKE, "--erase", "waves"]), teacher, teacher.unet(), [], tmp_path)
    assert (tmp_path / "concepts" / "index.json").exists()
    assert json.loads((tmp_path / "concepts.json").read_text())["concepts"] == [
        {"name": "waves", "bank": "concepts", "weight": 1.0}
    ]


def test_bad_runs_are_refused(first, teacher, tmp_path):
    with pytest.raises(UserError, match=r"is no run folder: config\.json is missing"):
        erased_concepts(parse([*SMOKE, "--resume-concepts", str(tmp_path)]))
    begun = tmp_path / "begun"
    shutil.copytree(first, begun)
    (begun / "summary.json").unlink()
    with pytest.raises(UserError, match="has not ended; finish it first, with --resume --out"):
        erased_concepts(parse([*SMOKE, "--resume-concepts", str(begun)]))
    (begun / "summary.json").write_text("{}")
    record = json.loads((begun / "concepts.json").read_text())
    for change, message in (
        ({"version": 9}, "this release reads"),
        ({"concepts": [{"name": "waves"}]}, "does not hold what a record of concepts holds"),
        ({"concepts": []}, "names no concept"),
    ):
        write_json(begun / "concepts.json", record | change)
        with pytest.raises(UserError, match=message):
            history.read(begun)
    (begun / "concepts.json").unlink()
    with pytest.raises(UserError, match=r"has erased nothing: concepts\.json is missing"):
        history.read(begun)
    with pytest.raises(UserError, match=r"style 'mosaic' was erased by .* already; --erase names another"):
        erased_concepts(parse([*SMOKE, "--erase", "mosaic", "--resume-concepts", str(first)]))
    with pytest.raises(UserError, match="style 'waves' is to be erased twice"):
        erased_concepts(parse([*SMOKE, "--erase", "waves", "waves"]))
    other = load_folder(make_mini_folder(tmp_path / "other"))
    config = parse([*SMOKE, "--erase", "hatching", "--resume-concepts", str(first)])
    with pytest.raises(UserError, match=r"had the teacher .*, this is .*; wanted the same"):
        gather(config, other, other.unet(), erased_concepts(config), tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--concept-weights", "1", "2"], "2 --concept-weights for 1 of --erase; wanted one each"),
        (["--concept-weights", "0"], "--concept-weights is (0.0,): wanted each > 0 and finite"),
        (["--resume-concepts", "x", "--student", "y", "--teacher", "z"], "--student given with --resume-concepts"),
    ],
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(UserError) as refused:
        parse([*SMOKE, *flags])
    assert message in str(refused.value)
