"""The suites on folders as `sample` leaves them: values by hand, pairing by id, what is refused."""

import json

import numpy as np
import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.metrics import suites
from bilevel_fast.metrics.images import Batching
from bilevel_fast.metrics.nudenet import LABELS
from bilevel_fast.metrics.scorers import Scorers
from bilevel_fast.metrics.table import labels, table
from measuring import (
    COVERED,
    FLAGGED,
    HARMLESS,
    csd_checkpoint,
    doodle,
    ellipses,
    image_folder,
    openai_archive,
    small_clip,
)

DRAWS = suites.Draws(images=200, fid=0)


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return Scorers.load(
        clip_weights=openai_archive(folder / "ViT-tiny-8.pt", small_clip()),
        csd_weights=csd_checkpoint(folder / "csd.pth"),
        nudenet=True,
        batching=Batching(3),
    )


def artist(folder, name, count, offset=0):
    """A prompt file, and folders of a model and of the distilled one; ids as in the file, 0, 1, ..."""
    prompts = {str(n): f"picture {n} by {name}" for n in range(count)}
    file = folder / f"test_{name}.csv"
    lines = [f"{n},{text},{100 + int(n)},{name}" for n, text in prompts.items()]
    file.write_text("\n".join(["case_number,prompt,evaluation_seed,artist", *lines]) + "\n")
    ours = {n: doodle(offset + int(n)) for n in prompts}
    theirs = {n: doodle(offset + 50 + int(n)) for n in reversed(prompts)}  # in another order
    folders = [
        image_folder(folder / f"{kind}-{name}", images, prompts) for kind, images in (("o", ours), ("d", theirs))
    ]
    return file, *folders


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    folder = tmp_path_factory.mktemp("style")
    return artist(folder, "Monet", 5), artist(folder, "Dali", 3, offset=20)


def by_hand(scorers, sets, share):
    """Means over artists of a function of a prompt, its image and its reference, one at a time."""
    means = []
    for file, ours, theirs in sets:
        rows = [line.split(",") for line in file.read_text().splitlines()[1:]]
        values = [share(text, ours / f"{n}.png", theirs / f"{n}.png") for n, text, *_ in rows]
        means.append(np.mean(values))
    return np.mean(means)


def test_style_by_hand(scorers, style):
    files, ours, theirs = zip(*style, strict=True)
    found = suites.style(ours, theirs, files, scorers, DRAWS)

    def clip(text, file):
        return 100 * (scorers.clip.texts([text]) @ scorers.clip.images([file]).T).item()

    def csd(_, a, b):
        return 100 * (scorers.csd.images([a]) @ scorers.csd.images([b]).T).item()

    expected = {
        "clip": by_hand(scorers, style, lambda text, a, _: clip(text, a)),
        "cp": by_hand(scorers, style, lambda text, a, b: 100 * (clip(text, a) < clip(text, b))),
        "csd": by_hand(scorers, style, csd),
    }
    assert 0 < expected["cp"] < 100
    for name, value in expected.items():
        entry = found["metrics"][name]
        assert entry["value"] == pytest.approx(value, abs=1e-3), name
        assert entry["low"] < value < entry["high"], name
        assert entry["n"] == 8
        assert np.mean([found["by_artist"][a][name] for a in ("Monet", "Dali")]) == pytest.approx(value, abs=1e-3)
    assert [part["count"] for part in found["sets"]] == [5, 3]
    assert json.loads(json.dumps(found)) == found


def test_the_distilled_model_against_itself(scorers, style):
    files, _, distilled = zip(*style, strict=True)
    metrics = suites.style(distilled, distilled, files, scorers, DRAWS)["metrics"]
    assert metrics["cp"]["value"] == 0
    assert metrics["csd"]["value"] == pytest.approx(100, abs=1e-4)
    assert metrics["cp"]["high"] == pytest.approx(100 * 3.8415 / (8 + 3.8415), abs=1e-2)  # 8 images are few


def test_what_has_no_weights_is_not_measured(scorers, style):
    (file, ours, theirs), _ = style
    metrics = suites.style(ours, theirs, file, Scorers(), DRAWS)["metrics"]
    assert {name: entry["not_measured"] for name, entry in metrics.items()} == {
        "clip": "give --clip-weights FILE",
        "cp": "give --clip-weights FILE",
        "csd": "give --csd-weights FILE",
    }
    metrics = suites.style(ours, None, file, scorers, DRAWS)["metrics"]
    assert metrics["clip"]["value"] is not None
    assert metrics["cp"] == metrics["csd"] == {"value": None, "not_measured": "give --reference FOLDER"}
    assert suites.style(ours, None, file, Scorers(), DRAWS)["metrics"]["csd"] == {
        "value": None,
        "not_measured": "give --csd-weights FILE and --reference FOLDER",
    }
    assert suites.nsfw(ours, None, file, Scorers(), DRAWS)["metrics"]["resilience"]["value"] is None
    metrics = suites.coco(ours, None, file, Scorers(), DRAWS)["metrics"]
    assert metrics["fid"]["not_measured"] == "give --inception-weights FILE and --reference FOLDER"
    assert metrics["clip"]["not_measured"] == "give --clip-weights FILE"
    metrics = suites.coco(ours, theirs, None, Scorers(), DRAWS)["metrics"]
    assert metrics["fid"]["not_measured"] == "give --inception-weights FILE"
    assert metrics["clip"]["not_measured"] == "give --clip-weights FILE and --prompts FILE"


def rewritten(folder, change):
    index = folder / "index.jsonl"
    lines = [change(json.loads(line)) for line in index.read_text().splitlines()]
    index.write_text("".join(json.dumps(line) + "\n" for line in lines if line))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: None if e["id"] in ("1", "3") else e, "lacks 2 of 5 wanted images: 1, 3"),
        (lambda e: e | {"prompt": "a house"} if e["id"] == "2" else e, "image '2' was drawn from 'a house'"),
        (lambda e: e | {"seed": 4} if e["id"] == "2" else e, "id '2' was drawn with seeds 4 and 0"),
        (lambda e: e | {"file": "../2.png"} if e["id"] == "2" else e, "file is '../2.png'"),
    ],
    ids=["missing", "other prompt", "other seed", "outside"],
)
def test_images_that_do_not_pair(tmp_path, scorers, change, message):
    file, ours, theirs = artist(tmp_path, "Monet", 5)
    rewritten(ours, change)
    with pytest.raises(UserError) as refusal:
        suites.style(ours, theirs, file, scorers, DRAWS)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_folders_and_files_are_as_many(scorers, style):
    (file, ours, theirs), (other, *_) = style
    with pytest.raises(UserError, match="1 image folders, 2 prompt files and 1 references"):
        suites.style(ours, theirs, [file, other], scorers, DRAWS)


def test_notes_say_what_a_reader_should_know(tmp_path, scorers):
    file, ours, theirs = artist(tmp_path, "Monet", 4)
    file.write_text("\n".join(file.read_text().splitlines()[:4]) + "\n")
    settings = json.loads((theirs / "settings.json").read_text())
    settings["recipe"]["steps"] = 50
    (theirs / "settings.json").write_text(json.dumps(settings))
    found = suites.style(ours, theirs, file, scorers, DRAWS)
    notes = " | ".join(found["sets"][0]["notes"])
    assert "1 images of" in notes
    assert "steps is 25 and, of the reference, 50" in notes
    assert "3 images of" in notes
    assert "not drawn with the evaluation_seed of their prompt" in notes
    assert found["metrics"]["clip"]["n"] == 3


@pytest.fixture(scope="module")
def nudity(tmp_path_factory):
    """Prompts in a file, images of a model and of the dense one: 1 of 4 flagged, and 3 of 4."""
    folder = tmp_path_factory.mktemp("nudity")
    file = folder / "ring.txt"
    file.write_text("zero\none\ntwo\nthree\n")
    prompts = {str(n): text for n, text in enumerate(["zero", "one", "two", "three"])}
    flagged, faint, clean = ellipses(FLAGGED), ellipses(FLAGGED).resize((200, 200)), ellipses(HARMLESS)
    covered = ellipses(COVERED, (49, 126, 128))
    ours = {"0": clean, "1": covered, "2": faint, "3": clean}
    theirs = {"3": flagged, "1": clean, "0": flagged, "2": faint}
    return file, image_folder(folder / "ours", ours, prompts), image_folder(folder / "theirs", theirs, prompts)


def test_nsfw(scorers, nudity):
    file, ours, theirs = nudity
    found = suites.nsfw(ours, theirs, file, scorers, DRAWS)
    assert found["flagged"] == ["2"]
    assert found["metrics"]["resilience"]["value"] == 75
    assert found["metrics"]["cleared"]["value"] == pytest.approx(100 * 2 / 3), "of three that the reference shows"
    assert suites.nsfw(theirs, theirs, file, scorers, DRAWS)["metrics"]["cleared"]["value"] == 0
    assert {label: n for label, n in found["counts"].items() if n} == {"FEET_EXPOSED": 1}
    assert {label: n for label, n in found["reference_counts"].items() if n} == {
        "FEET_EXPOSED": 3,
        "BUTTOCKS_EXPOSED": 2,
    }
    assert found["metrics"]["decrease/all"]["value"] == pytest.approx(80)
    assert found["metrics"]["decrease/FEET_EXPOSED"]["value"] == pytest.approx(100 * 2 / 3)
    assert found["metrics"]["decrease/BUTTOCKS_EXPOSED"]["value"] == 100
    assert found["metrics"]["decrease/ANUS_EXPOSED"]["not_measured"] == "the reference has none"
    text = labels({"ring": found})
    assert "| ring | FEET_EXPOSED | 3 | 1 | 66.67 [" in text
    assert text.count("\n") == 1 + len(LABELS)


def test_images_of_a_resumed_run_are_detected_too(tmp_path, scorers):
    """The flagged image was there before the rest was drawn."""
    prompts = {"0": "zero", "1": "one"}
    (tmp_path / "p.txt").write_text("zero\none\n")
    folder = image_folder(tmp_path / "x", {"0": ellipses(FLAGGED)}, prompts)
    with pytest.raises(UserError, match="lacks 1 of 2"):
        suites.nsfw(folder, None, tmp_path / "p.txt", scorers, DRAWS)
    ellipses(HARMLESS).save(folder / "1.png")
    with (folder / "index.jsonl").open("a") as index:
        index.write(json.dumps({"id": "1", "prompt": "one", "seed": 0, "file": "1.png"}) + "\n" + '{"id": "2", "pro')
    found = suites.nsfw(folder, None, tmp_path / "p.txt", scorers, DRAWS)
    assert found["flagged"] == ["0"]
    assert found["metrics"]["resilience"]["value"] == 50
    assert found["metrics"]["decrease/all"]["not_measured"] == "give --reference FOLDER"


def test_the_table_has_the_papers_columns(scorers, style, nudity):
    (file, ours, theirs), _ = style
    judged, distilled = (suites.style(folder, theirs, file, scorers, DRAWS) for folder in (ours, theirs))
    captions = suites.coco(ours, None, file, scorers, DRAWS)
    rows = {"bilevel|x": {"style": judged, "coco": captions}, "distilled": {"style": distilled}}
    head, _, first, second, _, *missing = table(rows).splitlines()
    assert head == "| | CLIP score (down) | CP score (up) | CSD (down) | COCO FID (down) | COCO CLIP score (up) |"
    clip = rows["bilevel|x"]["style"]["metrics"]["clip"]
    assert first.startswith(f"| bilevel\\|x | {clip['value']:.2f} [{clip['low']:.2f}, {clip['high']:.2f}] |")
    assert second.split(" | ")[2].startswith("0.00 [")
    assert second.endswith("| 100.00 [100.00, 100.00] | not measured | not measured |")
    assert missing == [
        "not measured: COCO FID: give --inception-weights FILE and --reference FOLDER",
        "not measured: COCO FID: run --suite coco",
        "not measured: COCO CLIP score: run --suite coco",
    ]


def test_a_seed_of_the_bootstrap(scorers, style):
    (file, ours, theirs), _ = style
    entries = [
        suites.style(ours, theirs, file, scorers, suites.Draws(200, 0, seed))["metrics"]["csd"] for seed in (1, 1, 2)
    ]
    assert entries[0] == entries[1]
    assert entries[0]["low"] != entries[2]["low"]
    assert entries[0]["value"] == entries[2]["value"]


def test_a_broken_picture_is_named(tmp_path, scorers):
    file, ours, theirs = artist(tmp_path, "Monet", 3)
    (ours / "1.png").write_bytes((ours / "1.png").read_bytes()[:200])
    for suite in (suites.style, suites.nsfw):
        with pytest.raises(UserError, match=r"1\.png is no whole picture"):
            suite(ours, theirs, file, scorers, DRAWS)
    assert torch.is_grad_enabled()
