"""Pictures to be measured: folders by id, and decoding that says which file is broken.

A folder is one that `sample` filled (`sampling.image_folder`), or a plain one, such as COCO's val2017: there the id
is the name of the file without its suffix, and neither prompt nor seed is known.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.pictures import FORMATS
from bilevel_fast.sampling.image_folder import INDEX, DrawnImage, ImageFolder

if TYPE_CHECKING:  # imported where it is used: the engine runs without it
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SHOWN = 3

_T = TypeVar("_T")


@dataclass(frozen=True)
class Pictures:
    """The files of a folder by id. Attributes: `settings` is empty and `entries` too for a plain folder."""

    path: Path
    files: Mapping[str, Path]
    entries: Mapping[str, DrawnImage]
    settings: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path | str) -> "Pictures":
        """Find the pictures; none is decoded.

        Raises:
            UserError: There is no such folder, it is empty or holds latents, two files share an id, or the index is
                broken.
        """
        path = Path(path)
        if (path / INDEX).is_file():
            folder = ImageFolder.open(path)
            files = {name: folder.path_of(name) for name in folder.entries}
            if any(file.suffix == ".safetensors" for file in files.values()):
                raise UserError(f"{path} holds latents; metrics want pictures: sample with format 'png'")
            found = cls(path, files, folder.entries, folder.settings)
        elif path.is_dir():
            found = cls(path, _plain(path), {}, {})
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
            shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            raise UserError(f"{self.path} lacks {len(missing)} of {len(ids)} wanted images: {shown}")
        return [self.files[name] for name in ids]


def _plain(path: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() not in SUFFIXES or file.name.startswith("."):
            continue
        if file.stem in files:
            raise UserError(f"{path}: {files[file.stem].name} and {file.name} share the id {file.stem!r}")
        files[file.stem] = file
    return files


def open_rgb(path: Path) -> "Image.Image":
    """Decode a picture; transparency is dropped, grey becomes RGB.

    Raises:
        UserError: It is missing, cut short, or no picture.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.format == "PNG":
                image.verify()  # check sums of all chunks, which decoding skips
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")  # decodes all of it: a truncated file shows here
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no whole picture: {error}") from error


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """Decode a picture: (H, W, 3) uint8, RGB.

    Raises:
        UserError: As `open_rgb`.
    """
    return np.asarray(open_rgb(path))


def batches(files: Sequence[Path], load: Callable[[Path], _T], size: int, what: str) -> Iterator[list[_T]]:
    """`load` of every file, in order, in lists of at most `size`; the next list is loaded while one is used.

    Args:
        what: Heads the progress bar, which a terminal shows.
    """
    bar = tqdm(total=len(files), desc=what, unit="image", leave=False, disable=None)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ahead: list[list[Any]] = []
        for start in range(0, len(files), size):
            ahead.append([pool.submit(load, file) for file in files[start : start + size]])
            if len(ahead) > 1:
                yield [job.result() for job in ahead.pop(0)]
                bar.update(size)
        for jobs in ahead:
            yield [job.result() for job in jobs]
            bar.update(len(jobs))
