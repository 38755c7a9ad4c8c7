"""webdataset tars as people make them: every member is under its real name, and what is left out is said."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.tars import Tars, expanded, find_tars
from bilevel_fast.data.writer import _nothing

pytestmark = pytest.mark.situation


def write(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind, encoding="utf-8") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(*paths: Path) -> list[tuple[str, tuple[str, ...] | str, bytes]]:
    """File, captions or else the problem, and bytes of every entry."""
    tars = Tars(paths, "caption")
    found = tars.read(range(len(tars)))
    assert [entry.key for entry, _ in found] == list(range(len(tars)))
    assert tars.read(range(len(tars) - 1, len(tars))) == found[-1:]
    return [(entry.file, entry.problem or entry.captions, data) for entry, data in found]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_other_alphabets(tmp_path, kind):
    """A tar with names of one Chinese letter, with accents or over 100 characters: each is read under its own name."""
    deep = "d/" * 60 + "ünïcode-" + "x" * 90
    members: dict[str, bytes] = {}
    for n, key in enumerate(["猫", "犬", "鳥", "é" * 60, deep + "1", deep + "2"]):
        members |= {f"{key}.jpg": bytes([n]), f"{key}.txt": f"caption {n}".encode()}
    path = write(tmp_path / "a.tar", members, kind)
    names = [name for name in members if name.endswith(".jpg")]
    assert read(path) == [(f"a.tar/{name}", (f"caption {n}",), bytes([n])) for n, name in enumerate(names)]


def test_a_picture_without_a_caption_keeps_it_that_way(tmp_path):
    """A captionless picture before a captioned one, in a PAX tar: it is left out, and does not get the other's."""
    path = write(tmp_path / "a.tar", {"红.png": b"red", "蓝.png": b"blue", "蓝.txt": "蓝色".encode()})
    assert read(path) == [("a.tar/红.png", "no caption", b"red"), ("a.tar/蓝.png", ("蓝色",), b"blue")]


def test_joined_tars(tmp_path):
    """Two tars joined with `cat`: both halves are read, and no sample goes on from one into the other."""
    first = write(tmp_path / "1", {"a.jpg": b"1", "a.txt": b"one", "b.jpg": b"2"})
    second = write(tmp_path / "2", {"b.txt": b"two", "a.jpg": b"3", "a.txt": b"three"})
    (tmp_path / "j.tar").write_bytes(first.read_bytes() + second.read_bytes())
    assert read(tmp_path / "j.tar") == [
        ("j.tar/a.jpg", ("one",), b"1"),
        ("j.tar/b.jpg", "no caption", b"2"),
        ("j.tar/b.txt", "no image beside it", b""),
        ("j.tar/a.jpg", ("three",), b"3"),
    ]


def test_a_byte_order_mark(tmp_path):
    """A .txt or .json caption that begins with a byte order mark: the caption does not have it."""
    mark = b"\xef\xbb\xbf"
    members = {"a.jpg": b"1", "a.txt": mark + b"a star", "b.jpg": b"2", "b.json": mark + b'{"caption": "a house"}'}
    assert [row[1] for row in read(write(tmp_path / "a.tar", members))] == [("a star",), ("a house",)]


def test_two_of_a_kind_are_not_joined(tmp_path):
    """Two members of one name, one after the other: the sample is left out, and the reason says so."""
    path = write(
        tmp_path / "a.tar", [("a.jpg", b"1"), ("a.jpg", b"2"), ("a.txt", b"x"), ("b.jpg", b"3"), ("b.txt", b"b")]
    )
    why = "there are two .jpg of this name beside each other; wanted one"
    assert read(path) == [("a.tar/a.jpg", why, b""), ("a.tar/b.jpg", ("b",), b"3")]


def test_dotted_names(tmp_path):
    """Names with dots, whose samples end at the first one by webdataset's rule: left out, and the rule is named."""
    path = write(tmp_path / "a.tar", {"v1.0001.jpg": b"1", "v1.0001.txt": b"x", "v1.0002.jpg": b"2"})
    why = "the name of a sample ends at the first dot: v1.0001.jpg is .0001.jpg of v1"
    assert read(path) == [("a.tar/v1.0001.jpg", why, b"")]


def test_every_member_is_accounted_for(tmp_path):
    """Other files in a tar, folders and links: counted by kind or left out by name; a link is no picture."""
    members = {"a.jpg": b"1", "a.cls": b"7", "a.txt": b"a", "._a.jpg": b"mac", "README": b"hello", "b.txt": b"b"}
    path = write(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        for name, kind in (("c.jpg", tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
    tars = Tars([path], "caption")
    assert (tars.members, dict(tars.unread)) == (7, {".cls": 1})
    assert read(path) == [
        ("a.tar/a.jpg", ("a",), b"1"),
        ("a.tar/._a.jpg", "a hidden file", b""),
        ("a.tar/README", "a file without a suffix", b""),
        ("a.tar/b.txt", "no image beside it", b""),
        ("a.tar/c.jpg", "a link in the tar; wanted the file itself", b""),
    ]


def test_a_json_without_the_field(tmp_path):
    """A .json without the caption's field, or that is none: left out, and the reason names the field."""
    path = write(tmp_path / "a.tar", {"a.jpg": b"1", "a.json": b'{"text": "x"}', "b.jpg": b"2", "b.json": b"{"})
    whys = [row[1] for row in read(path)]
    assert whys == ["no caption: its .json has no 'caption'", "no caption: its .json is not JSON"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:512] + b"\1" * 512 + data[1024:], r"a.tar is damaged at byte 512: wanted the header of"),
        (lambda data: b"\x1f\x8b" + data[2:], r"a.tar is compressed by gzip; wanted a plain tar"),
        (lambda data: data[:1536], r"a.tar is cut short, or not a tar"),
        (lambda data: data + b"junk" + bytes(2044), r"a.tar is damaged at byte 10240: wanted the header of a member"),
    ],
)  # fmt: skip
def test_damage_is_not_the_end(tmp_path, damage, message):
    """A tar with a damaged header in its middle, cut short or compressed: refused by name, and not read in part."""
    path = write(tmp_path / "a.tar", {"a.txt": b"", "a.jpg": b"1", "b.jpg": b"2"}, tarfile.USTAR_FORMAT)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        Tars([path], "caption")


def test_a_size_below_zero(tmp_path):
    """A header that says a size below zero: refused, and not read for ever."""
    path = write(tmp_path / "a.tar", {"a.jpg": b"1", "b.jpg": b"2"}, tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 136] = b"\xff" * 10 + b"\xfc\x00"
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.tar is damaged: b.jpg has -1024 bytes"):
        Tars([path], "caption")


def test_patterns(tmp_path):
    """webdataset's `a-{000..002}.tar`, choices, a name with brackets: found, in the order of their names."""
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b[1].tar", "b1.tar"):
        (tmp_path / name).touch()
    names = lambda pattern: [path.name for path in find_tars(f"{tmp_path}/{pattern}")]  # noqa: E731
    assert names("a-{000..002}.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names("{b1,a-001}.tar") == ["a-001.tar", "b1.tar"]
    assert names("b[1].tar") == ["b[1].tar"]
    assert names("a-*.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert expanded("{8..11}-{a,b}{}") == [f"{n}-{x}{{}}" for n in range(8, 12) for x in "ab"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{0..999999999999}.tar", r"'\{0..999999999999\}' stands for more than 131072 tars"),
        ("a-{" + "9" * 5000 + ".." + "9" * 5000 + "}.tar", "stands for more than 131072 tars"),
        ("{0..999}{0..999}.tar", "stands for more than 131072 tars"),
    ],
)
def test_patterns_without_end(pattern, message):
    """A pattern that stands for more tars than anybody has: refused before it is written out."""
    with pytest.raises(UserError, match=message) as refusal:
        expanded(pattern)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("train-00.tar", r"there is no .*/train-00.tar; did you mean 'train-000.tar'"),
        ("train-{000..001}.tar", r"there is no .*/train-001.tar; did you mean"),
        ("other/*.tar", r"the folder .*/other does not exist"),
        ("", r"is a folder; wanted a tar, or a pattern such as .*/\*.tar"),
    ],
)
def test_mistyped_patterns(tmp_path, pattern, message):
    """A mistyped path of tars: what is not there is named, and what is near it."""
    (tmp_path / "train-000.tar").touch()
    with pytest.raises(UserError, match=message):
        find_tars(f"{tmp_path}/{pattern}")


def test_nothing_is_left(tmp_path):
    """A source of which nothing can be used: the refusal counts the reasons and names the first file."""
    report = [json.dumps({"file": f"a.tar/{n}.jpg", "captions": 0, "reason": "no caption"}) for n in range(3)]
    message = str(_nothing(tmp_path, report))
    assert message.endswith("all were left out, the first is a.tar/0.jpg: 3 x no caption")
