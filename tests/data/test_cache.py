"""The latent cache: what comes out is what went in, damage is named, a killed writer goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.cache import Cache, Index
from bilevel_fast.data.sources import MemorySource, exact_moments
from bilevel_fast.data.writer import CacheWriter
from bilevel_fast.models.architecture import MINI

SHAPE = (4, 3, 5)  # neither square nor even: a swap of height and width shows
IMAGES = Index("images", SHAPE, vae="0123456789abcdef", views=2, dtype="float32")
CONCEPTS = Index("concepts", SHAPE, vae="0123456789abcdef", recipe={"seed": 1, "sizes": (3, 5)})


def _fill(writer: CacheWriter, samples: range) -> list[torch.Tensor]:
    channels, height, width = SHAPE
    moments = [
        torch.randn(writer.index.views, 2 * channels, height, width, generator=torch.Generator().manual_seed(sample))
        for sample in samples
    ]
    for sample, values in zip(samples, moments, strict=True):
        if writer.index.kind == "images":
            writer.add(values, [f"caption {sample}.{i}" for i in range(1 + sample % 3)])
        else:
            writer.add(values, [f"a star by X {sample}"], anchor=f"a star {sample}")
    return moments


def _image_cache(path: Path, samples: int = 7) -> tuple[Cache, list[torch.Tensor]]:
    writer = CacheWriter(path, IMAGES, shard_samples=3)
    moments = _fill(writer, range(samples))
    return writer.finish(), moments


def test_reads_back_what_was_written_in_any_order(tmp_path):
    cache, moments = _image_cache(tmp_path)
    assert [shard.samples for shard in cache.index.shards] == [3, 3, 1]
    assert (len(cache), cache.latent_shape, cache.views) == (7, SHAPE, 2)
    order, views = [6, 0, 3, 3, 2], [1, 0, 1, 0, 1]
    expected = torch.stack([moments[i][v] for i, v in zip(order, views, strict=True)])
    torch.testing.assert_close(cache.moments(order, views), expected, rtol=0, atol=0)
    assert cache.captions(5) == ("caption 5.0", "caption 5.1", "caption 5.2")
    assert cache.anchor(5) is None
    cache.verify()


@pytest.mark.situation
def test_a_latent_that_is_no_number(tmp_path):
    """A cache with a latent that is NaN, written by something else: training names file and sample when it reads it."""
    _image_cache(tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    moments = load_file(path)["moments"]
    moments[2, 1, 3, 2, 4] = float("nan")
    save_file({"moments": moments}, path)
    cache = Cache.open(tmp_path)
    assert cache.moments([5, 6], [0, 0]).isfinite().all()
    with pytest.raises(UserError, match=r"shard-00001.safetensors: latents of sample 2 are not finite"):
        cache.moments([0, 5], [0, 1])


def test_half_precision_comes_back_as_float32(tmp_path):
    writer = CacheWriter(tmp_path, CONCEPTS)
    moments = _fill(writer, range(2))
    cache = writer.finish()
    torch.testing.assert_close(cache.moments([1], [0]), moments[1].half().float(), rtol=0, atol=0)
    assert (cache.captions(1), cache.anchor(1)) == (("a star by X 1",), "a star 1")


def test_captions_survive_line_separators_and_scripts(tmp_path):
    captions = ["一颗红星", "line\u2028separator\x85and\nnewline", 'a "quote" \\ 🌟']
    writer = CacheWriter(tmp_path, IMAGES)
    writer.add(torch.zeros(2, 8, 3, 5), captions)
    assert writer.finish().captions(0) == tuple(captions)


@pytest.mark.parametrize("index", [IMAGES, CONCEPTS], ids=["images", "concepts"])
@pytest.mark.parametrize("killed_after", [0, 1, 3, 5, 6])
def test_a_killed_writer_goes_on_to_the_same_files(tmp_path, index, killed_after):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    writer = CacheWriter(whole, index, shard_samples=3)
    _fill(writer, range(7))
    writer.finish()

    _fill(CacheWriter(halves, index, shard_samples=3), range(killed_after))  # and the process dies
    with pytest.raises(UserError, match="not a cache" if killed_after < 3 else "unfinished"):
        Cache.open(halves)
    writer = CacheWriter(halves, index, shard_samples=3)
    assert writer.samples == killed_after // 3 * 3
    _fill(writer, range(writer.samples, 7))
    writer.finish()
    assert {p.name: p.read_bytes() for p in halves.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_writer_refuses_a_folder_that_is_not_its_own(tmp_path):
    _fill(CacheWriter(tmp_path, CONCEPTS, shard_samples=1), range(1))
    with pytest.raises(UserError, match=r"holds a cache made with recipe.seed 1, not 2"):
        CacheWriter(tmp_path, replace(CONCEPTS, recipe={"seed": 2, "sizes": (3, 5)}))
    CacheWriter(tmp_path, CONCEPTS).finish()
    with pytest.raises(UserError, match="already holds a finished cache"):
        CacheWriter(tmp_path, CONCEPTS)


def test_a_writer_notices_that_a_finished_shard_was_damaged(tmp_path):
    _fill(CacheWriter(tmp_path, CONCEPTS, shard_samples=1), range(2))
    _flip_last_byte(tmp_path / "shard-00001.safetensors")
    with pytest.raises(UserError, match=r"shard-00001.safetensors was changed"):
        CacheWriter(tmp_path, CONCEPTS, shard_samples=1)


def test_a_writer_refuses_what_half_precision_cannot_hold(tmp_path):
    writer = CacheWriter(tmp_path, replace(CONCEPTS, dtype="float16"))
    with pytest.raises(UserError, match=r"sample 0 \('a star'\): latents are not finite in float16"):
        writer.add(torch.full((1, 8, 3, 5), 1e5), ["a star"], anchor="")
    with pytest.raises(UserError, match="no samples"):
        writer.finish()


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_verify_finds_one_flipped_bit(tmp_path):
    cache, _ = _image_cache(tmp_path)
    _flip_last_byte(tmp_path / "shard-00002.safetensors")
    cache = Cache.open(tmp_path)  # reads no data, so does not see it
    with pytest.raises(UserError, match=r"shard-00002.safetensors was changed"):
        cache.verify()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _reshape(path: Path) -> None:
    save_file({"moments": load_file(path)["moments"].transpose(-1, -2).contiguous()}, path)


def _cast(path: Path) -> None:
    save_file({"moments": load_file(path)["moments"].half()}, path)


def _rename(path: Path) -> None:
    save_file({"latents": load_file(path)["moments"]}, path)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("shard-00001.safetensors", Path.unlink, r"shard-00001.safetensors is missing"),
        ("shard-00001.safetensors", _truncate, r"shard-00001.safetensors is cut short"),
        ("shard-00001.safetensors", _reshape, r"shape \[3, 2, 8, 5, 3\], index.json says float32 \[3, 2, 8, 3, 5\]"),
        ("shard-00001.safetensors", _cast, r"moments are float16 .* says float32"),
        ("shard-00001.safetensors", _rename, r"wanted a tensor 'moments', found \['latents'\]"),
        ("shard-00001.jsonl", Path.unlink, r"shard-00001.jsonl is missing"),
        ("index.json", Path.unlink, "not a cache: index.json is missing"),
        ("index.json", _truncate, None),  # only the final newline: still whole
        ("index.json", lambda path: path.write_text("{"), "index.json is not JSON"),
        ("index.json", lambda path: path.write_text("[]"), "wanted a JSON object, found list"),
    ],
)  # fmt: skip
def test_open_names_what_is_damaged(tmp_path, file, damage, message):
    _image_cache(tmp_path)
    damage(tmp_path / file)
    if message is None:
        Cache.open(tmp_path)
        return
    with pytest.raises(UserError, match=message):
        Cache.open(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 3, "version 3, wanted 'bilevel_fast.cache' version 2"),
        ("format", "webdataset", "format 'webdataset'"),
        ("kind", "videos", "field kind is wrong: 'videos'"),
        ("latent_shape", [4, 3], "field latent_shape is wrong"),
        ("views", 0, "field views is wrong: 0"),
        ("dtype", "bfloat16", "field dtype is wrong: 'bfloat16'"),
        ("vae", None, "field vae is wrong"),
        ("samples", 8, "field samples is wrong: 8"),
        ("colour", "red", "unknown: .*colour"),
        ("shards", [{"file": "../x.safetensors", "samples": 7, "sha256": "", "captions_sha256": ""}], "field shards"),
        ("shards", [{"file": "x.safetensors"}], "missing"),
        ("shards", None, "missing or unknown"),
    ],
)  # fmt: skip
def test_open_names_a_wrong_field_of_the_index(tmp_path, field, value, message):
    _image_cache(tmp_path)
    fields = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(UserError, match=message):
        Cache.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"captions": ["a"]}\n', "has 1 lines for 3 samples"),
        ('{"captions": ["a"]}\n{"captions": []}\n{"captions": ["a"]}\n', "line 2: wanted 'captions'"),
        ('{"captions": ["a"]}\n{"captions": "a"}\n{"captions": ["a"]}\n', "line 2: wanted 'captions'"),
        ('{"captions": ["a"]}\n{"captions": ["a"]}\n["a"]\n', "line 3: wanted a JSON object, found list"),
        ('{"captions": ["a"]}\n{"captions": ["a"\n', "line 2 is not JSON"),
    ],
)
def test_bad_captions_are_named_by_line(tmp_path, text, message):
    cache, _ = _image_cache(tmp_path)
    (tmp_path / "shard-00000.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        cache.captions(0)


def test_a_model_with_other_latents_is_refused(tmp_path):
    index = replace(IMAGES, latent_shape=(12, 8, 6), views=1)
    writer = CacheWriter(tmp_path, index)
    writer.add(torch.zeros(1, 24, 8, 6), ["a"])
    cache = writer.finish()
    with pytest.raises(UserError, match="8x6 are no multiple of the UNet's stride 4"):
        cache.check_model(MINI, index.vae)
    with pytest.raises(UserError, match="12 channels, the UNet reads 4"):
        cache.check_model(replace(MINI, in_channels=4), index.vae)
    two_levels = replace(
        MINI,
        block_out_channels=(48, 96),
        num_heads=(3, 6),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(UserError, match="VAE 0123456789abcdef, the model has VAE fedcba"):
        cache.check_model(two_levels, "fedcba")
    cache.check_model(two_levels, index.vae)


def test_memory_source_keeps_the_same_protocol():
    latents = torch.randn(5, *SHAPE)
    source = MemorySource(exact_moments(latents), [["a", "b"]] * 5, anchors=list("vwxyz"))
    assert (len(source), source.latent_shape, source.views) == (5, SHAPE, 1)
    mean, logvar = source.moments([4, 1], [0, 0]).chunk(2, dim=1)
    torch.testing.assert_close(mean, latents[[4, 1]], rtol=0, atol=0)
    assert (logvar == -30).all()
    assert (source.captions(2), source.anchor(2)) == (("a", "b"), "x")


@pytest.mark.parametrize(
    ("moments", "captions", "message"),
    [
        (torch.zeros(2, 8, 3, 5), [["a"]] * 2, r"wanted \(N, V, 2C, H, W\)"),
        (torch.zeros(2, 1, 7, 3, 5), [["a"]] * 2, r"wanted \(N, V, 2C, H, W\)"),
        (torch.zeros(2, 1, 8, 3, 5), [["a"]], "1 captions came for 2 samples"),
        (torch.zeros(2, 1, 8, 3, 5), [["a"], "a red star"], "sample 1 wants a list"),
        (torch.zeros(2, 1, 8, 3, 5), [["a"], []], "sample 1 wants a list"),
    ],
)
def test_memory_source_refuses_what_does_not_fit(moments, captions, message):
    with pytest.raises(UserError, match=message):
        MemorySource(moments, captions)


class _Died(BaseException):
    """The process is gone: nothing may catch it."""


def _make_with_gaps(path: Path) -> None:
    """A cache of ten entries, four of which are dropped and one has a caption too many; goes on where it is."""
    writer = CacheWriter(path, IMAGES, shard_samples=3)
    for entry in range(writer.entries, 10):
        if entry in (3, 4, 5, 8):
            writer.drop(f"{entry}.jpg", 2, "cut short")
            continue
        if entry == 6:
            writer.drop_caption("6.jpg", "twice ✨", "duplicate")
        values = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(entry))
        writer.add(values, [f"caption {entry}"], file=f"{entry}.jpg")
    writer.finish()


def test_dropped_entries_leave_no_hole_and_are_counted(tmp_path):
    _make_with_gaps(tmp_path)
    cache = Cache.open(tmp_path)
    assert [cache.captions(i)[0] for i in range(len(cache))] == [f"caption {i}" for i in (0, 1, 2, 6, 7, 9)]
    assert [shard.samples for shard in cache.index.shards] == [3, 2, 1], "a file holds what is left of three entries"
    assert (cache.index.dropped.pairs, cache.index.dropped.captions, cache.index.entries) == (4, 1, 10)
    report = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert [record["file"] for record in report] == ["3.jpg", "4.jpg", "5.jpg", "6.jpg", "8.jpg"]


def test_a_death_before_any_write_changes_nothing(tmp_path, monkeypatch):
    """Every write of a making, in turn, is the one that never happens; what follows ends with the same bytes."""
    from bilevel_fast.base import files
    from bilevel_fast.data import writer

    _make_with_gaps(tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    really_write, deaths, left = files.write_atomic, 0, [0]

    def write(path: Path, data: bytes) -> None:
        if not left[0]:
            raise _Died
        left[0] -= 1
        really_write(path, data)

    for last in range(100):
        left[0] = last
        with monkeypatch.context() as patch:
            patch.setattr(writer, "write_atomic", write)
            patch.setattr(files, "write_atomic", write)  # what write_json calls
            try:
                _make_with_gaps(tmp_path / str(last))
            except _Died:
                deaths += 1
            else:
                break
        _make_with_gaps(tmp_path / str(last))
        assert {path.name: path.read_bytes() for path in (tmp_path / str(last)).iterdir()} == whole, last
    assert deaths == last == 13, "three files of latents, three of captions, two reports, four lists and the index"


def test_a_report_that_was_changed_is_not_gone_on_with(tmp_path):
    writer = CacheWriter(tmp_path, IMAGES, shard_samples=1)
    writer.drop("0.jpg", 1, "empty")
    (tmp_path / "dropped.jsonl").write_text('{"file": "1.jpg", "captions": 1, "reason": "empty"}\n')
    with pytest.raises(UserError, match=r"dropped.jsonl was changed"):
        CacheWriter(tmp_path, IMAGES, shard_samples=1)


def test_version_1_is_still_read(tmp_path):
    cache, _ = _image_cache(tmp_path)
    fields = json.loads((tmp_path / "index.json").read_text())
    del fields["dropped"]
    (tmp_path / "index.json").write_text(json.dumps(fields | {"version": 1}))
    assert Cache.open(tmp_path).index == cache.index
