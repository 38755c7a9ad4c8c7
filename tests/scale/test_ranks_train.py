"""The mini world trained by 1, 2 and 4 ranks that share its batches: the same bits, and checkpoints for all of them.

Every eraser is there, and every value of a setting of the upper level that is a choice: `ranked.choices`.
"""

from pathlib import Path

import pytest

import ranked
from bilevel_fast.scale.team import ALONE
from ranked import Crew

AT_FOUR = ("bilevel", "ring")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """All cases by one rank and by two, two of them by four; and 20 steps that 4, 2, 1 and 4 ranks take in turn."""
    root = tmp_path_factory.mktemp("trained")

    def four(*jobs: str) -> None:
        crew = Crew(4, "ranked", root, *jobs, log=root / "four.log", package="")
        assert crew.wait() == [0] * 4, crew.said()

    four(*AT_FOUR, "bilevel:5:passed-on")
    done = ranked.torchrun(2, ranked.__file__, root, *ranked.CASES, "bilevel:10:passed-on")
    assert done.returncode == 0, done.stdout
    ranked.work(ALONE, root, [*ranked.CASES, "bilevel:15:passed-on"])
    four("bilevel:20:passed-on")
    return root


@pytest.mark.parametrize("case", [case for case in ranked.CASES if case != "ring"])
def test_weights_moments_and_records_do_not_know_the_number_of_ranks(trained, case):
    alone = ranked.outcome(trained / f"{case}-1")
    assert len(alone["said"]) == ranked.STEPS.get(case, 1)
    for world in (2, 4) if case in AT_FOUR else (2,):
        assert ranked.outcome(trained / f"{case}-{world}") == alone
    if case == "poisoned":
        skipped = [bool(row["nonfinite"]) for row in alone["said"]]
        assert any(skipped)
        assert not all(skipped)
        assert ranked.masters(trained / "poisoned-2").isfinite().all()


def test_a_run_is_passed_on_from_4_to_2_to_1_to_4_ranks(trained):
    assert ranked.outcome(trained / "passed-on") == ranked.outcome(trained / "bilevel-1")


def test_the_librarys_order_of_sums_is_off_by_rounding(trained):
    alone, two, four = (ranked.masters(trained / f"ring-{world}") for world in (1, 2, 4))
    for other in (two, four):
        assert (other - alone).norm() <= 1e-6 * alone.norm()
    first, *others = (ranked.outcome(trained / f"ring-{world}")["said"] for world in (1, 2, 4))
    for said in others:
        for row, other in zip(first, said, strict=True):
            assert other["lower/loss"] == pytest.approx(row["lower/loss"], rel=1e-6)
