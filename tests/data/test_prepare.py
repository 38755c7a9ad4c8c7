"""Folders with metadata.jsonl, webdataset tars, `prepare check`, and the command line."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("nvidia.dali")

from bilevel_fast import prepare
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import sha256
from bilevel_fast.data import check, commands
from bilevel_fast.data.cache import Cache
from bilevel_fast.worlds.mini import TEACHER
from coco_folder import encoded, picture
from commands import run_command

SETTINGS = {"model": TEACHER, "resolution": 32, "batch": 2, "per_file": 4, "threads": 1, "device": "cpu"}
JPEGS = [encoded(picture(seed, 60 + 10 * seed, 90)) for seed in range(6)]


def lines(cache: Cache) -> list[tuple[str, tuple[str, ...]]]:
    found = []
    for shard in cache.index.shards:
        for line in (cache.path / shard.captions).read_text().removesuffix("\n").split("\n"):
            fields = json.loads(line)
            found.append((fields["file"], tuple(fields["captions"])))
    return found


def report(cache: Cache) -> dict[str, str]:
    return {
        record["file"]: record["reason"]
        for record in map(json.loads, (cache.path / "dropped.jsonl").read_text().splitlines())
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    (root / "a.jpg").write_bytes(JPEGS[0])
    (root / "deep" / "b.jpg").write_bytes(JPEGS[1])
    (root / "c.jpg").write_bytes(JPEGS[2])
    rows = [
        '{"file_name": "a.jpg", "text": "a red star"}',
        '{"file_name": "deep/b.jpg", "text": ["a house", "ein Haus ✨"]}',
        "",
        '{"file_name": "../a.jpg", "text": "up"}',
        '{"file_name": "gone.jpg", "text": "gone"}',
        "not JSON",
        '{"file_name": "a.jpg", "text": "seen from afar"}',
        '{"file_name": "deep", "text": "a folder"}',
        '{"file_name": 7, "text": "seven"}',
        '{"file_name": "c.jpg"}',
    ]
    (root / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    return root


def test_a_folder_with_metadata(folder, tmp_path):
    cache = commands.make(commands.FolderArgs(root=folder, out=tmp_path / "cache", **SETTINGS))
    assert cache is not None
    assert lines(cache) == [
        ("a.jpg", ("a red star", "seen from afar")),
        ("deep/b.jpg", ("a house", "ein Haus ✨")),
    ]
    wanted = "wanted file_name and text in JSON"
    assert report(cache) == {
        "../a.jpg": "file_name leads out of the folder of images",
        "gone.jpg": "missing",
        "metadata.jsonl line 6": wanted,
        "deep": "not a file",
        "metadata.jsonl line 9": "file_name is 7",
        "metadata.jsonl line 10": wanted,
    }
    assert cache.index.dropped.pairs == 6


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        (None, "text", "metadata.jsonl is missing; it wants lines of file_name and text"),
        ('{"file_name": "a.jpg", "caption": "a"}', "captoin", "no line has file_name and 'captoin'; did you mean 'cap"),
        ("", "text", "no line has file_name"),
    ],
)
def test_metadata_without_captions(tmp_path, text, field, message):
    if text is not None:
        (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        commands.make(commands.FolderArgs(root=tmp_path, caption_field=field, out=tmp_path / "cache", **SETTINGS))


@pytest.mark.situation
def test_the_name_of_the_folder_twice(tmp_path):
    """File names that begin with the folder's own name: the refusal says so, where it said that nothing is there."""
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.jpg").write_bytes(JPEGS[0])
    (root / "metadata.jsonl").write_text('{"file_name": "images/a.jpg", "text": "a star"}\n')
    why = "the first is images/a.jpg: 1 x missing: file_name begins with the folder's own name 'images'"
    with pytest.raises(UserError, match=why):
        commands.make(commands.FolderArgs(root=root, out=tmp_path / "cache", **SETTINGS))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path) -> Path:
    caption = json.dumps({"caption": ["one", "two"], "text": "three"}).encode()
    write_tar(tmp_path / "0.tar", {"x/00.jpg": JPEGS[0], "x/00.txt": "ein Stern ✨\n".encode(), "x/01.json": caption})
    first = {"02.JPG": JPEGS[1], "02.json": caption, "03.jpg": JPEGS[2], "03.txt": b"\xff"}
    rest = {"04.jpg": JPEGS[3][:-9], "04.txt": b"cut", "05.jpg": JPEGS[4], "05.txt": b"a", "05.json": caption}
    write_tar(tmp_path / "1.tar", first | rest | {"06.jpg": JPEGS[5], "07.jpeg": JPEGS[5], "07.txt": b"last"})
    return tmp_path


def test_webdataset_tars(tars):
    args = {"tars": str(tars / "*.tar"), **SETTINGS, "dtype": "float32"}
    cache = commands.make(commands.TarArgs(out=tars / "cache", **args))
    assert cache is not None
    assert lines(cache) == [
        ("0.tar/x/00.jpg", ("ein Stern ✨",)),
        ("1.tar/02.JPG", ("one", "two")),
        ("1.tar/05.jpg", ("a",)),
        ("1.tar/07.jpeg", ("last",)),
    ]
    assert report(cache) == {
        "0.tar/x/01.json": "no image beside it",
        "1.tar/03.jpg": "no caption",
        "1.tar/04.jpg": "cut short: the end of the JPEG is missing",
        "1.tar/06.jpg": "no caption",
    }
    for number in (0, 1, 2):  # parts read no more than their share, and join to the same
        joined = commands.make(commands.TarArgs(out=tars / "parts", **args, shard=f"{number}/3"))
    assert joined is not None
    assert lines(joined) == lines(cache)
    assert torch.equal(joined.moments(range(4), [0] * 4), cache.moments(range(4), [0] * 4))


def test_tars_go_on_behind_what_is_done(tars):
    class Killed(BaseException):
        pass

    class Bar(commands.Bar):
        def __call__(self, done, total, note=None):
            if done == 6:  # the first file of four entries is written
                raise Killed

    args = {"tars": str(tars / "*.tar"), **SETTINGS}
    original, commands.Bar = commands.Bar, Bar
    try:
        with pytest.raises(Killed):
            commands.make(commands.TarArgs(out=tars / "killed", **args))
    finally:
        commands.Bar = original
    assert (tars / "killed" / "index.partial.json").exists()
    for name in ("killed", "whole"):
        commands.make(commands.TarArgs(out=tars / name, **args))
    killed, whole = ({path.name: path.read_bytes() for path in (tars / name).iterdir()} for name in ("killed", "whole"))
    assert killed == whole


@pytest.mark.parametrize("size", [0, 700, 1024 + 512, -512])
def test_a_tar_that_was_cut_short_is_refused(tars, size):
    data = (tars / "1.tar").read_bytes()
    (tars / "1.tar").write_bytes(data[:size].rstrip(b"\0") if size < 0 else data[:size])
    with pytest.raises(UserError, match=r"1.tar is cut short, or not a tar"):
        commands.make(commands.TarArgs(tars=str(tars / "*.tar"), out=tars / "cache", **SETTINGS))


@pytest.fixture
def sound(folder, tmp_path) -> Path:
    commands.make(commands.FolderArgs(root=folder, out=tmp_path / "cache", **SETTINGS | {"batch": 1, "per_file": 1}))
    return tmp_path / "cache"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _not_a_number(path: Path) -> None:
    """Written like this: the checksum is right, the number is not."""
    moments = load_file(path)["moments"]
    moments[0, 0, 3, 2, 1] = float("nan")
    save_file({"moments": moments}, path)
    _renew(path, "sha256")


def _no_captions(path: Path) -> None:
    path.write_text('{"captions": []}\n')
    _renew(path, "captions_sha256")


def _renew(path: Path, field: str) -> None:
    index = path.parent / "index.json"
    fields = json.loads(index.read_text())
    shard = next(shard for shard in fields["shards"] if Path(shard["file"]).stem == path.stem)
    shard[field] = sha256(path)
    index.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("shard-00001.safetensors", _flip, "shard-00001.safetensors was changed after it was written"),
        ("shard-00001.jsonl", _flip, "shard-00001.jsonl was changed after it was written"),
        ("shard-00001.safetensors", _not_a_number, "shard-00001.safetensors: samples 0 are not finite"),
        ("shard-00000.jsonl", _no_captions, "shard-00000.jsonl line 1: wanted 'captions', a list of strings"),
        ("dropped.jsonl", _flip, "dropped.jsonl was changed"),
        ("dropped.jsonl", Path.unlink, "dropped.jsonl is missing"),
    ],
)
def test_check_finds_and_names_damage(sound, capsys, file, damage, message):
    check.main([str(sound)])
    assert capsys.readouterr().out.startswith(f"{sound} is sound: 2 images, 1 views of 12x16x16 in float16, 2 files, 6")
    damage(sound / file)
    with pytest.raises(SystemExit) as end:
        check.main([str(sound)])
    assert end.value.code == 1
    assert message in capsys.readouterr().out


def test_check_refuses_what_is_no_cache(sound, tmp_path):
    with pytest.raises(UserError, match=r"index.json is missing"):
        check.main([str(tmp_path)])
    (sound / "shard-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00001.safetensors is missing"):
        check.main([str(sound)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cocoa"], "nothing to prepare called 'cocoa'; did you mean 'coco'"),
        (["folder", "--rooot=x", "--root=y", "--out=z", "--model=m"], "no flag '--rooot'; did you mean '--root'"),
    ],
)  # fmt: skip
def test_mistyped(command, argv, message):
    code, _, err = command(prepare.main, *argv)
    assert code == 2
    assert message in err


def test_help(command):
    assert "prepare check CACHE" in command(prepare.main)[1]
    done = run_command(prepare.main, "coco", "--help-all")
    assert done.returncode == 0
    assert all(flag in done.stdout for flag in ("--root", "--split", "--views", "--shard", "--backend"))
