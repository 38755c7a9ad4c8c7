"""A set in the shape of COCO, with everything that is wrong in the wild: prepared, checked, trained on."""

import json
import multiprocessing
import random
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("diffusers")

from bilevel_fast import train
from bilevel_fast.base.errors import UserError
from bilevel_fast.data import check, commands
from bilevel_fast.data.cache import Cache
from bilevel_fast.data.pictures import Framing, upright_size
from bilevel_fast.models.folder import load_folder
from bilevel_fast.runs import session
from bilevel_fast.worlds.mini import TEACHER
from coco_folder import SIDE, SPLIT, CocoFolder, by_torchvision, make_coco
from sd_folder import make_sd_folder

SETTINGS = {"resolution": SIDE, "batch": 4, "per_file": 8, "threads": 1, "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> CocoFolder:
    return make_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_sd_folder(tmp_path_factory.mktemp("model") / "sd")


@pytest.fixture(scope="module")
def cache(coco, model, tmp_path_factory) -> Cache:
    return prepare(coco, model, tmp_path_factory.mktemp("cache") / "whole", views=2)


def prepare(coco: CocoFolder, model: Path, out: Path, **settings) -> Cache:
    cache = commands.make(commands.CocoArgs(root=coco.root, model=model, out=out, **SETTINGS | settings))
    assert cache is not None
    return cache


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(cache: Cache) -> list[dict]:
    return [
        json.loads(line)
        for shard in cache.index.shards
        for line in (cache.path / shard.captions).read_text().removesuffix("\n").split("\n")
    ]


def test_every_good_pair_is_there_and_every_other_is_named(cache, coco):
    found = {line["file"]: tuple(line["captions"]) for line in lines(cache)}
    assert list(found.items()) == list(coco.good.items())
    report = [json.loads(line) for line in (cache.path / "dropped.jsonl").read_text().splitlines()]
    pairs = {record["file"]: record["reason"] for record in report if "captions" in record}
    assert set(pairs) == set(coco.bad)
    assert all(coco.bad[file] in reason for file, reason in pairs.items()), pairs
    assert [(record["file"], record["reason"]) for record in report if "caption" in record] == coco.captions
    dropped = cache.index.dropped
    assert (dropped.pairs, dropped.captions) == (len(coco.bad), len(coco.captions))


def test_latents_are_those_of_their_own_picture(cache, coco, model):
    """None has moved: every view is encoded again, from pixels that PIL and torchvision made."""
    vae, framing = load_folder(model).vae, Framing(SIDE, seed=0)
    keys = {row["file_name"]: row["id"] for row in _annotations(coco)["images"]}
    wanted = torch.empty(len(coco.good), 2, *(8, 8, 8))
    for row, file in enumerate(coco.good):
        data = (coco.root / SPLIT / file).read_bytes()
        for view, crop in enumerate(framing.cut([keys[file]] * 2, range(2), [upright_size(data, file)] * 2)):
            wanted[row, view] = vae.moments(by_torchvision(data, crop)[None] / 127.5 - 1)[0]
    found = torch.stack([cache.moments(range(len(cache)), [view] * len(cache)) for view in range(2)], dim=1)
    distance = torch.cdist(found.flatten(0, 1).flatten(1), wanted.flatten(0, 1).flatten(1))
    assert torch.equal(distance.argmin(dim=1), torch.arange(2 * len(cache)))
    others = distance + torch.diag(torch.full((len(distance),), torch.inf))
    assert (distance.diag() < 0.1 * others.min(dim=1).values).all()


def _annotations(coco: CocoFolder) -> dict:
    return json.loads((coco.root / "annotations" / f"captions_{SPLIT}.json").read_text())


def test_sets_of_2014_are_named_otherwise(model, tmp_path):
    old = make_coco(tmp_path / "old", split="val2014", prefix="COCO_val2014_", plain=2)
    (tmp_path / "old" / "images").mkdir()
    (tmp_path / "old" / "val2014").rename(tmp_path / "old" / "images" / "val2014")
    cache = prepare(old, model, tmp_path / "cache", split="val2014")
    assert [line["file"] for line in lines(cache)] == list(old.good)
    assert all(name.startswith("COCO_val2014_") for name in old.good)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_join_to_the_whole(cache, coco, model, tmp_path, parts, monkeypatch):
    """Given as --shard, and where there are two, as torchrun says them."""
    for number in range(parts)[::-1]:  # the last part first
        assert not (tmp_path / "index.json").exists()
        if number < parts - 1:
            with pytest.raises(UserError, match="unfinished cache: it has part-"):
                Cache.open(tmp_path)
        shard = f"{number}/{parts}" if parts > 2 else None
        if shard is None:
            monkeypatch.setenv("RANK", str(number))
            monkeypatch.setenv("WORLD_SIZE", str(parts))
        args = commands.CocoArgs(root=coco.root, model=model, out=tmp_path, views=2, shard=shard, **SETTINGS)
        joined = commands.make(args)
        assert (joined is None) == (number > 0)
    joined = commands.make(args)  # done already: says what it said
    assert lines(joined) == lines(cache)
    assert joined.index.dropped == cache.index.dropped
    assert (tmp_path / "dropped.jsonl").read_bytes() == (cache.path / "dropped.jsonl").read_bytes()
    for view in (0, 1):
        every, views = range(len(cache)), [view] * len(cache)
        torch.testing.assert_close(joined.moments(every, views), cache.moments(every, views))


def test_killed_ten_times_the_cache_is_the_same_to_the_bit(tmp_path):
    coco = make_coco(tmp_path / "coco", plain=40)
    argv = ["--root", str(coco.root), "--model", str(TEACHER), "--resolution", "32", "--views", "8"]
    argv += ["--batch", "1", "--per-file", "1", "--threads", "1", "--device", "cpu", "--out"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bilevel_fast.data.commands", "nvidia.dali.fn", "PIL.JpegImagePlugin"])
    chance, kills = random.Random(0), 0
    while kills < 10:
        before = _done(tmp_path / "killed")
        child = context.Process(target=commands.images, args=("coco", [*argv, str(tmp_path / "killed")]))
        child.start()
        while child.is_alive() and _done(tmp_path / "killed") == before:
            time.sleep(0.002)
        time.sleep(0.005 * chance.random())
        assert child.is_alive(), "finished before it was killed often enough"
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    for name in ("killed", "whole"):
        child = context.Process(target=commands.images, args=("coco", [*argv, str(tmp_path / name)]))
        child.start()
        child.join()
        assert child.exitcode == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert Cache.open(tmp_path / "whole").index.samples == len(coco.good)


def _done(folder: Path) -> int:
    """Shards that a killed process would find: counted from outside, by what is written last."""
    try:
        fields = json.loads((folder / "index.partial.json").read_text())
        return len(fields["shards"]) + fields["dropped"]["pairs"]
    except FileNotFoundError:
        return 0


def test_a_full_disk_is_one_line_and_costs_nothing_saved(cache, coco, model, tmp_path, monkeypatch, capsys):
    args = commands.CocoArgs(root=coco.root, model=model, out=tmp_path, views=2, **SETTINGS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filling(commands.Bar):
        def __call__(self, done, total, note=None):
            if done == 8:  # one file is written
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    monkeypatch.setattr(commands, "Bar", Filling)
    try:
        with pytest.raises(OSError, match=r"File too large; 8 of .* images are done with; the same command goes on"):
            commands.make(args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.undo()
    saved = (tmp_path / "shard-00000.safetensors").stat()
    again = commands.make(args)
    assert files(again.path) == files(cache.path)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == saved.st_mtime_ns, "written once"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 128}, r"made with recipe.resolution 64, not 128"),
        ({"views": 3}, r"made with views 2, not 3"),
        ({"seed": 1}, r"made with recipe.seed 0, not 1"),
        ({"flip": False}, r"made with recipe.flip True, not False"),
        ({"split": "train2071"}, "captions_train2071.json is missing; did you mean .*'train2017'"),
        ({"resolution": 65}, r"--resolution 65 is no multiple of 8"),
        ({"resolution": 72}, r"latents of 9x9, no multiple of the UNet's stride 8; wanted a multiple of 64"),
        ({"resolution": 4}, r"the VAE cannot encode images of 4 pixels"),
        ({"per_file": 6}, "6 images per file are no multiple of the batch of 4"),
        ({"shard": "2/2"}, r"part 2/2: the first of n is 0/n"),
        ({"shard": "half"}, r"part 'half': wanted i/n"),
        ({"backend": "mixed"}, "decodes on a GPU, the device is cpu"),
        ({"views": 0}, "--views is 0"),
        ({"root": Path("nowhere")}, "captions_train2017.json is missing"),
    ],
)
def test_bad_settings_are_refused(cache, coco, model, settings, message):
    given = {"root": coco.root, "model": model, "out": cache.path, "views": 2} | SETTINGS | settings
    before = files(cache.path)
    with pytest.raises(UserError, match=message):
        commands.make(commands.CocoArgs(**given))
    assert files(cache.path) == before


def test_another_vae_is_refused_and_both_are_named(cache, coco, model, tmp_path):
    other = make_sd_folder(tmp_path / "other", seed=1)
    mine, theirs = (load_folder(path).vae_fingerprint for path in (model, other))
    assert mine != theirs
    with pytest.raises(UserError, match=f"made with vae '{mine}', not '{theirs}'"):
        prepare(coco, other, cache.path, views=2)


def test_prepared_checked_and_trained_on(coco, model, tmp_path, capsys):
    out = tmp_path / "cache"
    argv = ["--root", coco.root, "--model", model, "--out", out, "--resolution", SIDE, "--threads", 1, "--views", 2]
    commands.images("coco", [*map(str, argv)])
    assert f"left out: {len(coco.bad)} images, {len(coco.captions)} captions" in capsys.readouterr().out
    check.main([str(out)])
    assert capsys.readouterr().out.startswith(f"{out} is sound: {len(coco.good)} images")

    flags = ["--teacher", model, "--data", out, "--out", tmp_path / "run", "--upper.every", 0, "--log-every", 1]
    flags += ["--lower.steps", 3, "--lower.batch", 6, "--lower.warmup", 0, "--prune.method", "uniform"]
    config = train.parse([*map(str, flags), "--device", "cpu"])
    session.run(config)
    records = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert [record["images"] for record in records] == [6, 12, 18]
    before, after = (load_folder(path).unet().state_dict() for path in (model, tmp_path / "run" / "student"))
    assert any(before[name].shape != after[name].shape or not torch.equal(before[name], after[name]) for name in after)

    (out / "shard-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00000.safetensors is missing"):
        session.run(replace(config, out=tmp_path / "second"))


def test_a_cache_of_another_vae_is_not_trained_on(cache, model, tmp_path):
    other = make_sd_folder(tmp_path / "other", seed=1)
    mine, theirs = (load_folder(path).vae_fingerprint for path in (model, other))
    flags = ["--teacher", other, "--data", cache.path, "--out", tmp_path / "run", "--upper.every", 0, "--device", "cpu"]
    with pytest.raises(UserError, match=f"latents of VAE {mine}, the model has VAE {theirs}"):
        session.run(train.parse([*map(str, flags), "--prune.method", "uniform"]))
