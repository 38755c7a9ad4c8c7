"""Which images there are and what their captions are: COCO's annotations, or a folder with `metadata.jsonl`.

What is wrong with an entry is written down where it is found and goes with it, so that an image is dropped with its own
captions and nothing moves up in its place.
"""

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import parse_json, read_file, read_json
from bilevel_fast.data.pictures import MAX_KEY, Unusable

SPLITS = ("train2017", "val2017", "train2014", "val2014")


@dataclass(frozen=True)
class ListedImage:
    """One image and its captions."""

    key: int
    """Decides the random crops of the image."""
    file: str
    """Relative to the folder of images."""
    captions: tuple[str, ...]
    problem: str | None = None
    """Why the pair cannot be used, if that is known without opening the image."""
    refused: tuple[tuple[str, str], ...] = ()
    """Captions that were taken off it, each with the reason."""


@dataclass(frozen=True)
class Listing:
    """Entries in an order that depends on the annotations alone."""

    folder: Path
    """Of the images."""
    entries: tuple[ListedImage, ...]

    def read(self, entry: ListedImage) -> bytes:
        """The bytes of an entry's file.

        Raises:
            Unusable: The entry has a problem, or there is no such file.
        """
        if entry.problem is not None:
            raise Unusable(entry.problem)
        path = self.folder / entry.file
        try:
            if not path.is_file():
                raise Unusable("not a file" if path.exists() else self._missing(entry.file))
            return path.read_bytes()
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):  # others may pass: not the file's fault
                raise Unusable(os.strerror(error.errno)) from None
            raise

    def _missing(self, file: str) -> str:
        first, _, rest = file.partition("/")
        if rest and first == self.folder.resolve().name and (self.folder / rest).is_file():
            return f"missing: file_name begins with the folder's own name {first!r}"
        return "missing"


def coco(root: Path, split: str) -> Listing:
    """Read `ROOT/annotations/captions_SPLIT.json`; the images lie in `ROOT/SPLIT` or `ROOT/images/SPLIT`.

    An image with several captions is one entry; entries are in the order of image ids. Annotations of images that are
    not listed are entries with a problem, at the end.

    Raises:
        UserError: A file or folder is missing, or the file is not COCO's.
    """
    annotations = root / "annotations" / f"captions_{split}.json"
    if not annotations.is_file():
        raise UserError(f"{annotations} is missing{'' if split in SPLITS else nearest(split, SPLITS)}")
    folders = [folder for folder in (root / split, root / "images" / split) if folder.is_dir()]
    if not folders:
        raise UserError(f"no images: neither {root / split} nor {root / 'images' / split} is a folder")
    fields = read_json(annotations, surrogates=True)
    for name in ("images", "annotations"):
        if not isinstance(fields.get(name), list):
            raise UserError(f"{annotations}: wanted a list {name!r}, as in COCO's captions")
    captions: dict[Any, list[tuple[Any, Any]]] = {}
    for row in fields["annotations"]:
        row = row if isinstance(row, dict) else {}
        image = row.get("image_id")
        number = row.get("id")
        captions.setdefault(image if type(image) is int else None, []).append(
            (number if type(number) is int else MAX_KEY, row.get("caption"))
        )
    entries: dict[int, ListedImage] = {}
    odd: list[ListedImage] = []
    for row in fields["images"]:
        row = row if isinstance(row, dict) else {}
        key, file = row.get("id"), row.get("file_name")
        if type(key) is not int or not 0 <= key < MAX_KEY:
            odd.append(ListedImage(0, shown(file), (), f"its id is {key!r}, wanted a whole number"))
        elif key in entries:
            odd.append(ListedImage(0, shown(file), (), f"its id {key} stands for {entries[key].file} already"))
        else:
            found = [text for _, text in sorted(captions.pop(key, []), key=lambda pair: pair[0])]
            entries[key] = _entry(key, file, found)
    odd += [
        ListedImage(0, f"image {image}", tuple(str(text) for _, text in found), "has captions, but is not listed")
        for image, found in captions.items()
    ]
    return Listing(folders[0], (*(entries[key] for key in sorted(entries)), *odd))


def metadata_folder(root: Path, caption_field: str = "text") -> Listing:
    """Read `ROOT/metadata.jsonl`, as the imagefolder of `datasets` has it: lines with `file_name` and `text`.

    Lines about the same file become one entry; a caption may also be a list of captions.

    Raises:
        UserError: The file is missing, empty, not UTF-8, or no line of it has the caption field.
    """
    path = root / "metadata.jsonl"
    if not path.exists():
        raise UserError(f"{path} is missing; it wants lines of file_name and {caption_field}")
    try:
        lines = read_file(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    captions: dict[str, list[Any]] = {}
    odd: dict[int, ListedImage] = {}
    first: dict[str, int] = {}
    fields: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, "", surrogates=True)
            if not isinstance(row, dict):
                raise TypeError
            fields |= set(row)
            file, text = row["file_name"], row[caption_field]
        except (ValueError, TypeError, KeyError):
            odd[number] = ListedImage(
                0, f"{path.name} line {number}", (), f"wanted file_name and {caption_field} in JSON"
            )
            continue
        if type(file) is not str:
            odd[number] = ListedImage(0, f"{path.name} line {number}", (), f"file_name is {file!r}")
            continue
        first.setdefault(file, number)
        captions.setdefault(file, []).extend(text if isinstance(text, list) else [text])
    if not captions:
        raise UserError(f"{path}: no line has file_name and {caption_field!r}{nearest(caption_field, fields)}")
    entries = odd | {number: _entry(number, file, captions[file]) for file, number in first.items()}
    return Listing(root, tuple(entries[number] for number in sorted(entries)))


def _entry(key: int, file: Any, texts: Iterable[Any]) -> ListedImage:
    """An entry with its good captions; what is wrong with it, or with the others, is written down."""
    entry = with_captions(ListedImage(key, shown(file), ()), texts)
    problem = path_problem(file)
    return replace(entry, problem=problem) if problem else entry


def with_captions(entry: ListedImage, texts: Iterable[Any]) -> ListedImage:
    """The entry with those captions that are text, each once; without any, that is its problem."""
    good: dict[str, None] = {}
    refused: list[tuple[str, str]] = []
    for text in texts:
        caption = text.strip() if isinstance(text, str) else ""
        if not isinstance(text, str):
            refused.append((repr(text), "not a text"))
        elif not caption:
            refused.append((text, "empty"))
        elif shown(caption) != caption:
            refused.append((shown(caption), "not valid Unicode"))
        elif caption in good:
            refused.append((caption, "duplicate"))
        else:
            good[caption] = None
    problem = entry.problem if good else "no caption"
    return replace(entry, captions=tuple(good), refused=tuple(refused), problem=problem)


def path_problem(file: Any) -> str | None:
    """Why a listed name is not one of a file below the folder of images; None if it is."""
    if not isinstance(file, str) or not file:
        return f"file_name is {file!r}, wanted a text"
    if "\0" in file or shown(file) != file:
        return "file_name is not valid Unicode"
    for path in (PurePosixPath(file), PureWindowsPath(file)):
        if path.is_absolute() or path.drive or path.root or ".." in path.parts:
            return "file_name leads out of the folder of images"
    return None


def shown(text: Any) -> str:
    """As text that any file can hold: JSON may name half of a surrogate pair."""
    return str(text).encode(errors="backslashreplace").decode()
