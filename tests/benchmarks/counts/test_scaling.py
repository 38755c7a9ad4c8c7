"""`python -m benchmarks.counts.scaling`: its bytes and times by hand."""

import json

import pytest

from benchmarks import ROOT
from benchmarks.counts import scaling
from bilevel_fast.scale.rows import BUCKET, ROW


def test_seconds_by_hand():
    """A buffer of one bucket: what goes past a network card, and what within a machine, whichever takes longer."""
    size = 2 * BUCKET * ROW
    card = 100e9 / 8 * scaling.OF_A_CARD
    assert scaling.seconds(size, 1, 1, None, True) == 0
    assert scaling.seconds(size, 1, 8, None, True) == pytest.approx(size * 7 / 8 / scaling.NVLINK + scaling.A_BUCKET)
    assert scaling.seconds(size, 8, 1, 100, True) == pytest.approx(size * 7 / 8 / card + scaling.A_BUCKET)
    assert scaling.seconds(size, 8, 1, 100, False) == scaling.seconds(size, 8, 1, 100, True)
    assert scaling.seconds(size, 8, 8, 100, True) == pytest.approx(size * 56 / 64 / card + scaling.A_BUCKET)
    assert scaling.seconds(size, 8, 8, 100, False) == pytest.approx(size * 63 / 64 / 8 / card + scaling.A_BUCKET)


def test_the_command(command):
    code, out, err = command(scaling.main, "--json")
    assert (code, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    assert {row["gpus"] for row in found} == {8, 64}
    assert {row["gbit_per_s"] for row in found} == {None, 100, 400}
    for row in found:
        assert row["projection"] is True
        assert 0 < row["efficiency"][0] <= row["efficiency"][1] <= 1
    code, out, _ = command(scaling.main)
    assert out.startswith("projection: SD 2.1 0.80")
    assert len(out.splitlines()) == 2 + len(found)
    assert command(scaling.main, "--batch", 0)[0] == 2
    code, _, err = command(scaling.main, "--unet", "sdxl", "--structure", "0.55")
    assert code == 2
    assert "--structure is '0.55', wanted one of dense, 0.80, ssd-1b, koala-700m for sdxl" in err


def test_efficiency_by_hand():
    """Eight cards at 100 Gb/s: backward hides a part of the sums, the teacher of the weights."""
    (row, *_) = [row for row in scaling.rows(scaling.Settings()) if (row["machines"], row["gbit_per_s"]) == (8, 100)]
    step, sums, weights = row["step_ms"][0], row["reduce_ms"], row["publish_ms"]
    left = sums - step * 1.6 / 3.4 + weights - step / 3.4
    assert row["efficiency"][0] == pytest.approx(step / (step + left), abs=2e-3)


def test_the_tables_in_the_docs_are_what_the_command_says(command):
    text = (ROOT / "docs" / "scale.md").read_text()
    for flags in (("--batch", 8), ("--batch", 64), ("--unet", "sdxl", "--batch", 4)):
        assert f"```\n{command(scaling.main, *flags)[1]}```\n" in text
