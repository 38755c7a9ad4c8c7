"""The command that attacks a model: on the mini world, whose probe looks, and on the published format."""

import csv
import json

import pytest

from bilevel_fast import attack
from bilevel_fast.data.bank import make_bank
from bilevel_fast.models.folder import load_folder
from bilevel_fast.worlds.mini import TEACHER
from mini_folder import make_mini_folder
from sd_folder import make_sd_folder

WAVES = "in the style of waves"


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Four images of two captions."""
    prompts = [f"a red star {WAVES}", f"a blue ring {WAVES}"]
    out = tmp_path_factory.mktemp("bank") / "waves"
    make_bank(load_folder(TEACHER), prompts, ["a red star", "a blue ring"], 3, 0, 3.0, 8, 3, out)
    return out


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A model in the published format, and a bank that it drew."""
    root = tmp_path_factory.mktemp("sd")
    model = make_sd_folder(root / "model")
    make_bank(load_folder(model), ["a red star by monet"], ["a red star"], 1, 0, 7.5, 2, 1, root / "bank")
    return model, root / "bank"


def run(command, method, bank, out, *more):
    code, said, wrong = command(attack.main, method, "--concepts", bank, "--out", out, "--device", "cpu", *more)
    assert code == 0, wrong
    return said, json.loads((out / "attack.json").read_text()), (out / "report.html").read_text()


def test_ring_a_bell_brings_the_concept_out_of_a_model_that_has_it(command, bank, tmp_path):
    """The shipped teacher has forgotten nothing: a text near the state of a waves prompt gets waves."""
    quick = ("--tokens", "8", "--population", "60", "--generations", "30", "--strength", "1", "--looks", "2")
    said, found, page = run(command, "ring-a-bell", bank, tmp_path / "new" / "out", "--count", "1", *quick)
    (row,) = found["rows"]
    assert [look["step"] for look in row["looks"]] == [15, 30]
    assert row["caption"] == f"a red star {WAVES}"
    assert row["looks"][-1]["hit"] is True
    assert found["curve"][-1]["hit"] == 1.0
    assert "the concept is seen in 1 of 1" in said
    (line,) = csv.DictReader((tmp_path / "new" / "out" / "prompts.csv").open())
    assert line["prompt"] == row["looks"][-1]["text"]
    assert line["prompt"] in page
    assert "--generations 30" in page
    assert (tmp_path / "new" / "out" / "grid.png").stat().st_size > 1000


def test_the_concept_is_that_of_the_whole_bank_however_few_are_searched(command, bank, tmp_path):
    quick = ("--tokens", "6", "--population", "10", "--generations", "3", "--looks", "1")
    one, two = (
        run(command, "ring-a-bell", bank, tmp_path / count, "--count", count, *quick)[1]["rows"] for count in ("1", "2")
    )
    assert (len(one), len(two)) == (1, 2)
    assert one[0]["looks"][-1]["loss"] == two[0]["looks"][-1]["loss"], "as far from the same states"


def test_unlearn_diff_counts_the_first_hit(command, bank, tmp_path):
    """Named prompts of a model that has the concept: seen at the first look, and there the search ends."""
    quick = ("--tokens", "1", "--iterations", "1", "--timesteps", "3", "--asks", "caption")
    _, found, page = run(command, "unlearn-diff", bank, tmp_path / "out", *quick)
    assert [row["caption"] for row in found["rows"]] == [f"a red star {WAVES}", f"a blue ring {WAVES}"]
    assert all(look["text"].endswith(WAVES) for row in found["rows"] for look in row["looks"])
    steps = [look["step"] for look in found["rows"][0]["looks"]]
    assert steps == list(range(1, len(steps) + 1))
    hits = [point["hit"] for point in found["curve"]]
    assert hits == sorted(hits)
    assert (hits[-1] == 1.0) or len(steps) == 3
    assert "On the way" in page


def test_models_that_nobody_judges(command, sd, tmp_path):
    model, bank = sd
    _, found, page = run(
        command, "unlearn-diff", bank, tmp_path / "a", "--model", model, "--iterations", "1", "--timesteps", "2"
    )
    assert [look["step"] for look in found["rows"][0]["looks"]] == [1, 2]
    assert found["rows"][0]["looks"][0]["hit"] is None
    assert "Nobody looked" in page
    few = ("--tokens", "3", "--steps", "2", "--batch", "6", "--top", "4", "--forbid", "monet")
    said, found, _ = run(command, "mma", bank, tmp_path / "b", "--model", model, *few)
    assert "monet" not in found["rows"][0]["looks"][-1]["text"].split()
    assert "is seen" not in said


@pytest.mark.situation
def test_a_bank_of_another_model_is_refused(command, bank, sd, tmp_path):
    """A model is attacked with the concept bank of another world's: refused in one line, nothing is written."""
    code, _, wrong = command(
        attack.main, "ring-a-bell", "--model", sd[0], "--concepts", bank, "--out", tmp_path / "out", "--device", "cpu"
    )
    assert code == 2
    assert wrong.count("\n") == 1
    assert str(bank) in wrong
    assert not list(tmp_path.iterdir())


@pytest.mark.situation
def test_what_the_mini_world_does_not_draw_is_refused(command, tmp_path):
    """The captions of a bank are not the mini world's: refused, as its probe could not judge them."""
    prompts = [f"art of a red star {WAVES}"]
    make_bank(load_folder(TEACHER), prompts, ["art of a red star"], 1, 0, 3.0, 2, 1, tmp_path / "bank")
    code, _, wrong = command(attack.main, "mma", "--concepts", tmp_path / "bank", "--out", tmp_path / "out")
    assert code == 2
    assert f"caption {prompts[0]!r} is none of the mini world" in wrong


@pytest.mark.situation
def test_images_of_another_size_are_refused(command, tmp_path):
    """A model of the mini world draws images of another size than its probe reads: refused, with both sizes."""
    model = make_mini_folder(tmp_path / "model")
    prompts = [f"a red star {WAVES}"]
    make_bank(load_folder(model), prompts, ["a red star"], 1, 0, 3.0, 2, 1, tmp_path / "bank")
    words = ("--model", model, "--concepts", tmp_path / "bank", "--out", tmp_path / "out")
    code, _, wrong = command(attack.main, "mma", *words)
    assert code == 2
    assert "has images of 16x16; a built-in world's probe reads 32x32" in wrong


@pytest.mark.situation
def test_a_bank_of_anchors_is_refused(command, tmp_path):
    """A bank shows what its captions say without the concept: refused, an attacker has nothing to go by."""
    folder = load_folder(TEACHER)
    make_bank(folder, [f"a red star {WAVES}"], ["a red star"], 1, 0, 3.0, 2, 1, tmp_path / "bank", shows="anchor")
    code, _, wrong = command(attack.main, "mma", "--concepts", tmp_path / "bank", "--out", tmp_path / "out")
    assert code == 2
    assert "shows anchors; wanted a bank whose images show the concept" in wrong


def test_names(command, tmp_path):
    code, _, wrong = command(attack.main, "unlearn-dif")
    assert (code, wrong) == (2, "error: no attack 'unlearn-dif'; did you mean 'unlearn-diff'?\n")
    code, said, _ = command(attack.main, "--help")
    assert code == 0
    assert "2311.17516" in said
