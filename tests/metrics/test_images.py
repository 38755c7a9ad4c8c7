"""Folders of pictures by id, and what is said about broken ones."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.dali import Decoder
from bilevel_fast.data.pictures import Framing, Unusable, upright_size
from bilevel_fast.metrics.images import Batching, Pictures, open_rgb, read_rgb
from coco_folder import encoded, turned
from measuring import doodle, image_folder


def test_a_sampled_folder_is_read_by_id(tmp_path):
    folder = image_folder(tmp_path / "x", {"b": doodle(1), "a": doodle(2)}, {"a": "star", "b": "ring"}, seed=9)
    found = Pictures.open(folder)
    assert [file.name for file in found.of(["a", "b"])] == ["a.png", "b.png"]
    assert found.entries["a"].prompt == "star"
    assert found.settings["recipe"]["seed"] == 9


def test_a_plain_folder_has_ids_of_file_names(tmp_path):
    doodle(1).save(tmp_path / "000000000139.jpg")
    doodle(2).save(tmp_path / "7.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert set(Pictures.open(tmp_path).files) == {"000000000139", "7"}


def test_two_files_of_one_id(tmp_path):
    doodle(1).save(tmp_path / "7.jpg")
    doodle(2).save(tmp_path / "7.png")
    with pytest.raises(UserError, match=r"7\.jpg and 7\.png share the id '7'"):
        Pictures.open(tmp_path)


def test_an_id_that_the_index_has_twice(tmp_path):
    folder = image_folder(tmp_path / "x", {"a": doodle(1)}, {"a": "star"})
    index = folder / "index.jsonl"
    index.write_text(index.read_text() + index.read_text().replace("star", "ring"))
    with pytest.raises(UserError, match="'a'"):
        Pictures.open(folder)


def test_nothing_to_measure(tmp_path):
    with pytest.raises(UserError, match="is empty"):
        Pictures.open(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Pictures.open(tmp_path / "nowhere")


def test_latents_are_no_pictures(tmp_path):
    folder = image_folder(tmp_path / "x", {"a": doodle(1)}, {"a": "star"})
    (folder / "a.png").rename(folder / "a.safetensors")
    (folder / "index.jsonl").write_text(
        json.dumps({"id": "a", "prompt": "star", "seed": 0, "file": "a.safetensors"}) + "\n"
    )
    with pytest.raises(UserError, match="holds latents"):
        Pictures.open(folder)


def test_missing_ids_are_named(tmp_path):
    folder = image_folder(tmp_path / "x", {"a": doodle(1)}, {"a": "star"})
    with pytest.raises(UserError, match=r"lacks 4 of 5 wanted images: b, c, d, \.\.\."):
        Pictures.open(folder).of(["a", "b", "c", "d", "e"])


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("damage", ["empty", "header", "half", "end", "bit"])
def test_a_picture_that_is_not_whole(tmp_path, suffix, damage):
    path = tmp_path / f"a.{suffix}"
    doodle(1).save(path)
    whole = bytearray(path.read_bytes())
    if damage == "bit" and suffix == "png":
        whole[len(whole) // 2] ^= 1
    kept = {"empty": 0, "header": 30, "half": len(whole) // 2, "end": -20, "bit": len(whole)}[damage]
    path.write_bytes(whole[:kept])
    if damage == "bit" and suffix == "jpg":
        assert open_rgb(path).size == (64, 64)  # a JPEG has no check sums
        return
    with pytest.raises(UserError, match=rf"a\.{suffix} is no whole picture"):
        open_rgb(path)


def test_every_kind_becomes_rgb(tmp_path):
    color = np.asarray(doodle(3))
    for mode in ("L", "RGBA", "P", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.fromarray(color).convert(mode).save(path)
        assert read_rgb(path).shape == (64, 64, 3)
    Image.fromarray(color).save(tmp_path / "exact.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "exact.png"), color)


def sixteen_bits(channels: int) -> bytes:
    """A PNG of colours of 16 bits, (64, 64, 3 or 4), which PIL cannot write."""
    pixels = np.random.default_rng(1).integers(0, 65536, (64, 64, channels), dtype=np.uint16).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 64, 64, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def kinds() -> dict[str, bytes]:
    """Pictures of 64x64 that decoders may read otherwise than each other, as files."""
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (64, 64, 4), dtype=np.uint8)
    smooth = Image.fromarray(color[..., :3]).resize((8, 8)).resize((64, 64), Image.Resampling.BICUBIC)
    return {
        "16 bits.png": encoded(Image.fromarray(rng.integers(0, 65536, (64, 64), dtype=np.uint16)), "PNG"),
        "colours of 16 bits.png": sixteen_bits(3),
        "colours of 16 bits and alpha.png": sixteen_bits(4),
        "alpha.png": encoded(Image.fromarray(color), "PNG"),
        "grey and alpha.png": encoded(Image.fromarray(color).convert("LA"), "PNG"),
        "palette.png": encoded(smooth.quantize(16), "PNG"),
        "bits.png": encoded(smooth.convert("1"), "PNG"),
        "grey.jpg": encoded(smooth.convert("L")),
        "cmyk.jpg": encoded(smooth.convert("CMYK"), quality=95),
        "turned.jpg": encoded(smooth, exif=turned(6), subsampling=0),
        "mirrored.jpg": encoded(smooth, exif=turned(5), subsampling=0),
        "plain.webp": encoded(smooth, "WEBP", lossless=True),
        "plain.bmp": encoded(smooth, "BMP"),
    }


@pytest.mark.situation
@pytest.mark.parametrize("name", kinds())
def test_metrics_see_what_prepare_sees(tmp_path, name):
    """Pictures of 16 bits, with alpha or an EXIF orientation: `evaluate` decodes them as `prepare` does."""
    pytest.importorskip("nvidia.dali")
    data, framing = kinds()[name], Framing(64, 0, False, "center")
    decoder = Decoder(64, 1, 1, "cpu", torch.device("cpu"), 1)
    (pixels,), (reason,) = decoder([data], [framing.cut([0], [0], [upright_size(data, name)])])
    assert reason is None
    theirs = ((pixels[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    (tmp_path / name).write_bytes(data)
    off = np.abs(read_rgb(tmp_path / name).astype(int) - theirs)
    assert off.max() <= (1 if name.endswith(".jpg") else 0)
    assert theirs.std() > 3  # so neither is empty


@pytest.mark.situation
def test_another_kind_than_its_name_says(tmp_path):
    """A PNG named .jpg: refused by `evaluate`, as `prepare` leaves it out."""
    (tmp_path / "a.jpg").write_bytes(kinds()["alpha.png"])
    with pytest.raises(UserError, match=r"a\.jpg is no whole picture: is PNG, its name says JPEG"):
        open_rgb(tmp_path / "a.jpg")


@pytest.mark.situation
@pytest.mark.parametrize(("name", "kind"), [("deep/x.png", "PNG"), ("x.gif", "GIF"), ("x.TIFF", "TIFF")])
def test_pictures_that_would_be_left_out(tmp_path, name, kind):
    """Pictures in folders of their own, or of kinds that are not read: refused, instead of measured without them."""
    doodle(1).save(tmp_path / "7.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(encoded(doodle(2), kind))
    with pytest.raises(UserError, match=rf"1 of 2 pictures would be left out: {name}; wanted all of them in"):
        Pictures.open(tmp_path)


@pytest.mark.situation
def test_bitmaps_count(tmp_path):
    """A folder of .bmp and .jpe beside .png: all are measured; other files are named as left out."""
    doodle(1).save(tmp_path / "1.bmp")
    doodle(2).save(tmp_path / "2.jpe", "JPEG")
    doodle(3).save(tmp_path / "3.png")
    (tmp_path / "captions.txt").write_text("a star")
    (tmp_path / "._3.png").write_bytes(b"of a Mac")
    found = Pictures.open(tmp_path)
    assert set(found.files) == {"1", "2", "3"}
    assert found.notes == [f"1 files of {tmp_path} are no pictures and are left out: captions.txt"]


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_batches_keep_the_order(tmp_path, size):
    files = [tmp_path / str(n) for n in range(7)]
    found = list(Batching(size).measured(files, lambda file: int(file.name), torch.tensor, "numbers"))
    assert torch.cat(found).tolist() == list(range(7))
    assert [len(part) for part in found[:-1]] == [min(size, 7)] * (len(found) - 1)


@pytest.mark.situation
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels(tmp_path):
    """A small file that would be 144 million pixels: refused by its header, and nothing is decoded."""
    Image.new("1", (12_000, 12_000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png is no whole picture: has 12000x12000 pixels, wanted at most 1342"):
        open_rgb(tmp_path / "a.png")


@pytest.mark.situation
def test_a_pipe_named_png(tmp_path):
    """A pipe among the pictures of a folder: refused by name, and not waited for."""
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png is no regular file"):
        open_rgb(Pictures.open(tmp_path).files["a"])


@pytest.mark.situation
def test_an_eps_named_png_starts_no_ghostscript(tmp_path, monkeypatch):
    """A picture is an EPS with another name: refused, and the program that would draw it is not called."""
    called = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **_: called.append(args))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png is no whole picture"):
        open_rgb(tmp_path / "a.png")
    with pytest.raises(Unusable, match="not an image"):
        upright_size((tmp_path / "a.png").read_bytes(), "a.png")
    assert not called
