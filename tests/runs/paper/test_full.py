"""`--scale full` on a small model in the layout of Stable Diffusion 2.1, prompts and weights in the usual files."""

import json

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")
from bilevel_fast.erasing.edit import RECORD
from bilevel_fast.erasing.pairs import Pair
from bilevel_fast.reproduce import main
from bilevel_fast.runs.paper.benches import named
from commands import run_command
from measuring import openai_archive, small_clip
from sd_world import make_sd_world

STEPS = [
    *("--run.lower.steps=4", "--run.lower.batch=2", "--run.upper.every=2", "--run.upper.batch=2"),
    *("--run.upper.controller.horizon=10", "--rows.concept-prune.steps=2", "--rows.esd.sample.steps=3"),
    *("--full.steps=2", "--full.batch=2", "--seeds=0", "--rows.sld.strength=max"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = make_sd_world(tmp_path_factory.mktemp("full"))
    styles = "case_number,prompt,evaluation_seed,artist\n7,a red star in the style of monet,3,monet\n"
    (root / "monet.csv").write_text(styles + "8,a blue house in the style of monet,4,monet\n")
    (root / "others.csv").write_text("image_id,prompt\n11,a photo of a house\n12,a blue star\n")
    (root / "searched.txt").write_text("star house star\n")
    (root / "artists.txt").write_text("in the style of van gogh\n")
    openai_archive(root / "clip.pt", small_clip())
    return root


def reproduce(world, experiment, *flags):
    folders = ["--run.teacher", world / "teacher", "--run.student", world / "pruned", "--run.data", world / "cache"]
    given = ["--run.concepts", world / "bank", "--full.phrase", "in the style of monet"]
    given += ["--full.styles", world / "monet.csv", "--full.coco", world / "others.csv"]
    given += ["--full.clip-weights", world / "clip.pt", "--full.preserve", world / "artists.txt"]
    given += ["--full.ring-a-bell", world / "searched.txt", "--out", world / "out", "--scale", "full"]
    return run_command(main, experiment, *folders, *given, *STEPS, *flags)


@pytest.fixture(scope="module")
def made(world):
    """Table 1, whose models the other experiments find."""
    result = reproduce(world, "table1")
    assert result.returncode == 0, result.stderr
    return result


def test_table1(world, made):
    result = made
    rows = {row["row"]: row["numbers"] for row in map(json.loads, (world / "out/table1/rows.jsonl").open())}
    assert list(rows) == ["teacher", "distilled", "esd", "uce", "concept-prune", "bilevel", "bilevel-uce", "sld"]
    for name, numbers in rows.items():
        assert {key for key, value in numbers.items() if value is None} == {"csd", "fid"}, name
        assert -100 <= numbers["style_clip"] <= 100
        assert -100 <= numbers["clip"] <= 100
    assert rows["distilled"]["cp"] == 0, "the reference itself"
    assert rows["uce"] != rows["distilled"]
    record = json.loads((world / "out/seed-0/in-the-style-of-monet/uce" / RECORD).read_text())
    assert [edit["pairs"] for edit in record["edits"]] == [[{"erase": "monet", "guide": "art", "weight": 1.0}]]
    assert "give --csd-weights FILE" in result.stderr
    assert "--inception-weights FILE" in result.stderr or "--reference" in result.stderr
    assert result.stdout.count("not measured") == 2 * len(rows)
    place = world / "out/seed-0/in-the-style-of-monet/samples"
    assert sorted(p.name for p in (place / "esd/monet").glob("*.png")) == ["7.png", "8.png"]
    assert (world / "out/table1/grid.png").is_file()


def test_table2_by_nudenet(world, made):
    """The models are there already; what was given is measured, what was not is said. Shares are of the distilled
    student's flagged images, of which this one has none."""
    result = reproduce(world, "table2")
    assert result.returncode == 0, result.stderr
    assert "making" not in result.stderr
    assert "not measured: give --full.mma" in result.stderr
    rows = [row["numbers"] for row in map(json.loads, (world / "out/table2/rows.jsonl").open())]
    assert [row["mma"] for row in rows] == [None] * 8
    assert [row["ring_a_bell"] for row in rows] == [None] * 8
    assert "not measured: cleared: the reference has none" in result.stderr


def test_uce_takes_the_names_alone():
    """As the paper: no phrase, no sentences, another guide than the empty one."""
    assert named(["by Claude Monet", "in the style of van Gogh"], "things") == (
        Pair("Claude Monet", "art"),
        Pair("van Gogh", "art"),
    )
    assert named(["naked"], "people") == (Pair("naked", "person"),)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--full.phrase", "by monet", "by manet"), "2 --full.phrase came for 1 --run.concepts; wanted one each"),
        (("--full.styles", "nowhere.csv"), "--full.styles nowhere.csv does not exist"),
        (("--rows.sld.strength", "weak"), "--rows.sld.strength weak begins after 15 steps, and there are 2: nothing"),
        (("--full.clip-weights", "nowhere.pt"), "--full.clip-weights nowhere.pt does not exist"),
    ],
)
def test_bad_input_is_one_line(world, tmp_path, flags, says):
    result = reproduce(world, "table2", *flags, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr
