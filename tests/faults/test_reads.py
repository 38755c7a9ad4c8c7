"""What is read vanishes, or is changed, between two reads of it."""

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data import encode
from bilevel_fast.data.cache import Cache, Index
from bilevel_fast.data.encode import Files
from bilevel_fast.data.listing import metadata_folder
from bilevel_fast.data.tars import Tars
from bilevel_fast.data.writer import CacheWriter, Part
from bilevel_fast.models.weights import fingerprint
from bilevel_fast.runs import session
from bilevel_fast.runs.config import preset
from mini_folder import TINY, make_mini_folder

pytestmark = pytest.mark.situation


def set_back(path: Path, data: bytes) -> None:
    """Other bytes, with the time of change that the file had."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=times)


@pytest.fixture
def cache(tmp_path) -> Cache:
    writer = CacheWriter(tmp_path / "cache", Index("images", (4, 2, 2), "vae"), 2)
    for n in range(3):
        writer.add(torch.full((1, 8, 2, 2), float(n)), [f"a star {n}"])
    writer.finish()
    return Cache.open(tmp_path / "cache")


def values(cache: Cache) -> list[float]:
    return cache.moments([0, 1, 2], [0, 0, 0])[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_shard_that_is_cut_short_while_a_run_reads_it(cache, kept):
    """A file of a cache is cut short while training reads it: one line names it, where the process would have died."""
    assert values(cache) == [0, 1, 2]
    shard = cache.path / "shard-00001.safetensors"
    os.truncate(shard, kept if kept >= 0 else shard.stat().st_size - 1)
    with pytest.raises(UserError, match=r"shard-00001.safetensors was changed after it was written"):
        values(cache)
    assert cache.moments([1], [0])[0, 0, 0, 0] == 1


def test_a_shard_that_is_changed_while_a_run_reads_it(cache):
    """A file of a cache gets other content, and its old time: refused; copied, touched or moved it is the same."""
    shard = cache.path / "shard-00000.safetensors"
    data = shard.read_bytes()
    shard.rename(cache.path / "elsewhere")
    with pytest.raises(UserError, match=r"shard-00000.safetensors is missing; it was there"):
        values(cache)
    shard.write_bytes(data)
    assert values(cache) == [0, 1, 2]
    set_back(shard, data[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"shard-00000.safetensors was changed after it was written"):
        values(cache)


def test_captions_that_were_changed(cache):
    """Somebody edits the captions of a finished cache: training refuses them, instead of learning others."""
    path = cache.path / "shard-00000.jsonl"
    path.write_text(path.read_text().replace("star", "ring"))
    with pytest.raises(UserError, match=r"shard-00000.jsonl was changed after it was written"):
        cache.captions(0)


def make_tar(path: Path, text: bytes = b"a star", changed: int = 0) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.jpg", b"1"), ("a.txt", text), ("b.jpg", b"2"), ("b.txt", text)):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), changed
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_tar_that_changes_while_it_is_read(tmp_path):
    """A tar is cut short, written anew or deleted between two batches: one line names it, and no sample is left out."""
    path = make_tar(tmp_path / "a.tar")
    tars = Tars([path], "caption")
    whole = path.read_bytes()
    assert [data for _, data in tars.read(range(2))] == [b"1", b"2"]
    for data in (whole[:700], whole + whole):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a.tar was changed while it was read"):
            tars.read(range(1))
    path.unlink()
    with pytest.raises(FileNotFoundError) as refusal:
        tars.read(range(1))
    assert refusal.value.filename == str(path)


def test_another_tar_of_the_same_size(tmp_path, monkeypatch):
    """A tar is written anew with as many bytes: its cache is not gone on with, unless an earlier release began it."""
    first = Tars([make_tar(tmp_path / "a.tar")], "caption")
    same, former = first.identity, first.former
    assert Tars([make_tar(tmp_path / "a.tar")], "caption").identity == same
    other = Tars([make_tar(tmp_path / "a.tar", changed=1)], "caption")
    assert (other.former == former, other.identity == same) == (True, False)

    seen: list[str] = []
    monkeypatch.setattr(encode, "finished", lambda out, index, part: seen.append(index.recipe["source"]) or True)
    monkeypatch.setattr(encode, "join", lambda *_: None)
    index, framing = Index("images", (4, 2, 2), "vae"), encode.Framing(8, 0)

    def source_of() -> str:
        nobody: Any = None
        encode.encode(first, tmp_path / "cache", index, framing, nobody, nobody, batch=1, per_file=1, part=Part(1, 2))
        return seen.pop()

    now, before = encode._digest(same), encode._digest(former)
    assert source_of() == now
    begun = replace(index, recipe={"source": before}).to_dict()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "part-00000-of-00002-index.partial.json").write_text(json.dumps(begun))
    assert source_of() == before


def test_a_folder_of_images_that_is_gone(tmp_path):
    """A disk with images is unmounted half-way: the command stops; a picture alone that is gone is left out by name."""
    root = tmp_path / "images"
    root.mkdir()
    rows = [{"file_name": f"{n}.jpg", "text": "a star"} for n in range(3)]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "0.jpg").write_bytes(b"0")
    source = Files(metadata_folder(root))
    assert [(entry.problem, data) for entry, data in source.read(range(2))] == [(None, b"0"), ("missing", b"")]
    root.rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(OSError, match="the folder of images is gone") as refusal:
            source.read(range(2))
        assert refusal.value.filename == str(root)
        root.mkdir(exist_ok=True)  # a mount point is there without its disk


def test_a_teacher_that_changes_while_training_starts(tmp_path, monkeypatch):
    """The teacher's weights are written anew while training starts: refused, instead of a run of both."""
    teacher = make_mini_folder(tmp_path / "teacher", config=replace(TINY, sample_size=16))
    weights = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    real = session.load_folder

    def load_folder(path: Path):
        folder = real(path)
        make_mini_folder(tmp_path / "other", seed=1, config=replace(TINY, sample_size=16))
        (tmp_path / "other" / "unet" / weights.name).rename(weights)
        return folder

    monkeypatch.setattr(session, "load_folder", load_folder)
    monkeypatch.setattr(session, "fit", lambda *_: pytest.fail("it is trained"))
    with pytest.raises(UserError, match="--teacher names something that was changed while it was read"):
        session.run(replace(preset("smoke"), teacher=teacher, out=tmp_path / "run", device="cpu"))


def test_a_clock_that_goes_back(tmp_path):
    """Weights are changed, and get the time that they had: another fingerprint all the same."""
    folder = make_mini_folder(tmp_path / "teacher") / "unet"
    before, weights = fingerprint(folder), folder / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    set_back(weights, data[:-1] + bytes([data[-1] ^ 1]))
    assert fingerprint(folder) != before
    set_back(weights, data)
    assert fingerprint(folder) == before
