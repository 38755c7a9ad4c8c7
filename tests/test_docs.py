"""README.md and docs/: each command is parsed by its own parser and run on small folders; each block of Python runs."""

import inspect
import io
import json
import re
import sys
import tarfile
import types
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali")
pytest.importorskip("diffusers")

from bilevel_fast import attack, cli, erase, prepare, worlds
from bilevel_fast.models.folder import load_folder
from bilevel_fast.pruning import METHODS
from bilevel_fast.runs import prune_aptp
from bilevel_fast.worlds.mini.settings import Mini
from coco_folder import encoded, picture
from commands import run_command
from documented import PAGES, ROOT, Command, code, commands, links, parse, sections
from sd_folder import make_sd_folder

COMMANDS = ROOT / "docs" / "commands.md"
ELSEWHERE = {
    "--help",
    "--help-all",
    "--version",
    "--rehearse",
}  # of every command, of `bilevel-fast`, and of benchmarks/gpu.sh
ELSEWHERE |= {"--nproc-per-node", "--nnodes", "--max-restarts", "--rdzv-conf", "--rdzv-id"}  # of torchrun

PICTURES = ["--resolution", "64", "--batch", "2", "--per-file", "2", "--threads", "1"]
FEW = ["--mini.judge-erased", "2", "--mini.judge-kept", "1", "--mini.judge-steps", "3"]
SHORT = ["--lower.steps", "1", "--lower.batch", "2", "--upper.batch", "2", "--upper.every", "1"]
SMALL = {
    "prepare coco": PICTURES,
    "prepare folder": PICTURES,
    "prepare webdataset": PICTURES,
    "prepare check": [],
    "prepare concepts": ["--count", "2", "--steps", "3", "--batch", "2"],
    "prune magnitude": [],
    "prune aptp": ["--steps", "2", "--batch", "4", "--pretrain", "1", "--images", "16", "--experts", "2"],
    "prune route": [],
    "erase uce": [],
    "erase concept-prune": ["--steps", "2"],
    "attack unlearn-diff": ["--iterations", "1", "--timesteps", "1"],
    "attack ring-a-bell": ["--population", "4", "--generations", "1"],
    "attack mma": ["--batch", "4", "--steps", "1"],
    "erase time": [],
    "erase separable": [],
    "erase p-esd": ["--updates", "2", "--steps", "3", "--batch", "1"],
    "export": [],
    "train": SHORT,
    "sample": ["--steps", "3"],
    "evaluate": FEW,
    "doctor": [],
    "completion": [],
}
"""What makes a command small enough to run here."""
PARSED = {
    "convert": "wants a checkpoint in one file; tests/models/test_single_file.py",
    **dict.fromkeys(("sdxl/", "run/student", "erased/"), "Stable Diffusion XL; tests/runs/test_sdxl_chain.py"),
    "prune import-aptp": "wants files of APTP's authors; tests/pruning/test_aptp_import.py",
    **dict.fromkeys(("onnx", "torch"), "a minute; tests/exporting/test_graphs.py"),
    "reproduce": "minutes; tests/runs/paper",
    "emoji": "minutes; tests/runs/test_emoji_world.py",
    "smoke": "docs/api.md trains with it below; tests/runs, tests/profiling",
    "--suite": "wants weights of metrics; tests/metrics",
    "benchmarks": "tests/benchmarks",
    **dict.fromkeys(("OWNER/NAME", "OWNER/NAME@REVISION"), "wants a network; tests/models/test_hub.py"),
}
"""What is only parsed, and who runs it."""


def documented() -> list[Command]:
    """Every command once, in the order of a reader: the quick start first, then what builds on it."""
    first = ROOT / "docs" / "quick-start-sd21.md"
    pages = [first, *(page for page in PAGES if page != first)]
    found = [command for page in pages for _, text in sections(page) for command in commands(text)]
    return list({command.line.partition("#")[0].strip(): command for command in found}.values())


def why_not(command: Command) -> str | None:
    """Why a command is only parsed; None if it runs."""
    if not command.arguments:
        return "a name in a sentence; with its defaults it takes minutes"
    words = {command.name, command.module.partition(".")[0], *command.arguments}
    return next((why for word, why in PARSED.items() if word in words), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What the pages take for granted: sd21/, coco/, images/, tars/, prompts, each as small as it can be."""
    root = tmp_path_factory.mktemp("documented")
    make_sd_folder(root / "sd21")
    jpegs = [encoded(picture(seed, 80, 90)) for seed in range(4)]
    (root / "coco" / "train2017").mkdir(parents=True)
    (root / "coco" / "annotations").mkdir()
    rows = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(4)]
    texts = [{"id": n, "image_id": n, "caption": f"a photo of a house {n}"} for n in range(4)]
    for row, data in zip(rows, jpegs, strict=True):
        (root / "coco" / "train2017" / row["file_name"]).write_bytes(data)
    (root / "coco" / "annotations" / "captions_train2017.json").write_text(
        json.dumps({"images": rows, "annotations": texts})
    )
    (root / "images").mkdir()
    (root / "images" / "a.jpg").write_bytes(jpegs[0])
    (root / "images" / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a red star"}\n')
    (root / "tars").mkdir()
    for n in range(2):
        with tarfile.open(root / "tars" / f"a-{n:03d}.tar", "w") as tar:
            for suffix, data in ((".jpg", jpegs[n]), (".txt", b"a blue star")):
                info = tarfile.TarInfo(f"{n}{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (root / "prompts.txt").write_text("a red star\na house by Claude Monet\n")
    (root / "prompts.csv").write_text("case_number,prompt\n0,a red star\n1,a house by Claude Monet\n")
    return root


def test_every_command_is_parsed_by_its_own_parser():
    """Flags in the prose belong to some command; in docs/commands.md, to a command of their section."""
    known, wrong = {}, []
    for command in documented():
        try:
            known[command] = parse(command)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
    every = set().union(*known.values())
    by_line = {command.line: flags for command, flags in known.items()}
    for page in PAGES:
        for heading, text in sections(page):
            here = [by_line[c.line] for c in commands(text) if c.line in by_line] if page == COMMANDS else []
            allowed = ELSEWHERE | (set().union(*here) if here else every)
            for span in re.findall(r"`([^`\n]+)`", text):
                named = set(re.findall(r"(?:^|\s)(--[a-z0-9][a-z0-9.-]*)", span))
                other = every if not span.startswith("--") else allowed  # `train --data` may stand anywhere
                wrong += [f"{page.name}, {heading}: {name}" for name in named - other - ELSEWHERE]
    assert not wrong, "\n".join(wrong)


def test_commands_md_has_every_command():
    names = {command.name for _, text in sections(COMMANDS) for command in commands(text)}
    wanted = set(cli.COMMANDS) - {"prepare", "erase", "attack", "prune"}
    wanted |= {f"prepare {name}" for name in prepare.COMMANDS} | {f"erase {name}" for name in erase.EDITS}
    wanted |= {f"attack {name}" for name in attack.METHODS}
    assert wanted | {f"prune {name}" for name in prune_aptp.COMMANDS} <= names
    assert all(f"`{name}`" in COMMANDS.read_text() for name in METHODS)
    modules = {command.module for _, text in sections(COMMANDS) for command in commands(text)}
    assert {"bilevel_fast." + name for name in cli.COMMANDS} <= modules


@pytest.mark.slow
def test_what_is_documented_runs(place, monkeypatch):
    """In the order of the quick start, and then of the other pages; README's Python at the end."""
    monkeypatch.chdir(place)
    wrong = []
    for command in documented():
        if why_not(command) is not None:
            continue
        small = [] if "--dry-run" in command.arguments else SMALL[command.name]
        done = run_command(command.main(), *command.arguments, *small)
        if done.returncode:
            wrong.append(f"{command.line} {' '.join(small)}\n{done.stdout[-300:]}{done.stderr[-600:]}")
    assert not wrong, "\n".join(wrong)
    assert load_folder("runs/monet-2/student").structure is not None
    (block,) = code(ROOT / "README.md")
    exec(compile(block, "README.md", "exec"), found := {})
    assert found["image"].size == (64, 64)
    assert found["pruned"].macs.ratio <= 0.8


def test_python_api(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in code(ROOT / "docs" / "api.md"):
        exec(compile(block, "api.md", "exec"), names)
    assert load_folder("runs/edited").structure is not None
    assert "left to guide" in capsys.readouterr().out


def test_a_pruner_and_an_eraser_of_ones_own(tmp_path, monkeypatch, capsys):
    from bilevel_fast.erasing.registry import ERASERS

    monkeypatch.chdir(tmp_path)
    pruner, eraser, _ = code(ROOT / "docs" / "extend.md")
    try:
        exec(compile(pruner, "extend.md", "exec"), {})
        exec(compile(eraser, "extend.md", "exec"), {})
    finally:
        METHODS.pop("largest", None)
        ERASERS.pop("huber-anchor", None)
    said = capsys.readouterr().out
    assert load_folder("runs/largest").structure is not None
    assert said.endswith("\n1\n")  # upper steps of two lower ones


def test_a_world_of_ones_own(tmp_path, monkeypatch):
    module = types.ModuleType("bilevel_fast.worlds.colours.materials")
    exec(compile(code(ROOT / "docs" / "extend.md")[2], "extend.md", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "bilevel_fast.worlds.colours", types.ModuleType("bilevel_fast.worlds.colours"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(worlds, "WORLDS", (*worlds.WORLDS, "colours"))
    here, few = worlds.world("colours"), Mini(bank=2, bank_steps=3, judge_erased=2, judge_kept=2, judge_steps=3)
    for name, function in vars(worlds.World).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            assert list(inspect.signature(function).parameters)[1:] == list(
                inspect.signature(getattr(here, name)).parameters
            ), name
    folder, erased = load_folder(here.TEACHER), here.erased_concepts(["red"])
    source = here.drawn_source(folder, erased, 8, seed=0)
    assert not any("red" in caption for i in range(8) for caption in source.captions(i))
    (bank,) = here.concept_banks(folder, ["red"], few, 0, tmp_path / "bank", alone=True, shows="prompt")
    assert len(bank) == 2
    samples = here.portfolio(folder.unet(), folder, erased, few, 0)
    assert samples.captions[0].startswith("a red")
    assert set(here.hits(samples, erased)) == {"red"}
    assert set(here.quality(samples, erased)) == {"concept_hit", "other_colors"}
    folder.text_encoder.mask(here.subjects())


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "docs" / "situations.md"]:
        if page.name != "wheel.md":
            gone = [link for link in links(page) if not (page.parent / link.replace("\\", "")).exists()]
            assert not gone, f"{page.name}: {gone}"


def test_every_page_is_found_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text]
    assert len(text.splitlines()) <= 150


def test_targets_of_make_that_pages_name():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        found = re.findall(r"(?:`|^ {4})make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)
        assert set(found) <= targets, page.name
