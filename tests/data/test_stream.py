"""Images straight into training: the pixels of a cache, no bad one on the way, and on in the middle of an epoch."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("diffusers")

from bilevel_fast import train
from bilevel_fast.base.errors import UserError
from bilevel_fast.data import check, commands
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.cache import Cache, Index
from bilevel_fast.data.stream import ImageStream, open_images
from bilevel_fast.data.writer import CacheWriter
from bilevel_fast.models.folder import load_folder
from bilevel_fast.ops.randomness import Stream, integers, normal
from bilevel_fast.pruning import calibration_set
from bilevel_fast.runs import session
from bilevel_fast.worlds.mini import TEACHER
from coco_folder import SIDE, CocoFolder, encoded, make_coco, picture
from sd_folder import make_sd_folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> CocoFolder:
    return make_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_sd_folder(tmp_path_factory.mktemp("model") / "sd")


def arguments(coco: CocoFolder, model: Path, out: Path, **settings) -> commands.CocoArgs:
    given = {"resolution": SIDE, "threads": 1, "device": "cpu", "latents": False, "seed": 5} | settings
    return commands.CocoArgs(root=coco.root, model=model, out=out, **given)


@pytest.fixture(scope="module")
def images(coco, model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("images") / "list"
    commands.make_list(arguments(coco, model, out))
    return out


def test_the_list_is_what_a_cache_would_hold(images, coco, model, tmp_path):
    settings = {"latents": True, "views": 3, "batch": 4, "per_file": 4, "dtype": "float32"}
    cache = commands.make(arguments(coco, model, tmp_path, **settings))
    stream = open_images(images, load_folder(model))
    assert isinstance(stream, ImageStream)
    assert isinstance(cache, Cache)
    assert [stream.captions(i) for i in range(len(stream))] == list(coco.good.values())
    assert (images / "dropped.jsonl").read_bytes() == (tmp_path / "dropped.jsonl").read_bytes()
    assert (stream.latent_shape, stream.anchor(0)) == (cache.latent_shape, None)
    order = [3, 0, 11, 7, 7, *range(len(stream))]
    for view in range(3):
        views = [view] * len(order)
        torch.testing.assert_close(stream.moments(order, views), cache.moments(order, views), rtol=1e-4, atol=1e-4)
    wide = list(coco.good).index("000000000008.jpg")
    assert not torch.allclose(stream.moments([wide], [4000]), stream.moments([wide], [4001]), atol=1e-2)


def test_batches_can_be_made_again_from_any_step(images, model):
    folder = load_folder(model)
    first, second = (Batches(open_images(images, folder), folder.text_encoder, 5, seed=1) for _ in range(2))
    steps = [first(step) for step in range(6)]  # more than two epochs
    for step in (4, 2, 5):
        again = second(step)
        assert torch.equal(again.latents, steps[step].latents)
        assert again.captions == steps[step].captions
    assert not torch.equal(steps[0].latents, steps[3].latents)


def test_captions_stay_with_their_images(images, coco, model):
    """Each latent is the one that its caption's image gives, at the view and with the noise of its own index."""
    folder = load_folder(model)
    stream = open_images(images, folder)
    owner = {caption: position for position, every in enumerate(coco.good.values()) for caption in every}
    batches = Batches(stream, folder.text_encoder, 8, seed=2)
    for step in range(4):
        batch = batches(step)
        views = integers(2, Stream.VIEW, batch.index, stream.views).tolist()
        mean, logvar = stream.moments([owner[caption] for caption in batch.captions], views).chunk(2, dim=1)
        noise = normal(2, Stream.POSTERIOR, batch.index, stream.latent_shape)
        torch.testing.assert_close(batch.latents, mean + (logvar / 2).exp() * noise, rtol=1e-4, atol=1e-4)


def test_the_mini_world_streams_too(coco, tmp_path):
    commands.make_list(arguments(coco, TEACHER, tmp_path, resolution=32))
    stream = open_images(tmp_path, load_folder(TEACHER))
    assert stream.moments([0, 1], [0, 1]).shape == (2, 24, 16, 16)


def test_pruning_tries_the_teacher_on_images(images, model):
    folder = load_folder(model)
    found = calibration_set(folder, open_images(images, folder), images=4, batch=2)
    latents, text = found[1]
    assert (latents.shape, text.shape) == ((2, 4, 8, 8), (2, 77, 32))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_device_encodes_images_as_the_networks_compute(images, model, tmp_path, precision):
    """A device that is not the CPU, for a run and for the pruning before it."""
    flags = ["--teacher", str(model), "--data", str(images), "--upper.every", "0", "--device", "meta"]
    config, folder = train.parse([*flags, "--precision", precision]), load_folder(model)
    vae = session.gather(config, folder, folder.unet(), [], tmp_path).data._vae.model
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert (vae.device.type, vae.dtype) == ("meta", wanted)
    assert folder.vae.model.dtype == torch.float32


def test_trained_on_and_resumed_in_the_middle_of_an_epoch(images, model, tmp_path):
    flags = ["--teacher", model, "--data", images, "--upper.every", 0, "--lower.batch", 5, "--lower.warmup", 0]
    flags += ["--prune.method", "uniform", "--device", "cpu", "--log-every", 1, "--checkpoint-every", 2]
    config = train.parse([*map(str, flags)])
    whole, parts = (replace(config, out=tmp_path / name) for name in ("whole", "parts"))
    session.run(replace(whole, lower=replace(config.lower, steps=6)))
    session.run(replace(parts, lower=replace(config.lower, steps=4)))  # 20 of 26 images of the second epoch
    shutil.rmtree(parts.out / "student")
    shutil.copy(whole.out / "config.json", parts.out / "config.json")
    session.run(replace(parts, lower=replace(config.lower, steps=6), resume=True))
    first, second = (load_folder(place.out / "student").unet().state_dict() for place in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_bank_of_another_size_is_refused(images, model, tmp_path):
    bank = tmp_path / "bank"
    index = Index("concepts", (4, 16, 16), load_folder(model).vae_fingerprint)
    writer = CacheWriter(bank, index)
    writer.add(torch.zeros(1, 8, 16, 16), ["a star by monet"], anchor="a star")
    writer.finish()
    flags = ["--teacher", model, "--data", images, "--concepts", bank, "--out", tmp_path / "run", "--device", "cpu"]
    config = train.parse([*map(str, flags), "--prune.method", "uniform"])
    with pytest.raises(UserError, match=r"--data has latents of 8x8, .*bank of 16x16"):
        session.run(config)


@pytest.fixture
def own(tmp_path, model) -> tuple[Path, Path]:
    """A folder of three images and its list, to be damaged."""
    root = tmp_path / "images"
    root.mkdir()
    rows = []
    for number in range(3):
        (root / f"{number}.jpg").write_bytes(encoded(picture(number, 90, 80)))
        rows.append(json.dumps({"file_name": f"{number}.jpg", "text": f"a star {number}"}))
    (root / "metadata.jsonl").write_text("\n".join(rows))
    args = {"resolution": SIDE, "threads": 1, "device": "cpu", "latents": False}
    commands.make_list(commands.FolderArgs(root=root, model=model, out=tmp_path / "list", **args))
    return root, tmp_path / "list"


def _other(path: Path) -> None:
    path.write_bytes(encoded(picture(9, 90, 80)))


def _scramble(path: Path) -> None:
    """Of the same size, but not to be decoded."""
    data = path.read_bytes()
    path.write_bytes(data[:-400] + bytes(398) + data[-2:] if data[-2:] != b"\xff\xd9" else data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, "1.jpg: missing"), (_other, "1.jpg: [0-9]+ bytes, [0-9]+ when"), (_scramble, "1.jpg: [0-9]+ bytes")],
)
def test_an_image_that_changed_is_named(own, model, capsys, damage, message):
    root, images = own
    stream = open_images(images, load_folder(model))
    check.main([str(images)])
    assert f"{images} is sound: a list of 3 images" in capsys.readouterr().out
    damage(root / "1.jpg")
    stream.moments([0, 2], [0, 0])
    with pytest.raises(UserError, match=message):
        stream.moments([0, 1, 2], [0, 0, 0])
    with pytest.raises(SystemExit) as end:
        check.main([str(images)])
    assert end.value.code == 1
    assert "1.jpg" in capsys.readouterr().out


def test_a_list_that_was_changed_is_refused(own, model):
    _, images = own
    lines = (images / "images.jsonl").read_text()
    (images / "images.jsonl").write_text(lines.replace("a star 1", "a stir 1"))
    with pytest.raises(UserError, match=r"images.jsonl was changed after it was written"):
        open_images(images, load_folder(model))


def test_lists_are_for_one_model_and_made_once(own, model, tmp_path, coco):
    _, images = own
    other = load_folder(make_sd_folder(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match=f"latents of VAE .*, the model has VAE {other.vae_fingerprint}"):
        open_images(images, other)
    with pytest.raises(UserError, match="already holds a finished cache or list"):
        commands.make_list(arguments(coco, model, images))
    with pytest.raises(UserError, match="--no-latents lists files of a folder"):
        commands.make_list(arguments(coco, model, tmp_path / "part", shard="0/2"))


def test_nothing_usable_is_no_list(own, model, tmp_path):
    root, _ = own
    for number in range(3):
        (root / f"{number}.jpg").write_bytes(b"")
    args = {"resolution": SIDE, "threads": 1, "device": "cpu", "latents": False}
    with pytest.raises(UserError, match="none of 3 images can be used"):
        commands.make_list(commands.FolderArgs(root=root, model=model, out=tmp_path / "new", **args))
    assert not (tmp_path / "new").exists()
