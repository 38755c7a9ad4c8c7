"""Images and captions of webdataset tars: every member is found under its real name, and accounted for.

Members that follow each other and whose names are the same up to the first dot behind the last slash are a sample, as
webdataset has it. Tars may be joined (`cat a.tar b.tar`): no sample goes on in the next one.
"""

import glob
import itertools
import re
import tarfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import parse_json
from bilevel_fast.data.listing import ListedImage, shown, with_captions

IMAGES = ("jpg", "jpeg", "jpe", "png", "webp", "bmp")
_BLOCK = 512
_END = bytes(2 * _BLOCK)  # a tar ends with two empty blocks


@dataclass(frozen=True)
class Member:
    """A file in a tar."""

    name: str
    """As it is stored; bytes that are no UTF-8 are surrogates."""
    start: int
    size: int
    problem: str | None = None
    """Why it has no content of its own."""


@dataclass
class Sample:
    """What belongs together. `parts` is by suffix, in lower case, in the order of the tar."""

    parts: dict[str, Member]
    problem: str | None = None

    def first(self, suffixes: Sequence[str]) -> Member | None:
        """The first part of any of these kinds."""
        return next((member for suffix, member in self.parts.items() if suffix in suffixes), None)


@dataclass
class Content:
    """One tar: its samples in order, and what else is in it."""

    samples: list[Sample] = field(default_factory=list)
    unread: "Counter[str]" = field(default_factory=Counter)
    """Members of samples that are of no kind that is read, such as `.cls`, and how many there are."""
    members: int = 0
    """All of them but folders."""


def find_tars(pattern: str) -> list[Path]:
    """The tars that a path, a pattern of the shell or one of webdataset (`a-{000..012}.tar`) names, by name.

    Raises:
        UserError: There is none of that name, or it is a folder.
    """
    found: list[Path] = []
    for text in expanded(pattern):
        if Path(text).is_dir():
            raise UserError(f"--tars {text} is a folder; wanted a tar, or a pattern such as {text.rstrip('/')}/*.tar")
        if Path(text).exists():
            found.append(Path(text))
            continue
        if not (some := glob.glob(text)):
            folder = Path(text).parent
            if not folder.is_dir() and not glob.has_magic(str(folder)):
                raise UserError(f"--tars {pattern}: the folder {folder} does not exist")
            names = [path.name for path in folder.glob("*.tar")] if folder.is_dir() else []
            raise UserError(f"--tars {pattern}: there is no {text}{nearest(Path(text).name, names)}")
        found += map(Path, some)
    return sorted(dict.fromkeys(found), key=str)


def expanded(pattern: str) -> list[str]:
    """Braces as the shell expands them: `{000..012}` counts, `{a,b}` chooses; anything else stays as it is."""
    if Path(pattern).exists():
        return [pattern]
    for braces in re.finditer(r"\{([^{}]*)\}", pattern):
        inside = braces[1]
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
            first, last = numbers.groups()
            width = max(map(len, numbers.groups())) if "0" in (first[0], last[0]) else 0
            choices = [f"{n:0{width}}" for n in range(int(first), int(last) + 1)]
        elif "," in inside:
            choices = inside.split(",")
        else:
            continue
        start, end = braces.span()
        return [text for choice in choices for text in expanded(pattern[:start] + choice + pattern[end:])]
    return [pattern]


class Tars:
    """A source for `encode`: samples of an image and a `.txt`, or a `.json` with the captions in one of its fields."""

    def __init__(self, paths: Sequence[Path], caption_field: str) -> None:
        """Read the headers of all members.

        Args:
            paths: In the order in which they are read.
            caption_field: Of the JSON; a caption or a list of captions.

        Raises:
            UserError: There is no tar, or one is missing, cut short, damaged or compressed.
        """
        if not paths:
            raise UserError("there are no tars to read")
        self._paths, self._field = list(paths), caption_field
        self.members = 0
        self.unread: Counter[str] = Counter()
        sizes: list[int] = []
        for path in self._paths:
            content = read_content(path)  # what is kept is a number: headers of a million samples fill a memory
            sizes.append(len(content.samples))
            self.members += content.members
            self.unread += content.unread
        self._starts = [0, *itertools.accumulate(sizes)]
        self._open: tuple[int, list[Sample]] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def identity(self) -> list[Any]:
        """What a cache made of these tars depends on."""
        return [self._field, *((path.name, path.stat().st_size) for path in self._paths)]

    def read(self, positions: range) -> list[tuple[ListedImage, bytes]]:
        """The entries at these positions, and their images, whole."""
        found: list[tuple[ListedImage, bytes]] = []
        for position in positions:
            number = bisect_right(self._starts, position) - 1
            with self._paths[number].open("rb") as file:
                found.append(self._entry(file, number, position))
        return found

    def _samples(self, number: int) -> list[Sample]:
        if self._open is None or self._open[0] != number:
            self._open = number, read_content(self._paths[number]).samples
        return self._open[1]

    def _entry(self, file: BinaryIO, number: int, position: int) -> tuple[ListedImage, bytes]:
        sample = self._samples(number)[position - self._starts[number]]
        image, text, fields = sample.first(IMAGES), sample.first(["txt"]), sample.first(["json"])
        named = image or text or fields or next(iter(sample.parts.values()))
        entry = ListedImage(position, shown(f"{self._paths[number].name}/{named.name}"), (), sample.problem)
        if entry.problem is None and image is None:
            entry = replace(entry, problem="no image beside it")
        broken = next((part.problem for part in (image, text, fields) if part and part.problem), None)
        if entry.problem or broken or image is None:
            return replace(entry, problem=entry.problem or broken), b""
        if text is not None:
            captions: list[Any] = [_bytes(file, text).decode("utf-8-sig", "surrogateescape")]  # else refused as that
            return with_captions(entry, captions), _bytes(file, image)
        if fields is None:
            return with_captions(entry, []), _bytes(file, image)
        captions, why = _captions(_bytes(file, fields), self._field)
        entry = with_captions(entry, captions)
        return replace(entry, problem=f"{entry.problem}: {why}" if why else entry.problem), _bytes(file, image)


def _bytes(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.start)
    return file.read(member.size)


def _captions(data: bytes, name: str) -> tuple[list[Any], str]:
    """What the field of a sample's JSON holds; or why it holds nothing."""
    try:
        fields = parse_json(data.decode("utf-8-sig"), "", surrogates=True)
    except ValueError:
        return [], "its .json is not JSON"
    if not isinstance(fields, dict) or name not in fields:
        return [], f"its .json has no {name!r}"
    return (fields[name] if isinstance(fields[name], list) else [fields[name]]), ""


def read_content(path: Path) -> Content:
    """Read the headers of a tar, or of several that were joined.

    Raises:
        UserError: It is missing, compressed, damaged, or cut short.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing" if not path.exists() else f"{path} is no file")
    content = Content()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path} is compressed by gzip; wanted a plain tar")
        file.seek(max(0, size - len(_END)))
        if size < len(_END) or size % _BLOCK or file.read() != _END:
            raise UserError(f"{path} is cut short, or not a tar: it does not end as tars do")
        start = 0
        while start < size:
            start = _skip_empty(file, _archive(path, file, start, content))
    return content


def _archive(path: Path, file: BinaryIO, start: int, content: Content) -> int:
    """Read one archive of a file; where it ends. What tarfile takes for an end in silence is told apart here."""
    file.seek(start)
    key: str | None = None
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")  # pax names are read as such
        while (info := tar.next()) is not None:
            tar.members = []  # it would keep them all  # pyright: ignore[reportAttributeAccessIssue]
            if info.size < 0:
                raise UserError(f"{path} is damaged: {shown(info.name)} has {info.size} bytes")
            if info.isdir():
                continue
            key = _take(Member(info.name, info.offset_data, info.size, _problem(info)), key, content)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise UserError(f"{path} is damaged behind byte {start}: {error}") from error
    file.seek(tar.offset)
    if any(file.read(_BLOCK)):
        raise UserError(f"{path} is damaged at byte {tar.offset}: wanted the header of a member, or the end")
    return tar.offset


def _skip_empty(file: BinaryIO, at: int) -> int:
    """Where the next archive begins, or the file ends."""
    file.seek(at)
    while block := file.read(_BLOCK):
        if any(block):
            break
        at += _BLOCK
    return at


def _problem(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return "a link in the tar; wanted the file itself"
    return None if info.isreg() and not info.issparse() else "a special file in the tar; wanted a plain one"


def _take(member: Member, key: str | None, content: Content) -> str | None:
    """Put a member where it belongs; returns the key of its sample, that of the one before being `key`."""
    content.members += 1
    folder, slash, name = member.name.rpartition("/")
    stem, dot, suffix = name.partition(".")
    if not stem or not dot:
        content.samples.append(Sample({"": member}, "a hidden file" if dot else "a file without a suffix"))
        return None
    own, suffix = folder + slash + stem, suffix.lower()
    if suffix not in (*IMAGES, "txt", "json"):
        content.unread[f".{suffix}"] += 1
    if own != key:
        content.samples.append(Sample({}))
    sample = content.samples[-1]
    if suffix in sample.parts:
        sample.problem = f"there are two .{suffix} of this name beside each other; wanted one"
        return own
    sample.parts[suffix] = member
    last = suffix.rpartition(".")[2]
    if last != suffix and last in IMAGES and sample.problem is None:
        sample.problem = (
            f"the name of a sample ends at the first dot: {shown(name)} is .{shown(suffix)} of {shown(stem)}"
        )
    return own
