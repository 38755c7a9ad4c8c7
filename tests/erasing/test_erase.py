"""`python -m bilevel_fast.erase` from folder to folder, what it writes down, and what it says when it cannot."""

import json
import re

import pytest
import torch

from bilevel_fast import erase
from bilevel_fast.base import errors
from bilevel_fast.erasing.concept_prune import ConceptPrune
from bilevel_fast.erasing.edit import Job, read_records
from bilevel_fast.erasing.pairs import Frame, Pair
from bilevel_fast.erasing.uce import Uce
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.folder import load_folder, load_unet, save_student
from bilevel_fast.models.structure import Structure
from bilevel_fast.worlds.mini.world import is_held_out, parse
from mini_folder import TINY, make_mini_folder

GONE = "up_blocks.2.attentions.1"
DOTS = "in the style of pointillism"
FAST = ("--steps", 1, "--ratio", 0.05, "--batch", 12)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_mini_folder(tmp_path_factory.mktemp("models") / "teacher")


def cut(teacher, path, drop):
    folder = load_folder(teacher)
    save_student(path, folder, folder.unet().cut(Structure.uniform(TINY, 0.6, drop)))
    return path


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    return cut(teacher, tmp_path_factory.mktemp("models") / "student", [GONE])


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; return its exit code and what it wrote to stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["erase", *map(str, arguments)])
        return errors.run(erase.main), *capsys.readouterr()

    return command


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_uce_writes_the_student(student, run, tmp_path):
    kept, out = tmp_path / "kept.csv", tmp_path / "out"
    kept.write_text("number,prompt\n1,a red star\n2,a blue ring in the style of waves\n")
    code, stdout, stderr = run(
        "uce", "--model", student, "--erase", DOTS, "in the style of mosaic", "--guide", "", "line art",
        "--weights", 1, 2, "--preserve", kept, "--out", out,
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    folder, unet = load_folder(out), load_unet(student)
    pairs = (Pair(DOTS, "", 1.0), Pair("in the style of mosaic", "line art", 2.0))
    preserve = ("a red star", "a blue ring in the style of waves")
    outcome = Uce().edit(unet, Job(load_folder(student), pairs, (), preserve))
    assert same(folder.unet(), unet)
    assert not same(load_unet(student), unet)
    assert folder.structure == load_folder(student).structure
    assert read_records(out) == (outcome.record,)
    fields = json.loads((out / "erased.json").read_text())
    assert fields["format"] == "bilevel_fast.erased"
    (edit,) = fields["edits"]
    assert edit["preserve"] == ["", *preserve]
    assert edit["pairs"][1] == {"erase": "in the style of mosaic", "guide": "line art", "weight": 2.0}
    assert edit["settings"] == {"ridge": 0.5, "preserve_scale": pytest.approx(1 / 3)}

    lines = stdout.splitlines()
    assert lines[:3] == [
        f"erased   '{DOTS}' -> ''",
        "erased   'in the style of mosaic' -> 'line art', weight 2",
        f"skipped  {GONE}: the model has dropped it",
    ]
    head, keys, values = (re.split(r"  +", line) for line in lines[4:7])
    assert head[1:] == ["matrices", "weights", "erased moved", "left to guide", "preserved moved"]
    assert (keys[0], values[0]) == ("attn2.to_k", "attn2.to_v")
    assert float(keys[3].split()[0]) == pytest.approx(100 * outcome.table["attn2.to_k"]["erased moved"], rel=0.01)
    assert lines[-1] == f"written  {out}"


def test_concept_prune_after_uce_keeps_both_in_order(student, run, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(f"erase,guide\n{DOTS},\n")
    assert run("uce", "--model", student, "--pairs", pairs, "--out", first)[0] == 0
    code, stdout, stderr = run("concept-prune", "--model", first, "--pairs", pairs, "--out", second, *FAST)
    assert (code, stderr) == (0, "")
    assert "in       24 sentences" in stdout

    records = read_records(second)
    assert [record.method for record in records] == ["uce", "concept-prune"]
    assert records[0] == read_records(first)[0]
    frames = records[1].frames
    scenes = [parse(frame.erase.removesuffix(" {}")) for frame in frames]
    assert len(set(scenes)) == 24
    assert not any(scene.style or is_held_out(scene) for scene in scenes)
    assert records[1].settings["guidance"] == 3.0
    assert records[1].settings["size"] == 8
    unet = load_unet(first)
    ConceptPrune(ratio=0.05, steps=1, batch=12).edit(unet, Job(load_folder(first), (Pair(DOTS),), frames))
    assert same(load_unet(second), unet)

    code, stdout, _ = run("uce", "--model", second, "--erase", "waves", "--out", third)
    assert code == 0
    assert "kept: 1 earlier edit by uce" in stdout
    assert "earlier moved" in stdout
    assert [record.method for record in read_records(third)] == ["uce", "concept-prune", "uce"]
    unet = load_unet(second)
    Uce().edit(unet, Job(load_folder(second), (Pair("waves"),), earlier=records))
    assert same(load_unet(third), unet)


def test_sentences_from_a_file(teacher, run, tmp_path):
    (tmp_path / "subjects.txt").write_text("a red star\na {} ring\n")
    out = tmp_path / "out"
    subjects = ("--subjects", tmp_path / "subjects.txt")
    assert run("uce", "--model", teacher, "--erase", DOTS, "--out", out, *subjects)[0] == 0
    assert read_records(out)[0].frames == (Frame.of("a red star"), Frame("a {} ring", "a {} ring"))


BAD = {
    "nothing": ([], "there is nothing to erase; --erase or --pairs names texts"),
    "empty": (["--erase", " "], "erase ' ' is empty; wanted a text"),
    "unknown word": (["--erase", "cubism"], "prompt 'cubism': the mini world has no word for 'cubism'"),
    "itself": (["--erase", "waves", "--guide", " Waves"], "erase 'waves' has itself as its guide"),
    "twice": (["--erase", "waves", "waves"], "erase 'waves' is there twice"),
    "preserved": (["--erase", "waves", "--preserve", "kept.txt"], "'waves' is to be erased and preserved"),
    "preserved in a sentence": (
        ["--erase", "in waves", "--subjects", "subjects.txt", "--preserve", "kept.txt"],
        "'a star in waves' is to be erased and preserved",
    ),
    "empty file": (["--erase", "waves", "--preserve", "empty.txt"], "prompt file empty.txt holds no prompt"),
    "no file": (["--erase", "waves", "--preserve", "none.txt"], "prompt file none.txt does not exist"),
    "no column": (["--erase", "waves", "--preserve", "pairs.csv"], "prompt file pairs.csv has no column 'prompt'"),
    "no pairs": (["--pairs", "prompts.csv"], "pair file prompts.csv has no column 'erase'"),
    "no subjects": (["--erase", "waves", "--subjects", "thing"], "--subjects thing: no such file, nor a set; did you"),
    "no flag": (["--erase", "waves", "--preserved", "kept.txt"], "there is no flag '--preserved'; did you mean"),
    "no model": (["--erase", "waves", "--model", "nowhere"], "model folder nowhere does not exist"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_bad_input(flags, message, teacher, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.txt").write_text("a red star\nwaves\na star in waves\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "subjects.txt").write_text("a star\n")
    (tmp_path / "pairs.csv").write_text("erase,guide\nwaves,\n")
    (tmp_path / "prompts.csv").write_text("prompt\nwaves\n")
    model = () if "--model" in flags else ("--model", teacher)
    code, stdout, stderr = run("uce", *model, *flags, "--out", tmp_path / "out")
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: {message}")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_folders(teacher, run, tmp_path):
    bare = cut(teacher, tmp_path / "bare", [site.name for site in sites(TINY) if site.kind == "transformer"])
    out, some = tmp_path / "out", ("--erase", "waves")
    for method in ("uce", "concept-prune"):
        code, _, stderr = run(method, "--model", bare, *some, "--out", out)
        wanted = "error: all 7 Transformers of the model were dropped; there is nothing to edit\n"
        assert (code, stderr) == (2, wanted)
        code, _, stderr = run(method, "--model", teacher, *some, "--out", bare)
        assert (code, stderr) == (2, f"error: {bare} exists already; delete it or choose another name\n")
    broken = {
        "[]": "wanted a JSON object",
        '{"format": "x"}': "'x', version None; this release",
        '{"format": "bilevel_fast.erased", "version": 1, "edits": [{}]}': "does not hold",
    }
    (tmp_path / "heavy.csv").write_text("erase,guide,weight\nwaves,,2\n")
    stderr = run("concept-prune", "--pairs", tmp_path / "heavy.csv", "--out", out)[2]
    assert stderr == f"error: {tmp_path / 'heavy.csv'} has weights, and concept-prune has no use for them; uce has\n"
    for content, message in broken.items():
        (bare / "erased.json").write_text(content)
        with pytest.raises(errors.UserError, match=re.escape(message)):
            read_records(bare)


def test_without_an_edit_it_says_which_there_are(run):
    assert run("ucf", "--out", "x")[2] == "error: no edit 'ucf'; did you mean 'uce'?\n"
    code, stdout, _ = run()
    assert code == 0
    assert "concept-prune" in stdout
