"""Tables, pictures, and the report of a run; tests/benchmarks/pages/test_in_a_browser.py opens it."""

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.tables import table
from bilevel_fast.erasing.settings import ControllerSettings
from bilevel_fast.runs import page, repeat, sessions
from bilevel_fast.runs.config import PRESETS, TrainConfig, preset
from bilevel_fast.runs.page import charts, document
from bilevel_fast.runs.page.training import report
from bilevel_fast.sampling.pictures import picture, to_pixels
from bilevel_fast.train import parse
from finished_run import HOSTILE, finished_run

TEXT = 12  # tokens of the mini world's captions
STYLE = (Path(page.__file__).parent / "style.css").read_text()


class Read(HTMLParser):
    """Elements with their attributes, and the text of a page."""

    VOID = ("meta", "link", "img", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", list[str]()
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def attributes(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def test_picture_shows_each_image_at_its_place():
    red, blue = torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), -1.0)
    red[0], blue[2] = 1.0, 1.0
    sheet = picture({"a": torch.stack([red, blue]), "b": torch.stack([blue, red])}, ["one", "two words"], zoom=8)
    tiles = [color for _, color in sheet.getcolors(1 << 20) if color in ((255, 0, 0), (0, 0, 255))]
    assert len(tiles) == 2
    pixels = torch.tensor(sheet.get_flattened_data()).reshape(sheet.height, sheet.width, 3)
    is_red = (pixels == torch.tensor([255, 0, 0])).all(-1)
    assert int(is_red.sum()) == 2 * 32 * 32
    ys, xs = is_red.nonzero(as_tuple=True)
    assert xs[ys.argmin()] < xs[ys.argmax()], "red: first row left, second row right"


def test_pixels_are_rounded_and_clamped():
    values = torch.tensor([-2.0, -1.0, -0.001, 0.999, 1.0, 3.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_pixels(values)[0, 0, :, 0].tolist() == [0, 0, 127, 255, 255, 255]


def test_table_is_aligned():
    text = table({"teacher": {"fid": 1.25, "object": 0.5}, "a/long/path/to/a/student": {"fid": 10, "object": 1}})
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["teacher", "1.250", "0.500"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose prompts, names and paths are hostile."""
    out = tmp_path_factory.mktemp("runs") / "it's <b>bold</b>"
    config = replace(preset("mini"), out=out, teacher=Path(HOSTILE.replace("/", "\\")), seed=3)
    return finished_run(out, config, [f"{HOSTILE} in the style of pointillism", "a red star"])


@pytest.mark.situation
def test_a_report_shows_what_users_typed(run):
    """A prompt, a name or a path that is HTML: the report of the run shows it as text; nothing of it runs or loads."""
    text = report(run, TEXT)
    found = Read(text)
    assert not found.attributes("script")
    assert not found.attributes("b"), "the name of the folder"
    assert HOSTILE in found.text
    assert f"{HOSTILE} in the style of pointillism, drawn by the dense teacher" in [
        image["alt"] for image in found.attributes("img")
    ]
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]


def test_a_report_is_one_small_file_that_asks_for_nothing(run):
    text = report(run, TEXT)
    found = Read(text)
    assert len(text) < 2e6
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in found.attributes("img"))
    assert not re.search(r"@import|url\(", text)
    assert [link["href"] for link in found.attributes("link")] == ["data:,"]
    assert not [a["href"] for a in found.attributes("a") if re.match(r"[a-z]+:|//", a["href"] or "")]
    (policy,) = [meta["content"] for meta in found.attributes("meta") if "http-equiv" in meta]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "{" not in found.text.replace(STYLE, ""), "raw JSON"


def test_a_report_says_what_the_files_say(run):
    text = Read(report(run, TEXT)).text
    for said in (
        "120 lower steps that distil, 30 upper steps that suppress “pointillism”",
        "0 %0 to 10",  # 0 of 36, by Wilson's score: 1.96² / (36 + 1.96²) is 9.6 %
        "↓ of 36 images",
        "99.4 %97 to 100",
        "teacher 3; lower is better",
        "mid_block.attentions.0",
        "dropped",
        "1.55 GiB",
        "2 of lower/output",  # what was not finite
        "was stopped",  # the first session has no end
        "2026-11-30 15:57:01 UTC",
        "0.1.0, commit d443560",
        "seed30",
    ):
        assert said in text, said
    assert "--seed 3" in text
    assert "sessions.jsonl" in text


def test_a_report_of_an_earlier_release_and_one_without_images(run, tmp_path):
    old = shutil.copytree(run, tmp_path / "old")
    for name in ("sessions.jsonl", "stats-distilled.jsonl", "samples/index.json"):
        (old / name).unlink()
    text = report(old, TEXT)
    assert "Environment" not in text
    assert "Samples, one row for each of teacher, distilled, student" in text
    shutil.rmtree(old / "samples")
    summary = json.loads((old / "summary.json").read_text())
    (old / "summary.json").write_text(json.dumps({**summary, "quality": None}))
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({**config, "data": "cache/", "concepts": ["bank/<i>"], "gone": 1}))
    found = Read(report(old, TEXT))
    assert not found.attributes("img")
    assert "Quality" not in found.text
    assert "that suppress “bank/<i>”" in found.text
    assert "--concepts 'bank/<i>'" in found.text
    assert "--gone" not in found.text


def test_samples_that_lie_elsewhere_are_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    index = {"models": ["teacher"], "samples": [{"prompt": "a", "files": ["../config.json"]}]}
    (copy / "samples" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json does not hold what a list of samples holds"):
        report(copy, TEXT)


def test_marks_of_an_axis_are_round():
    assert charts.ticks(0, 1920) == [0, 500, 1000, 1500]
    assert charts.ticks(0.09, 0.16) == [0.1, 0.12, 0.14, 0.16]
    assert charts.ticks(2.0, 2.0) == [2.0]
    assert charts.log_ticks(0.001, 10) == [0.001, 0.01, 0.1, 1, 10]
    assert [charts.number(x) for x in (0, 0.00123, 0.05, 12.34, 999.6, 1234, 1.28e6, 2e9, 3e-6, None)] == [
        *("0", "0.00123", "0.05", "12.3", "1,000", "1,234", "1.28M", "2G", "3.00e-06", "-")
    ]


def test_a_curve_of_many_points_is_thinned_and_has_gaps():
    points = [(float(n), None if 100 <= n < 200 else 1.0 * n) for n in range(1, 1001)]
    thinned = charts.thinned(points)
    assert len(thinned) <= 60
    assert thinned[0] == (17.0, 9.0)
    assert None in [y for _, y in thinned]
    drawn = charts.curves("loss", "units", {"student": points, "distilled": []}, x="images")
    (curve,) = re.findall(r'd="([^"]+)"', drawn)[:1]
    assert curve.count("M") == 2, "two pieces"
    assert "each point is the mean of 17 records" in drawn
    assert "No finite values" in charts.curves("loss", "", {"student": [(1.0, None)]}, x="images")
    assert "<circle" in charts.curves("loss", "", {"student": [(1.0, 0.0)]}, x="images"), "a single value, which is 0"


def _luminance(color: str) -> float:
    channels = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(mode):
    """WCAG 2.1: 4.5 for text, 3 for lines and bars."""
    block = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)[mode]
    colors = {name: _luminance(value) for name, value in re.findall(r"--(\w+): (#\w{6})", block)}

    def contrast(a: str, b: str) -> float:
        high, low = sorted((colors[a], colors[b]), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "dim", "accent", "warn"):
        assert min(contrast(text, "paper"), contrast(text, "soft")) >= 4.5, text
    for line in ("one", "two", "three", "four"):
        assert contrast(line, "paper") >= 3, line


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"seed": 7, "twin": False, "ema": 0.99, "precision": "bf16", "erase": ("waves", "line art")},
        {"teacher": Path("a b/it's"), "data": Path("cache"), "concepts": (Path("x"), Path("y")), "clip_norm": 1.5},
        {"concept_weights": (1.0, 0.5), "erase": ("waves", "mosaic"), "graphs": False, "log_every": 1},
    ],
    ids=lambda change: " ".join(change) or "none",
)
@pytest.mark.parametrize("name", PRESETS)
def test_the_command_repeats_the_run(name, change):
    if name in ("paper", "released"):
        folders = {"teacher": Path("t"), "data": Path("d"), "concepts": (Path("b"),)}
        change = folders | {key: value for key, value in change.items() if key not in ("erase", "concept_weights")}
    config: TrainConfig = replace(preset(name), **change)
    upper = replace(config.upper, eta=0.5)
    if upper.penalty_norm == "grad":
        upper = replace(upper, controller=ControllerSettings(enabled=True, horizon=5))
    for wanted in (config, replace(config, upper=upper, lower=replace(config.lower, micro_batch=4))):
        command = repeat.command(json.loads(json.dumps(wanted.to_dict())))
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "bilevel_fast.train"]
        assert parse(words[3:]) == replace(wanted, out=wanted.out.with_name(f"{wanted.out.name}-again"))


def test_sessions_are_noted(tmp_path):
    device = torch.device("cpu")
    sessions.begin(tmp_path, device, processes=2)
    sessions.finish(tmp_path, device)
    begun, finished = sessions.read(tmp_path)
    assert (begun["event"], begun["processes"], begun["torch"]) == ("begun", 2, torch.__version__)
    assert finished["peak_of"] == "process"
    assert 0.05 < finished["peak_gib"] < 1000
    assert sessions.read(tmp_path / "nowhere") == []


def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed; run: apt-get install -y git")
    for variable in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{variable}_NAME", "a")
        monkeypatch.setenv(f"GIT_{variable}_EMAIL", "a@b")

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, text=True).stdout

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert sessions.commit(package) is None, "no repository"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert sessions.commit(package) is None, "a repository that tracks something else, as around a .venv"
    git("add", "package")
    git("commit", "-q", "-m", "second")
    assert sessions.commit(package) == git("rev-parse", "--short=7", "HEAD").strip()
    (package / "__init__.py").write_text("changed")
    assert (sessions.commit(package) or "").endswith("-dirty")


def test_parts_escape_and_nest():
    text = document.tag("p", "a < b & c", document.tag("b", "<i>"), title='"x"', hidden=True, class_=None)
    assert text == '<p title="&quot;x&quot;" hidden>a &lt; b &amp; c<b>&lt;i&gt;</b></p>'
    whole = document.page("<T>", document.section("One & two", "x"), document.section("Three", "y"))
    assert [a["href"] for a in Read(whole).attributes("a")] == ["#one-two", "#three"]
    assert "<title>&lt;T&gt;</title>" in whole
    assert "One &amp; two</a>" in whole
