"""`prepare concepts`: what the teacher draws of prompts that are not held out, however often killed, by any number."""

import json
import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from bilevel_fast import prepare
from bilevel_fast.data import bank as banks
from bilevel_fast.data.bank import Concept, make_bank
from bilevel_fast.data.cache import Cache
from bilevel_fast.models.folder import load_folder
from bilevel_fast.ops.graphs import WARMUP
from bilevel_fast.runs.prepare_concepts import bank_prompts, places
from bilevel_fast.runs.subjects import read_subjects
from forked import Started
from mini_folder import make_mini_folder
from replay import on_the_cpu
from sd_folder import make_sd_folder

STYLE = "in the style of waves"
SUBJECTS = ["a red star", "a blue ring", "a green square", "a blue star"]
SETTINGS = ["--phrase", STYLE, "--count", "11", "--batch", "2", "--steps", "3", "--seed", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_mini_folder(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """--subjects and --held-out."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "subjects.txt").write_text("\n".join(SUBJECTS) + "\n")
    (folder / "held out.csv").write_text(f"case_number,prompt\n0,A Blue Ring  {STYLE}\n1,a sun {STYLE}\n")
    return ["--subjects", folder / "subjects.txt", "--held-out", folder / "held out.csv"]


@pytest.fixture
def run(monkeypatch, command, teacher, files):
    """Run the command; return its exit code and what it wrote."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(out, *more, model=teacher, prompts=files, settings=SETTINGS):
        return command(prepare.main, "concepts", "--model", model, "--out", out, *prompts, *settings, *more)

    return call


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """The bank, straight from `make_bank`."""
    folder, subjects = load_folder(teacher), [SUBJECTS[n] for n in (0, 2, 3)]
    prompts = [f"{subject} {STYLE}" for subject in subjects]
    out = tmp_path_factory.mktemp("whole")
    return make_bank(folder, prompts, subjects, 11, 5, 3.0, 3, 2, out)


def samples(bank):
    return [(bank.captions(n), bank.anchor(n)) for n in range(len(bank))], bank.moments(range(11), [0] * 11)


def test_the_command_makes_the_bank(run, whole, tmp_path):
    code, out, err = run(tmp_path / "bank")
    assert (code, err) == (0, "")
    assert out == (
        f"{tmp_path / 'bank'}: 11 images of 3 prompts, 1 held out; 'a red star {STYLE}' against 'a red star'\n"
    )
    bank = Cache.open(tmp_path / "bank")
    bank.verify()
    assert bank.index == whole.index  # with all checksums
    assert bank.index.recipe["count"] == 11
    assert [bank.anchor(n) for n in range(4)] == ["a red star", "a green square", "a blue star", "a red star"]


def test_three_processes_make_the_same_bank(run, whole, tmp_path):
    """Whole batches of 2: 4, 4 and 3 images. As torchrun says it, or as the flag does."""
    assert run(tmp_path / "bank", "--shard", "2/3")[1].endswith("part 2/3 is finished, others are not\n")
    assert run(tmp_path / "bank", "--shard", "0/3")[0] == 0
    assert not (tmp_path / "bank" / "index.json").exists()
    assert ": 11 images of 3 prompts" in run(tmp_path / "bank", "--shard", "1/3")[1]
    bank = Cache.open(tmp_path / "bank")
    bank.verify()
    ours, theirs = samples(bank), samples(whole)
    assert ours[0] == theirs[0]
    assert torch.equal(ours[1], theirs[1])


def test_torchrun_says_which_part(run, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(tmp_path / "bank")[1].endswith("part 1/2 is finished, others are not\n")
    assert ": 11 images" in run(tmp_path / "bank", "--shard", "0/2")[1]
    assert run(tmp_path / "many", "--shard", "0/7")[2].startswith("error: 7 parts of 6 batches")


def test_kills_change_nothing(whole, teacher, files, tmp_path):
    """SIGKILL after the first shard of 8, then on to the end."""
    out = tmp_path / "bank"
    arguments = ("concepts", "--model", teacher, "--out", out, *files, *SETTINGS)
    process = Started("prepare", *arguments, log=tmp_path / "log")
    while not (out / "index.partial.json").exists():
        assert process.runs(), process.said()
        time.sleep(0.002)
    process.send(signal.SIGKILL)
    assert process.wait() in (0, -signal.SIGKILL)
    (out / ".shard-00001.safetensors.tmp").write_bytes(b"half")
    drawn = []
    prompts, anchors = bank_prompts(read_subjects(str(files[1]), "mini"), Concept(STYLE), [f"a blue ring {STYLE}"])
    bank = make_bank(
        load_folder(teacher), prompts, anchors, 11, 5, 3.0, 3, 2, out, progress=lambda done, _: drawn.append(done)
    )
    assert drawn in ([10, 11], [])  # the shard of 8 was not drawn again
    assert bank.index == whole.index


def test_several_phrases_make_several_banks(run, tmp_path):
    phrases = ["--phrase", STYLE, "in the style of Pointillism", "--replacement", "", "in the style of waves"]
    code, _, err = run(tmp_path / "banks", *phrases, settings=SETTINGS[2:])
    assert (code, err) == (0, "")
    plain, replaced = (
        Cache.open(tmp_path / "banks" / name) for name in ("in-the-style-of-waves", "in-the-style-of-pointillism")
    )
    assert plain.anchor(0) == "a red star"
    assert replaced.captions(1) == ("a blue ring in the style of Pointillism",)  # of the second, nothing is held out
    assert replaced.anchor(1) == "a blue ring in the style of waves"
    assert len(plain) == len(replaced) == 11


def test_places_have_names_of_their_own(tmp_path):
    phrases = ["by X", "by x!", "BY  X", "梵高风格", "..."]
    found = places(tmp_path, [Concept(phrase) for phrase in phrases])
    assert [path.name for path in found] == ["by-x", "by-x--2", "by-x--3", "梵高风格", "concept"]
    assert list(places(tmp_path, [Concept("by X")])) == [tmp_path]


def test_subjects_that_hold_the_phrase_stand_as_they_are():
    concept = Concept("by Claude Monet")
    subjects = ["Water Lilies by Claude Monet", "a house", "a {} picture", "Sunrise BY claude  monet", "a bymonet"]
    assert bank_prompts(subjects, concept, ["a House by Claude Monet"]) == (
        [
            "Water Lilies by Claude Monet",
            "a by Claude Monet picture",
            "Sunrise BY claude  monet",
            "a bymonet by Claude Monet",
        ],
        ["Water Lilies", "a picture", "Sunrise", "a bymonet"],
    )
    people = bank_prompts(read_subjects("people", None), Concept("naked"), [])
    assert ("a photo of a naked man", "a photo of a man") in zip(*people, strict=True)
    things = bank_prompts(read_subjects("things", None), concept, [])
    assert ("a cat by Claude Monet", "a cat") in zip(*things, strict=True)


def test_a_stable_diffusion_folder(run, tmp_path, caplog):
    """The layout of the real one: 7.5 and 25 steps are its defaults, and its own small size."""
    model = make_sd_folder(tmp_path / "sd")
    settings = ["--phrase", "by Monet", "--count", "2", "--batch", "2", "--device", "cpu"]
    assert run(tmp_path / "bank", model=model, prompts=["--subjects", "things"], settings=settings)[0] == 0
    assert caplog.messages == [f"{tmp_path / 'bank'}: --count 2 draws the first so many of 20 prompts"]
    bank = Cache.open(tmp_path / "bank")
    recipe = {"guidance": 7.5, "steps": 25, "seed": 0, "count": 2, "batch": 2}
    assert bank.index.recipe.items() > recipe.items()
    assert bank.latent_shape == (4, 8, 8)
    assert [bank.anchor(n) for n in range(2)] == ["a cat", "a dog"]
    assert bank.captions(0) == ("a cat by Monet",)


def test_anchors_may_be_what_is_drawn_and_precision_is_of_the_recipe(run, whole, tmp_path):
    assert run(tmp_path / "anchors", "--shows", "anchor")[0] == 0
    assert run(tmp_path / "bf16", "--precision", "bf16")[0] == 0
    exact = samples(whole)
    for name, far in (("anchors", 0.02), ("bf16", 1e-3)):
        found = samples(Cache.open(tmp_path / name))
        assert found[0] == exact[0]
        assert (found[1] - exact[1]).abs().mean() > far
    assert (found[1] - exact[1]).abs().mean() < 0.1  # bf16 is near
    code, _, err = run(tmp_path / "bf16")
    assert code == 2
    assert "recipe.precision 'bf16', not None" in err


def test_the_unet_is_recorded_on_a_gpu(teacher, whole, tmp_path, monkeypatch):
    """Op by op in place of a graph: what is replayed are the same images."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")  # native code reads its numbers on the CPU, as no graph can
    recorded, replayed = [], []

    def record(call):
        replay, answer = on_the_cpu(call)
        recorded.append(1)
        return lambda: (replayed.append(1), replay()), answer

    folder, subjects = load_folder(teacher), [SUBJECTS[n] for n in (0, 2, 3)]
    prompts = [f"{subject} {STYLE}" for subject in subjects]
    found = []
    for name, recorder in (("eager", None), ("recorded", record)):
        monkeypatch.setattr(banks, "cuda_recorder", lambda _, recorder=recorder: recorder)
        make_bank(folder, prompts, subjects, 4, 5, 3.0, 3, 2, tmp_path / name)
        found.append(load_file(tmp_path / name / "shard-00000.safetensors")["moments"])
    assert torch.equal(*found)
    assert (len(recorded), len(replayed)) == (1, 8 - WARMUP)  # two batches, four calls each
    make_bank(folder, prompts, subjects, 2, 5, 3.0, 3, 2, tmp_path / "off", graphs=False)
    assert len(recorded) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--phrase"], "--phrase wants at least one value"),
        (["--phrase", " "], "the concept's phrase is empty"),
        (["--phrase", "by X", "BY  x"], "--phrase 'by X' is there twice"),
        (["--phrase", "a", "b", "--replacement", "c", "d", "e"], "3 of --replacement came for 2 of --phrase"),
        (["--subjects", "thing"], "--subjects thing: no such file, nor a set; did you mean 'things'?"),
        (["--held-out", "nowhere.csv"], "prompt file nowhere.csv does not exist"),
        (["--count", "0"], "count is 0 and batch is 2; both must be positive"),
        (["--size", "6"], "latent size is 6; it must be a multiple of the UNet's stride 4"),
        (["--steps", "1"], "steps is 1; pndm"),
        (["--shard", "3/3"], "part 3/3: the first of n is 0/n"),
        (["--shard", "x"], "part 'x': wanted i/n"),
        (["--model", "nowhere"], "model folder nowhere does not exist"),
        (["--cout", "3"], "there is no flag '--cout'; did you mean '--count'"),
        (["--phrase", "by Monet"], "the mini world has no word for 'by'"),
    ],
)
def test_refusals(run, tmp_path, more, message):
    code, _, err = run(tmp_path / "bank", *more)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_bank_of_one_is_no_folder_of_several(run, tmp_path):
    assert run(tmp_path / "bank")[0] == 0
    code, _, err = run(tmp_path / "bank", "--phrase", STYLE, "in the style of pointillism")
    assert (code, err.startswith(f"error: {tmp_path / 'bank'} is a bank itself")) == (2, True)
    code, _, err = run(tmp_path / "bank", "--seed", "6")
    assert re.search(r"made with recipe\.seed 5, not 6", err)
    assert code == 2
    assert json.loads((tmp_path / "bank" / "index.json").read_text())["recipe"]["seed"] == 5
