"""Pictures to be measured: folders by id, and decoding that says which file is broken.

A folder is one that `sample` filled (`sampling.image_folder`), or a plain one, such as COCO's val2017: there the id
is the name of the file without its suffix, and neither prompt nor seed is known.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_file
from bilevel_fast.base.progress import Bar
from bilevel_fast.data.pictures import SUFFIXES, Unusable, decode_rgb
from bilevel_fast.sampling.image_folder import INDEX, DrawnImage, ImageFolder
from bilevel_fast.scale.shares import joined
from bilevel_fast.scale.team import ALONE, Team

if TYPE_CHECKING:  # imported where it is used: the engine runs without it
    from PIL import Image

_UNREAD = {".gif", ".tif", ".tiff", ".jfif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".ppm", ".pgm", ".tga"}
"""Of pictures that cannot be read here."""
_SHOWN = 3

_T = TypeVar("_T")


@dataclass(frozen=True)
class Pictures:
    """The files of a folder by id.

    Attributes:
        entries, settings: Empty for a plain folder.
        others: Names of files in a plain folder that are no pictures.
    """

    path: Path
    files: Mapping[str, Path]
    entries: Mapping[str, DrawnImage]
    settings: Mapping[str, Any]
    others: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path | str) -> "Pictures":
        """Find the pictures; none is decoded.

        Raises:
            UserError: There is no such folder, it is empty or holds latents or pictures that would be left out, two
                files share an id, or the index is broken.
        """
        path = Path(path)
        if (path / INDEX).is_file():
            folder = ImageFolder.open(path)
            files = {name: folder.path_of(name) for name in folder.entries}
            if any(file.suffix == ".safetensors" for file in files.values()):
                raise UserError(f"{path} holds latents; metrics want pictures: sample with format 'png'")
            found = cls(path, files, folder.entries, folder.settings)
        elif path.is_dir():
            files, others = _plain(path)
            found = cls(path, files, {}, {}, others)
        else:
            raise UserError(f"image folder {path} does not exist")
        if not found.files:
            raise UserError(f"image folder {path} is empty; wanted pictures: {', '.join(SUFFIXES)}")
        return found

    def of(self, ids: Sequence[str]) -> list[Path]:
        """The files of these ids, in their order.

        Raises:
            UserError: Some are not there; the first ones are named.
        """
        missing = [name for name in ids if name not in self.files]
        if missing:
            raise UserError(f"{self.path} lacks {len(missing)} of {len(ids)} wanted images: {_some(missing)}")
        return [self.files[name] for name in ids]

    @property
    def notes(self) -> list[str]:
        """What a reader of numbers should know about the folder."""
        if not self.others:
            return []
        return [f"{len(self.others)} files of {self.path} are no pictures and are left out: {_some(self.others)}"]


def _plain(path: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The pictures of a plain folder by id, and what else is in it. All of them or none: a part would be measured."""
    files: dict[str, Path] = {}
    left_out: list[str] = []
    others: list[str] = []
    for file in sorted(path.rglob("*")):
        name, suffix = str(file.relative_to(path)), file.suffix.lower()
        if any(part.startswith(".") for part in Path(name).parts) or file.is_dir():
            continue
        if suffix in _UNREAD or (suffix in SUFFIXES and file.parent != path):
            left_out.append(name)
        elif suffix not in SUFFIXES:
            others.append(name)
        elif file.stem in files:
            raise UserError(f"{path}: {files[file.stem].name} and {file.name} share the id {file.stem!r}")
        else:
            files[file.stem] = file
    if left_out:
        raise UserError(
            f"{path}: {len(left_out)} of {len(files) + len(left_out)} pictures would be left out: {_some(left_out)}; "
            f"wanted all of them in the folder itself, as {', '.join(SUFFIXES)}"
        )
    return files, tuple(others)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def open_rgb(path: Path) -> "Image.Image":
    """Decode a picture as `prepare` does: upright, transparency dropped, grey and sixteen bits to RGB of eight.

    Raises:
        UserError: It is missing, cut short, no picture, or another kind than its name says.
    """
    try:
        return decode_rgb(read_file(path), path.name)
    except Unusable as reason:
        raise UserError(f"{path} is no whole picture: {reason}") from None


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """Decode a picture: (H, W, 3) uint8, RGB.

    Raises:
        UserError: As `open_rgb`.
    """
    return np.asarray(open_rgb(path))


@dataclass(frozen=True)
class Batching:
    """How pictures are measured: in batches, which ranks share.

    Attributes:
        size: Pictures at a time.
        team: The ranks; all of them measure the same files.
    """

    size: int = 32
    team: Team = ALONE

    def measured(
        self, files: Sequence[Path], load: Callable[[Path], _T], measure: Callable[[list[_T]], Tensor], what: str
    ) -> Iterator[Tensor]:
        """What `measure` makes of the files, batch by batch in their order: (n, ...) each, on the CPU, on every rank.

        Args:
            load: Reads one; the next batch is read while one is measured.
            what: Ends the progress bar, which a terminal shows.
        """
        parts = [files[start : start + self.size] for start in range(0, len(files), self.size)]
        done = 0
        with Bar("image") as bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            bar(0, len(files), what)
            mine = map(measure, _ahead(pool, self.team.ranks.share(parts), load))
            for rows in joined(self.team, [len(part) for part in parts], mine):
                done += len(rows)
                bar(done, len(files))
                yield rows


USUAL = Batching()
"""Of one process."""


def _ahead(pool: ThreadPoolExecutor, parts: Iterable[Sequence[Path]], load: Callable[[Path], _T]) -> Iterator[list[_T]]:
    """Each part loaded, the next one meanwhile."""
    ahead: list[list[Any]] = []
    for part in parts:
        ahead.append([pool.submit(load, file) for file in part])
        if len(ahead) > 1:
            yield [job.result() for job in ahead.pop(0)]
    for jobs in ahead:
        yield [job.result() for job in jobs]
