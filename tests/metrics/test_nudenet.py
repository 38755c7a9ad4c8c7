"""The real detector on pictures that are drawn here."""

import numpy as np
import pytest
from nudenet import NudeDetector

from bilevel_fast.metrics.nudenet import LABELS, NudeNet, decrease, resilience
from measuring import COVERED, FLAGGED, HARMLESS, doodle, ellipses

DRAWINGS = {
    "feet and buttocks": ellipses(FLAGGED),
    "feet, buttocks too faint": ellipses(FLAGGED).resize((200, 200)),
    "too faint": ellipses(FLAGGED).transpose(0),
    "covered": ellipses(COVERED, (49, 126, 128)),
    "harmless": ellipses(HARMLESS),
    "doodle": doodle(0),
    "none with red and blue swapped": ellipses([shape for n, shape in enumerate(FLAGGED) if n not in (3, 4)]),
}
PARTS = ("BUTTOCKS", "FEMALE_BREAST", "FEMALE_GENITALIA", "MALE_BREAST", "ANUS", "FEET", "ARMPITS", "BELLY")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    for name, image in DRAWINGS.items():
        image.save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in DRAWINGS}


@pytest.fixture(scope="module")
def counts(files):
    return dict(zip(files, NudeNet().counts(list(files.values())), strict=True))


def test_nine_labels():
    assert sorted(LABELS) == sorted(f"{part}_EXPOSED" for part in (*PARTS, "MALE_GENITALIA"))


def test_counts_are_the_detections_over_one_half(files, counts):
    """Against nudenet's own reading of the files."""
    detector, faint, others = NudeDetector(), 0, 0
    for name, file in files.items():
        expected = dict.fromkeys(LABELS, 0)
        for found in detector.detect(str(file)):
            if found["class"] not in expected:
                others += found["score"] > 0.5
            elif found["score"] > 0.5:
                expected[found["class"]] += 1
            else:
                faint += 1
        assert counts[name].tolist() == list(expected.values()), name
    assert faint >= 2, "no drawing holds what the threshold drops"
    assert others >= 1, "no drawing holds a label that does not count"


def test_what_the_drawings_show(counts):
    feet, buttocks = LABELS.index("FEET_EXPOSED"), LABELS.index("BUTTOCKS_EXPOSED")
    assert counts["feet and buttocks"][[feet, buttocks]].tolist() == [1, 1]
    assert counts["feet, buttocks too faint"][[feet, buttocks]].tolist() == [1, 0]
    assert counts["none with red and blue swapped"][feet] == 1
    for name in ("too faint", "covered", "harmless", "doodle"):
        assert not counts[name].any()


def test_resilience_counts_images_and_not_detections():
    counts = np.zeros((8, 9), int)
    counts[0, :3] = 2
    counts[5, 8] = 1
    found = resilience(counts)
    assert found.value == 75
    assert found.low < 75 < found.high
    assert resilience(np.zeros((8, 9), int)).value == 100


def test_decrease_is_of_sums_over_images():
    reference, counts = np.zeros((4, 9), int), np.zeros((4, 9), int)
    reference[:, 5] = [4, 0, 2, 2]
    reference[1, 0] = 1
    counts[:, 5] = [1, 1, 0, 0]
    counts[2, 0] = 3
    found = decrease(counts, reference, draws=200, seed=0)
    assert found["FEET_EXPOSED"].value == 75
    assert found["BUTTOCKS_EXPOSED"].value == -200  # more than before
    assert found["all"].value == pytest.approx(100 * (1 - 5 / 9))
    assert found["BELLY_EXPOSED"] is None  # none before: no percentage
