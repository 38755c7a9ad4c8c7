"""`evaluate --suite ...` as a user runs it."""

import json
from functools import partial

import numpy as np
import pytest

from bilevel_fast import evaluate
from bilevel_fast.metrics.fid import Inception, resized
from measuring import FLAGGED, HARMLESS, doodle, ellipses, image_folder, inception_file, openai_archive, small_clip


@pytest.fixture
def run(command):
    return partial(command, evaluate.main)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = {"139": "a room", "285": "a bear", "632": "a bed"}
    captions = [{"image_id": int(n), "caption": text} for n, text in prompts.items()]
    (tmp_path / "captions_val2017.json").write_text(json.dumps({"annotations": captions}))
    (tmp_path / "i2p.csv").write_text("case_number,prompt\n" + "".join(f"{n},{text}\n" for n, text in prompts.items()))
    image_folder(tmp_path / "images", {n: doodle(k, 96) for k, n in enumerate(prompts)}, prompts)
    real = tmp_path / "val2017"
    real.mkdir()
    for n in range(3):
        doodle(n + 30, 120).resize((120, 90 + 10 * n)).save(real / f"{n:012}.png")
    return tmp_path


def test_coco(run, place):
    """FID on all 2048 features with a reference folder, then with the statistics that were kept; CLIP score; tables."""
    weights = inception_file(place / "pt_inception.pth")
    clip = openai_archive(place / "ViT-tiny-8.pt", small_clip())
    flags = ["--suite", "coco", "--images", "images", "--inception-weights", weights, "--device", "cpu"]
    code, text, error = run(
        *flags, "--prompts", "captions_val2017.json", "--clip-weights", clip, "--fid-draws", "2",
        "--reference", "val2017", "--statistics-out", "val2017.safetensors",
    )  # fmt: skip
    assert code == 0, error
    found = json.loads((place / "eval.json").read_text())["metrics"]
    inception = Inception.load(weights)

    def features(files, size=None):
        return np.stack([inception(resized(file, size)[None])[0].double().numpy() for file in sorted(files)])

    a, b = features((place / "images").glob("*.png")), features((place / "val2017").iterdir(), 96)
    X, Y = ((part - part.mean(0)) / np.sqrt(len(part) - 1) for part in (a, b))
    cross = np.linalg.svd(X @ Y.T, compute_uv=False).sum()  # the traces with as many rows as images, not as features
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (X**2).sum() + (Y**2).sum() - 2 * cross
    assert found["fid"]["value"] == pytest.approx(expected, rel=1e-4)
    assert found["fid"]["low"] < expected < found["fid"]["high"]
    assert found["clip"]["n"] == 3
    np.savez(place / "few.npz", mu=np.zeros(64), sigma=np.eye(64))
    code, _, error = run(*flags, "--reference", "few.npz", "--out", "few.json")
    assert (code, error) == (2, "error: statistics few.npz have 64 features; wanted 2048\n")
    assert f"| images | {found['fid']['value']:.2f} [" in text
    assert text.strip() == (place / "eval.md").read_text().strip()
    assert "note: FID of 3 images is too high" in text


def test_nsfw_of_two_prompt_sets(run, place):
    (place / "ring.txt").write_text("zero\none\n")
    image_folder(place / "ring", {"0": ellipses(FLAGGED), "1": ellipses(HARMLESS)}, {"0": "zero", "1": "one"})
    code, text, error = run(
        "--suite", "nsfw", "--images", "images", "ring", "--prompts", "i2p.csv", "ring.txt",
        "--reference", "images", "ring", "--out", "nsfw.json",
    )  # fmt: skip
    assert code == 0, error
    results = json.loads((place / "nsfw.json").read_text())["results"]
    assert results["ring"]["metrics"]["resilience"]["value"] == 50
    assert results["i2p"]["metrics"]["resilience"]["value"] == 100
    assert "| ring | 50.00 [" in text
    assert "| ring | FEET_EXPOSED | 1 | 1 | 0.00" in text


def test_json_and_what_is_not_measured(run, place):
    flags = ["--suite", "coco", "--images", "images", "--prompts", "captions_val2017.json"]
    code, text, _ = run(*flags, "--json")
    assert code == 0
    assert json.loads(text)["metrics"]["clip"]["not_measured"] == "give --clip-weights FILE"
    assert (
        "not measured: COCO FID: give --inception-weights FILE and --reference FOLDER"
        in (place / "eval.md").read_text()
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--suite coco", "--suite coco wants --images FOLDER"),
        ("--suite coco --images nowhere", "image folder nowhere does not exist"),
        ("--suite style --images images", "there is no prompt file"),
        ("--suite style --images images images --prompts i2p.csv", "2 image folders, 1 prompt files"),
        ("--suite coco --images images images", "--images has several"),
        ("--suite nsfw --images images --prompts i2p.csv --clip-weights x", "nsfw does not read --clip-weights"),
        ("--suite coco --images images --csd-weights x", "coco does not read --csd-weights"),
        ("--suite coco --images images --clip-model ViT-B-32", "its weights are missing"),
        ("--suite coco --images images --clip-weights nowhere.pt", "weights nowhere.pt do not exist"),
        ("--suite coco --images images --out i2p.csv", "i2p.csv exists already"),
        ("--suite coco --images images --out no/where.json", "the folder no does not exist"),
        ("--suite coco --images images --statistics-out s.npz", "--statistics-out wants"),
        ("--suite coco --images images --reference gone", "reference gone does not exist; wanted a folder of images"),
        ("--suite coco --images images --draws 10", "--draws of at least 100"),
        ("--suite coco --images images --models x", "--models is for --suite mini"),
        ("--suite style --images images --prompts i2p.csv --references x", "did you mean '--reference'"),
        ("--images images", "--suite mini does not read --images"),
        ("--suite nsfw --images images images --prompts i2p.csv i2p.csv", "two prompt files are named 'i2p'"),
    ],
)
def test_refusals(run, place, flags, message):
    code, text, error = run(*flags.split())
    assert (code, text) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert not (place / "eval.json").exists()
