"""`--scale.parameters fsdp`: none of the ranks has all weights, and the run is that of one rank that has."""

import pytest
import torch

import ranked
from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.registry import ERASERS
from bilevel_fast.scale.team import ALONE
from bilevel_fast.train import parse
from ranked import Crew


@pytest.mark.slow
def test_twenty_bilevel_steps_of_two_ranks_are_those_of_one_that_has_all_weights(tmp_path):
    """Erasers with sources and passes of their own, too; and a run that goes on whole, and in parts again."""
    jobs = ["fsdp", "fsdp:10:passed-on", *(case for case in ranked.IN_PARTS if case != "fsdp")]
    crew = Crew(2, "ranked", tmp_path, *jobs, log=tmp_path / "log", package="")
    flat = [case.removeprefix("fsdp-") for case in ranked.IN_PARTS if case != "fsdp"]
    assert crew.wait(240) == [0, 0], crew.said()
    ranked.work(ALONE, tmp_path, ["bilevel", "bilevel:15:passed-on", "fsdp:20:passed-on", *flat])
    assert_off_by_rounding(tmp_path / "bilevel-1", tmp_path / "fsdp-2", 20)
    assert_off_by_rounding(tmp_path / "bilevel-1", tmp_path / "passed-on", 20)
    for case in flat:
        assert_off_by_rounding(tmp_path / f"{case}-1", tmp_path / f"fsdp-{case}-2", 1)


def assert_off_by_rounding(alone, other, steps) -> None:
    weights, said = ranked.masters(alone), ranked.outcome(alone)["said"]
    assert torch.isfinite(weights).all()
    assert (ranked.masters(other) - weights).norm() <= 1e-6 * weights.norm(), other
    its = ranked.outcome(other)["said"]
    assert len(its) == len(said) == steps
    for row, its_row in zip(said, its, strict=True):
        assert its_row["lower/loss"] == pytest.approx(row["lower/loss"], rel=1e-6), other


@pytest.mark.situation
def test_what_wants_whole_weights_is_refused():
    """--scale.parameters fsdp with an eraser or a teacher that wants whole weights: one line names those that do not"""
    refused = {
        **dict.fromkeys(("uce", "time", "separable", "concept-prune", "p-esd"), "edits whole weights"),
        "selective-amnesia": "holds whole weights to what they were",
        "esd": "asks the student another number of times on each rank",
        "salun": "looks for its mask in the whole gradient",
    }
    assert refused == {name: kind.undivided for name, kind in ERASERS.items() if kind.undivided}
    for name, why in refused.items():
        with pytest.raises(UserError) as error:
            parse(["--scale.parameters", "fsdp", "--upper.eraser", name])
        assert str(error.value) == (
            f"--scale.parameters fsdp given with eraser {name!r}, which {why}; wanted --scale.parameters flat, or one "
            "of guidance, anchor-kd, concept-ablation, erasediff, forget-me-not"
        )
        parse(["--scale.parameters", "fsdp", "--upper.eraser", name, "--upper.every", "0"])
    with pytest.raises(UserError, match=r"^--fp8-teacher given with --scale.parameters fsdp, "):
        parse(["--scale.parameters", "fsdp", "--fp8-teacher"])
