"""SepME against a transcription; that no other text sees an increment, and that a concept given back is as it was."""

import shutil

import pytest
import torch

from bilevel_fast import erase
from bilevel_fast.erasing import separable
from bilevel_fast.erasing.edit import read_records
from bilevel_fast.erasing.uce import Matched, matrices
from bilevel_fast.models.folder import load_folder
from bilevel_fast.worlds.mini.world import SCENES
from commands import run_command
from mini_folder import make_mini_folder
from mutants import mutated

WAVES, DOTS = "in the style of waves", "in the style of pointillism"
KEPT = "a red star"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_mini_folder(tmp_path_factory.mktemp("models") / "model")


def run(*flags):
    return run_command(erase.main, "separable", *flags)


def weights(path):
    return {name: w.double() for name, w in matrices(load_folder(path).unet())}


def states(folder, text):
    return folder.text_encoder.encode([text])[0].double()


def seen(change, folder, text):
    """How far a text's keys and values moved, as a share of what they were."""
    before, after = change
    k = states(folder, text)
    return max(((after[n] - w) @ k.T).norm() / (w @ k.T).norm() for n, w in before.items()).item()


@pytest.fixture(scope="module")
def both(model, tmp_path_factory):
    """Two concepts erased at once, by increments of their own."""
    out = tmp_path_factory.mktemp("erased") / "both"
    (out.parent / "kept.txt").write_text(f"{KEPT}\n")
    made = run("--model", model, "--erase", WAVES, DOTS, "--preserve", out.parent / "kept.txt", "--out", out)
    assert made.returncode == 0, made.stderr
    assert "directions: " in made.stdout
    return out


def random_texts(rank=3, width=24, kept=5):
    make = torch.Generator().manual_seed(0)
    e, g, p = (torch.randn(n, width, dtype=torch.float64, generator=make) for n in (rank, rank, kept))
    return Matched(e, g, torch.ones(rank, 1, dtype=torch.float64)), torch.cat([p, g])


def gap(module):
    """From the least Delta in the null space, by the pseudo-inverse, with Delta K^T = 0 and (W + Delta) C = 0."""
    concept, kept = random_texts()
    w = torch.randn(7, 24, dtype=torch.float64)
    left, right = module.directions(concept, kept.T @ kept, 1e-4)
    found = w @ left @ right.T
    basis = torch.linalg.svd(kept)[2][len(kept) :].T  # columns: solutions of K x = 0
    apart = (concept.erased - concept.guide).T
    coefficients = -(w @ apart) @ torch.linalg.pinv(basis.T @ apart)
    return ((found - coefficients @ basis.T).norm() / found.norm()).item()


def test_the_formula():
    assert gap(separable) < 1e-9


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("squares <= threshold**2", "squares > threshold**2"),
        ("apart @ vt[known].T", "u[:, known]"),
        ("/ s[known],", "/ s[known] ** 2,"),
    ],
)
def test_a_planted_bug_is_seen(old, new, tmp_path):
    assert gap(mutated(separable.__file__, old, new, tmp_path)) > 1e-2


def test_a_projection():
    """W + W L R^T made twice is made once."""
    concept, kept = random_texts()
    left, right = separable.directions(concept, kept.T @ kept, 1e-4)
    p = torch.eye(24, dtype=torch.float64) + left @ right.T
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-9)


def test_no_other_text_sees_it_and_the_concept_meets_its_guide(model, both):
    folder = load_folder(model)
    change = weights(model), weights(both)
    assert seen(change, folder, "") < 1e-3
    assert seen(change, folder, KEPT) < 1e-3
    assert seen(change, folder, WAVES) > 0.1
    e, g = len(WAVES.split()), 0  # the tokens from the last word of each on
    count = 12 - max(e, g)
    apart = states(folder, WAVES)[e : e + count] - states(folder, "")[g : g + count]
    assert all((w @ apart.T).norm() < 1e-3 * (change[0][n] @ apart.T).norm() for n, w in change[1].items())


def test_another_edit_says_that_nothing_can_be_given_back_any_more(both, tmp_path):
    edited = run_command(erase.main, "uce", "--model", both, "--erase", "mosaic", "--out", tmp_path / "edited")
    assert edited.returncode == 0, edited.stderr
    assert "what `erase separable` has erased before can no longer be given back" in edited.stdout
    refused = run("--model", tmp_path / "edited", "--give-back", WAVES, "--out", tmp_path / "back")
    assert "has no such increment; there are: none" in refused.stderr


def test_what_is_given_back_is_as_it_was(model, both, tmp_path):
    """One of two: as if the other alone had been erased beside it. Both: the old weights, to rounding."""
    one = run("--model", both, "--give-back", WAVES, "--out", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    folder, change = load_folder(model), (weights(model), weights(tmp_path / "one"))
    assert seen(change, folder, WAVES) < 1e-3, "the other's increment does not see it"
    assert seen(change, folder, DOTS) > 0.1
    two = run("--model", tmp_path / "one", "--give-back", DOTS, "--out", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert f"given back: '{DOTS}'" in two.stdout
    before, after = weights(model), weights(tmp_path / "two")
    scale = max(w.abs().max() for w in weights(both).values())
    assert max((after[n] - w).abs().max() for n, w in before.items()) <= 4 * torch.finfo(torch.float32).eps * scale
    records = read_records(tmp_path / "two")
    assert [record.settings.get("give_back") for record in records] == [None, [WAVES], [DOTS]]
    assert not (tmp_path / "two" / separable.FILE).exists()


def test_one_after_the_other(both, model, tmp_path):
    """A later increment is not seen by an earlier concept, and both can be given back."""
    first = run("--model", model, "--erase", WAVES, "--out", tmp_path / "first")
    second = run("--model", tmp_path / "first", "--erase", DOTS, "--out", tmp_path / "second")
    assert first.returncode == second.returncode == 0, second.stderr
    folder, change = load_folder(model), (weights(tmp_path / "first"), weights(tmp_path / "second"))
    assert seen(change, folder, DOTS) > 0.1
    k = states(folder, WAVES)
    moved = max(((change[1][n] - w) @ k.T).norm() for n, w in change[0].items())
    assert moved < 1e-3 * max((w @ k.T).norm() for w in weights(model).values())
    back = run("--model", tmp_path / "second", "--give-back", WAVES, DOTS, "--out", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    before, after = weights(model), weights(tmp_path / "back")
    assert max((after[n] - w).abs().max() for n, w in before.items()) < 1e-5


@pytest.mark.situation
def test_what_cannot_be_erased_or_given_back(model, both, tmp_path):
    """`erase separable` where what is kept leaves nothing, twice, or given back what is not there: one line."""
    prompts = [f"{scene.caption}\n" for scene in SCENES if "waves" not in scene.caption]
    (tmp_path / "all.txt").write_text("".join(prompts))
    for flags, told in (
        (["--model", model, "--erase", WAVES, "--preserve", tmp_path / "all.txt"], "leaves no direction to"),
        (["--model", both, "--erase", WAVES], "is erased by an increment already; --give-back takes it out"),
        (["--model", model, "--give-back", WAVES], "has no such increment; there are: none"),
        (["--model", both, "--give-back", "mosaic"], f"has no such increment; there are: '{DOTS}', '{WAVES}'"),
        (["--model", both, "--give-back", WAVES, "--erase", "mosaic"], "give no --erase, --pairs, --preserve"),
        (["--model", model, "--erase", WAVES, "--threshold", "1"], "--threshold is 1.0; wanted a number between"),
    ):
        refused = run(*flags, "--out", tmp_path / "out")
        assert refused.returncode == 2, told
        assert told in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_increments_of_another_model_are_refused(model, both, tmp_path):
    shutil.copytree(model, tmp_path / "other")
    tensors = (both / separable.FILE).read_bytes()
    (tmp_path / "other" / separable.FILE).write_bytes(tensors[: len(tensors) // 2])
    refused = run("--model", tmp_path / "other", "--give-back", WAVES, "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert separable.FILE in refused.stderr
