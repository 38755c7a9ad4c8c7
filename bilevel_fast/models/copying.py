"""Which files of a model folder go with it into another, and how: what links lead to is looked at first.

A model folder comes from somebody else. A link in it may lead to any file of whoever copies it, and so into what they
publish. Followed are links within the folder, those of a download cache of Hugging Face (`snapshots/REVISION/` to
`blobs/`), and those from `NAME.safetensors` to such a file.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import open_safetensors, read_json
from bilevel_fast.base.limits import MEMBERS
from bilevel_fast.models.weights import PICKLES


def component_files(folder: Path) -> list[Path]:
    """The files of all components that `model_index.json` names, but the UNet's; relative to the folder.

    Pickles stay behind where they lie beside the same weights as safetensors. A component that has nothing else, such
    as a safety checker, would be lost.

    Raises:
        UserError: One is a pipe, a device, a link to nothing or to itself, or a link that leads somewhere else than the
            module's docstring says. Nothing is opened to find out, but what `NAME.safetensors` leads to.
    """
    index, root = read_json(folder / "model_index.json"), folder.resolve()
    found: list[Path] = []
    for part in sorted(folder.iterdir()):
        if part.is_dir() and part.name in index and part.name != "unet":
            if not part.resolve().is_relative_to(root):
                raise UserError(f"{part} is a link out of the model folder, to {part.resolve()}; wanted a folder in it")
            found += (file.relative_to(folder) for file in _files(part, root))
    if len(found) > MEMBERS:
        raise UserError(f"{folder} has {len(found)} files, wanted at most {MEMBERS}")
    return found


def _files(part: Path, root: Path) -> Iterator[Path]:
    entries = sorted(os.scandir(part), key=lambda entry: entry.name)
    unwanted = _left_behind([entry.name for entry in entries])
    for entry in entries:
        path = Path(entry.path)
        if entry.name in unwanted:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(path, root)
            continue
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # before Python 3.13, a link to itself is a RuntimeError
            raise UserError(f"{path} is a link that leads nowhere, or to itself") from error
        if not target.is_file():
            raise UserError(f"{path} is no regular file; wanted files in a model folder")
        if entry.is_symlink() and not target.is_relative_to(root):
            _check_outside(path, target, root)
        yield path


def _left_behind(names: Sequence[str]) -> set[str]:
    if not any(re.fullmatch(r"[^.]+\.safetensors(\.index\.json)?", name) for name in names):  # of no variant
        return set()
    return {name for name in names if any(fnmatch(name, pattern) for pattern in (*PICKLES, "*.bin.index.json"))}


def _check_outside(path: Path, target: Path, root: Path) -> None:
    if root.parent.name == "snapshots" and target.parent == root.parent.with_name("blobs"):
        return
    if path.suffix == ".safetensors":
        open_safetensors(target)  # refuses any other file
        return
    raise UserError(f"{path} is a link out of the model folder, to {target}; wanted a file in it")


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file down to the disk; the folders above the target are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    number = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
    with os.fdopen(number, "rb") as read, target.open("xb") as write:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise UserError(f"{source} is no regular file; wanted files in a model folder")
        shutil.copyfileobj(read, write, length=1 << 20)
        write.flush()
        os.fsync(write.fileno())
