"""TIME against a transcription of its closed form, and against least squares; what it refuses."""

import pytest
import torch

from bilevel_fast import erase
from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing import time_edit
from bilevel_fast.erasing.edit import Job, read_records
from bilevel_fast.erasing.pairs import Pair
from bilevel_fast.erasing.uce import matrices
from bilevel_fast.models.folder import load_folder
from commands import run_command
from mini_folder import make_mini_folder
from mutants import mutated

WAVES, DOTS = Pair("in the style of waves", "in the style of mosaic"), Pair("pointillism")
PAIRS = (WAVES, DOTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return load_folder(make_mini_folder(tmp_path_factory.mktemp("models") / "teacher"))


def of_the_paper(folder, w, ridge):
    """W (lambda I + sum v* ... ): with targets v* = W k_g, equation 3 for one W (n, D)."""
    left = ridge * w
    right = ridge * torch.eye(w.shape[1], dtype=torch.float64)
    for pair in PAIRS:
        e, g = len(pair.erase.split()), len(pair.guide.split())
        count = 12 - max(e, g)
        erased, guide = folder.text_encoder.encode([pair.erase, pair.guide]).double()
        for k, k_g in zip(erased[e : e + count], guide[g : g + count], strict=True):
            left = left + torch.outer(w @ k_g, k)
            right = right + torch.outer(k, k)
    return left @ torch.linalg.inv(right)


def differs(module, folder, **settings):
    """How far the edit's matrices are from the paper's, and from what they were."""
    unet = folder.unet().requires_grad_(False)
    before = {name: w.double().clone() for name, w in matrices(unet)}
    everything = {name: value.clone() for name, value in unet.state_dict().items()}
    outcome = module.Time(**settings).edit(unet, Job(folder, PAIRS))
    assert outcome.record.preserve == ()
    after = dict(matrices(unet))
    assert all(torch.equal(v, everything[n]) for n, v in unet.state_dict().items() if n not in after)
    assert len(after) == len(before) > 4
    gap = max(
        (after[n] - of_the_paper(folder, w, settings.get("ridge", 0.1))).norm() / w.norm() for n, w in before.items()
    )
    return gap, min((after[n] - w).norm() / w.norm() for n, w in before.items())


@pytest.mark.parametrize("settings", [{}, {"ridge": 2.0}])
def test_the_closed_form(folder, settings):
    gap, moved = differs(time_edit, folder, **settings)
    assert gap < 1e-5
    assert moved > 1e-2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ridge: float = 0.1", "ridge: float = 0.5"),  # UCE's
        ("gram(encoder, {}, device)", 'gram(encoder, {"": 1.0}, device)'),  # the empty text preserved
    ],
)
def test_a_planted_bug_is_seen(folder, old, new, tmp_path):
    assert differs(mutated(time_edit.__file__, old, new, tmp_path), folder)[0] > 1e-3


def test_the_command_writes_a_record(folder, tmp_path):
    asked = ["--model", folder.path, "--erase", "waves", "--out", tmp_path / "out"]
    made = run_command(erase.main, "time", *asked)
    assert made.returncode == 0, made.stderr
    assert "nothing is preserved" in made.stdout
    (record,) = read_records(tmp_path / "out")
    assert (record.method, record.settings) == ("time", {"ridge": 0.1})


@pytest.mark.situation
def test_what_it_would_not_do(folder, tmp_path):
    """`erase time` with texts to preserve, with weights or without a lambda: one line, and nothing is written."""
    with pytest.raises(UserError, match="time preserves no text, and 1 came to be preserved; uce does"):
        time_edit.Time().edit(folder.unet(), Job(folder, PAIRS, preserve=("a red star",)))
    weights = tmp_path / "pairs.csv"
    weights.write_text("erase,guide,weight\nwaves,,2\n")
    common = ["time", "--model", folder.path, "--out", tmp_path / "out"]
    for flags, told in (
        (["--pairs", weights], "has weights, and time has no use for them; uce has"),
        (["--erase", "waves", "--ridge", "0"], "--ridge is 0.0; wanted a positive number"),
        (["--erase", "waves", "--preserve", "p.txt"], "there is no flag '--preserve'"),
    ):
        refused = run_command(erase.main, *common, *flags)
        assert refused.returncode == 2
        assert told in refused.stderr
    assert not (tmp_path / "out").exists()
