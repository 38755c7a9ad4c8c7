"""`sample --prompts-file` as a user runs it: whole files or none, one line about a folder that is something else."""

import errno
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import drawing
from bilevel_fast import sample
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder
from bilevel_fast.sampling import samplers
from bilevel_fast.sampling import to_folder as sampling
from bilevel_fast.sampling.image_folder import ImageFolder
from bilevel_fast.sampling.prompts import Row
from bilevel_fast.sampling.to_folder import sample_folder
from drawing import BATCH, RECIPE, ROWS
from forked import processes
from mini_folder import make_mini_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_mini_folder(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A folder that was drawn in one piece."""
    return sample_folder(model, ROWS, tmp_path_factory.mktemp("whole") / "images", RECIPE, batch=BATCH)


@pytest.fixture
def run(monkeypatch, command, model, tmp_path):
    """Run the command with a table of `ROWS`; return its exit code and what it wrote."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    table = tmp_path / "prompts.csv"
    table.write_text("id,prompt,evaluation_seed\n" + "".join(f"{row.id},{row.prompt},{row.id}5\n" for row in ROWS))

    def call(*more):
        argv = ["--prompts-file", table, "--folder", tmp_path / "images", "--model", model]
        argv += ["--steps", "3", "--seeds", "7", "--batch", "2", "--device", "cpu", *more]
        return command(sample.main, *argv)

    return call


def test_the_command_fills_the_folder(run, whole, tmp_path):
    assert run() == (0, f"{tmp_path / 'images'}: 5 of 5 images\n", "")
    assert drawing.content(tmp_path / "images") == drawing.content(whole.path)
    assert (
        run("--folder", tmp_path / "few", "--limit", 2, "--seed-column", "evaluation_seed", "--format", "latents")[0]
        == 0
    )
    few = ImageFolder.open(tmp_path / "few")
    assert [(entry.id, entry.seed) for entry in few.entries.values()] == [("3", 35), ("0", 5)]
    assert few.latents("3").shape == (12, 8, 8)


def test_a_full_disk(run, whole, tmp_path, monkeypatch):
    """Of one image; the others of its batch are kept, and the next run goes on."""
    out, sync, refused = tmp_path / "images", os.fsync, []

    def full(number):
        if not refused and "/.4.png." in os.readlink(f"/proc/self/fd/{number}"):
            refused.append(number)
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    assert run() == (1, "", f"error: {out / '4.png'}: No space left on device\n")
    assert {"3", "0", "11"} <= set(ImageFolder.open(out).entries) <= {"3", "0", "11", "12"}
    assert run()[0] == 0
    assert drawing.content(out) == drawing.content(whole.path)


def test_out_of_memory_is_one_line(run, whole, tmp_path, monkeypatch):
    """In the second batch: the first one stays."""
    drawn = []

    def sampled(*args):
        drawn.append(1)
        if len(drawn) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory\nmore")
        return samplers.sample(*args)

    monkeypatch.setattr(sampling, "sample", sampled)
    assert run() == (2, "", "error: cpu is out of memory for a batch of 2; finished images stay\n")
    found = ImageFolder.open(tmp_path / "images")
    assert list(found.entries) == ["3", "0"]
    assert found.path_of("0").read_bytes() == whole.path_of("0").read_bytes()


def test_a_full_disk_tears_no_line(tmp_path):
    rows, limit = [Row(str(n), "a red star") for n in range(100)], 5000
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=drawing.index_with_small_files, args=(rows, tmp_path / "images", theirs, limit))
    process.start()
    assert ours.recv() == "File too large"
    process.join()
    data = (tmp_path / "images" / "index.jsonl").read_bytes()
    assert data.count(b"\n") == 50
    assert data.endswith(b'"49.png"}\n')
    assert limit - len(data) > 200  # there was room for a part of what came after


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "4"], "images holds images made with steps 3, not 4; delete it or choose another folder"),
        (["--guidance", "7.5"], "made with guidance 3.0, not 7.5"),
        (["--seeds", "8"], "made with seed 7, not 8"),
        (["--precision", "bf16"], "made with precision 'fp32', not 'bf16'"),
        (["--format", "latents"], "made with format 'png', not 'latents'"),
        (["--model", "OTHER"], "made with unet "),
        (["--seed-column", "evaluation_seed"], "holds image '3' with seed 7, not 35; choose another folder"),
        (["--limit", "2"], "holds image '11' ('"),
        (["--prompts-file", "BACKWARDS"], "holds image '3' with prompt 'a "),
    ],
)
def test_a_folder_of_something_else_is_refused(run, whole, model, tmp_path, more, message):
    (tmp_path / "images").symlink_to(whole.path)
    if "OTHER" in more:
        more = ["--model", make_mini_folder(tmp_path / "other", seed=1)]
    if "BACKWARDS" in more:
        more = ["--prompts-file", tmp_path / "backwards.csv"]
        rows = zip(ROWS, reversed(ROWS), strict=True)
        more[1].write_text("id,prompt\n" + "".join(f"{row.id},{other.prompt}\n" for row, other in rows))
    before = drawing.content(whole.path)
    code, _, err = run(*more)
    assert (code, message in err, err.count("\n")) == (2, True, 1), err
    assert drawing.content(whole.path) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt-column", "prompts"], "has no column 'prompts'; did you mean 'prompt'"),
        (["--seeds", "1", "2"], "--prompts-file wants --folder and one of --seeds"),
        (["--out", "grid.png"], "--prompts-file wants --folder and one of --seeds, and neither --prompts nor --out"),
        (["--mixture", "m"], "--prompts-file takes --model or --mixture"),
        (["--mixture", "m", "--model", "None"], "m is not a mixture: mixture.json is missing"),
        (["--prompt-encoder", "m"], "--prompt-encoder is for the router of a --mixture"),
        (["--batch", "0"], "batch is 0; wanted at least 1"),
        (["--steps", "1"], "steps is 1; pndm"),
        (["--steps", "2000"], "steps is 2000; a schedule of 1000 timesteps"),
        (["--size", "6"], "latent size is 6; it must be a multiple of the UNet's stride 4"),
        (["--guidance", "nan"], "guidance is nan"),
        (["--seeds", "-1"], "seed is -1"),
        (["--model", "nowhere"], "model folder nowhere does not exist"),
        (["--prompts-file", "nowhere.csv"], "prompt file nowhere.csv does not exist"),
    ],
)
def test_refusals(run, tmp_path, more, message):
    code, out, err = run(*more)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("flag", ["--folder", "--seed-column", "--limit", "--batch"])
def test_a_grid_takes_no_flags_of_a_folder(flag, command):
    code, _, err = command(sample.main, "--prompts", "a red star", flag, "3")
    assert (code, err) == (2, f"error: {flag} is for --prompts-file, and none was named\n")


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("index.jsonl", b"{\n", "index.jsonl line 1 is no entry of an image: '{'"),
        ("index.jsonl", b'{"id": "3"}\n', "index.jsonl line 1 is no entry"),
        (
            "index.jsonl",
            b'\n{"id": "3", "prompt": "a", "seed": 7, "file": "3.png"}\n',
            "index.jsonl line 1 is no entry",
        ),
        ("index.jsonl", b'{"id": "3", "prompt": "a", "seed": "7", "file": "3.png"}\n', "line 1: seed is '7'"),
        ("index.jsonl", b'{"id": "3", "prompt": "a", "seed": 7, "file": "../3.png"}\n', "line 1: file is '../3.png'"),
        ("settings.json", b"{", "settings.json is not JSON"),
        ("settings.json", b"{}", "settings.json: format None version None, wanted 'bilevel_fast.images' version 1"),
        ("settings.json", None, "images holds 3.png and no settings.json; wanted an empty or a new folder"),
    ],
)
def test_a_broken_folder(run, whole, tmp_path, file, data, message):
    out = tmp_path / "images"
    out.mkdir()
    for name in ("settings.json", "3.png"):
        (out / name).write_bytes((whole.path / name).read_bytes())
    (out / file).unlink() if data is None else (out / file).write_bytes(data)
    code, _, err = run()
    assert (code, message in err, err.count("\n")) == (2, True, 1), err
    assert (out / "3.png").read_bytes() == whole.path_of("3").read_bytes()
    if data is not None:
        with pytest.raises(UserError, match=re.escape(message)):
            ImageFolder.open(out)


def test_an_image_that_is_not_finite(tmp_path, model):
    """What came before it stays, and it is named."""
    folder = load_folder(make_mini_folder(tmp_path / "model"))
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"] = torch.full_like(tensors["conv_out.bias"], 3e38)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=re.escape(f"image '3' ({ROWS[0].prompt!r}) is not finite in fp32")):
        sample_folder(folder.path, ROWS, tmp_path / "images", RECIPE, batch=BATCH)
    assert not ImageFolder.open(tmp_path / "images").entries
