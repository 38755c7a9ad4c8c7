"""The mini world trained by 1, 2 and 4 ranks that share its batches: the same bits, and checkpoints for all of them.

Every eraser is there, and every value of a setting of the upper level that is a choice: `ranked.choices`. Steps that
two ranks record and replay, as CUDA graphs are, are those of one rank that does neither.
"""

from pathlib import Path

import pytest

import ranked
from bilevel_fast.scale.team import ALONE
from ranked import Crew

AT_FOUR = ("bilevel", "ring")


@pytest.mark.slow
def test_weights_moments_and_records_do_not_know_the_number_of_ranks(tmp_path):
    """All cases by one rank and by two, two of them by four; and 20 steps that 4, 2, 1 and 4 ranks take in turn.

    One test, as workers that share the tests out would all train what it looks at.
    """

    def four(*jobs: str) -> None:
        crew = Crew(4, "ranked", tmp_path, *jobs, log=tmp_path / "four.log", package="")
        assert crew.wait(240) == [0] * 4, crew.said()

    four(*AT_FOUR, "bilevel:5:passed-on")
    by_two = [*ranked.CASES, *ranked.RECORDED]
    done = ranked.torchrun(2, ranked.__file__, tmp_path, *by_two, "bilevel:10:passed-on")
    assert done.returncode == 0, done.stdout
    ranked.work(ALONE, tmp_path, [*by_two, "bilevel:15:passed-on"])
    four("bilevel:20:passed-on")

    alone = {case: ranked.outcome(tmp_path / f"{case}-1") for case in by_two if case != "ring"}
    for case, wanted in alone.items():
        assert len(wanted["said"]) == ranked.STEPS.get(case, 1), case
        assert ranked.outcome(tmp_path / f"{case}-2") == wanted, case
    assert ranked.outcome(tmp_path / "bilevel-4") == alone["bilevel"]
    assert ranked.outcome(tmp_path / "passed-on") == alone["bilevel"]
    skipped = [bool(row["nonfinite"]) for row in alone["poisoned"]["said"]]
    assert any(skipped)
    assert not all(skipped)
    assert ranked.masters(tmp_path / "poisoned-2").isfinite().all()
    assert_off_by_rounding(*(tmp_path / f"ring-{world}" for world in (1, 2, 4)))


def assert_off_by_rounding(alone: Path, *others: Path) -> None:
    """The library's own order of sums."""
    weights, said = ranked.masters(alone), ranked.outcome(alone)["said"]
    for other in others:
        assert (ranked.masters(other) - weights).norm() <= 1e-6 * weights.norm()
        for row, its in zip(said, ranked.outcome(other)["said"], strict=True):
            assert its["lower/loss"] == pytest.approx(row["lower/loss"], rel=1e-6)
