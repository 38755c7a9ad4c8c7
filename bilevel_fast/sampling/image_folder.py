"""A folder of sampled images by id: what the metrics read, and what a killed or shared run goes on with.

    settings.json        format, version, the model's folder, `recipe`: all that decides what the images are, `runs`: on
                         what they were drawn, which decides their last bits
    index.jsonl          {"id", "prompt", "seed", "file"}, a line for each finished image
    ID.png               8 bits, RGB; or ID.safetensors, `latents` (C, h, w) fp32, scaled as the UNet sees them

A line is appended after its image is safe on disk, under a lock, as several processes write to the same folder. A last
line without its end was torn by a kill and does not count. When all are drawn, lines stand in the order of the prompts.
"""

import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import (
    clip,
    is_name,
    parse_json,
    read_file,
    read_json,
    sweep,
    write_atomic,
    write_json,
)
from bilevel_fast.base.tensors import read_tensors
from bilevel_fast.models.weights import same_component
from bilevel_fast.sampling.prompts import Row

FORMAT, VERSION = "bilevel_fast.images", 1
SETTINGS, INDEX, LOCK = "settings.json", "index.jsonl", ".index.lock"


@dataclass(frozen=True)
class DrawnImage:
    """A finished image: a line of `index.jsonl`."""

    id: str
    prompt: str
    seed: int
    file: str


@dataclass(frozen=True)
class ImageFolder:
    """A folder that was read; `ImageFolder.open` makes one."""

    path: Path
    settings: Mapping[str, Any]
    entries: Mapping[str, DrawnImage]
    """By id, in the order of the index."""

    @classmethod
    def open(cls, path: Path | str) -> "ImageFolder":
        """Read settings and index; no image is opened.

        Raises:
            UserError: It is no such folder, a line of the index is broken, or an image is missing.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"image folder {path} does not exist")
        settings, entries = _read_settings(path), _read_index(path)
        for entry in entries.values():
            if not (path / entry.file).is_file():
                raise UserError(f"{path / entry.file} is missing, and {INDEX} names it")
        return cls(path, settings, entries)

    def path_of(self, id: str) -> Path:
        """Where the image of an id lies.

        Raises:
            UserError: There is none.
        """
        if id not in self.entries:
            raise UserError(f"{self.path} has no image {id!r}")
        return self.path / self.entries[id].file

    def latents(self, id: str) -> Tensor:
        """The latents of an id, (C, h, w) fp32; only if the folder holds latents.

        Raises:
            UserError: There are none, or they are cut short.
        """
        path = self.path_of(id)
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is an image; wanted a folder made with format 'latents'")
        tensors = read_tensors(path)
        if "latents" not in tensors:
            raise UserError(f"{path} holds {clip(sorted(tensors))}, wanted 'latents'")
        return tensors["latents"].clone()


class ImageWriter:
    """Fills a folder; any number of processes may fill the same one. `begin` makes one."""

    def __init__(self, path: Path, rows: Sequence[Row], seed: int, suffix: str):
        self.path = path
        self._wanted = {row.id: DrawnImage(row.id, row.prompt, _seed(row, seed), row.id + suffix) for row in rows}
        self.finished: set[str] = set()

    @classmethod
    def begin(
        cls, path: Path, rows: Sequence[Row], recipe: Mapping[str, Any], *, model: str, run: Mapping[str, Any]
    ) -> "ImageWriter":
        """Start a folder or go on with it.

        Args:
            path: The folder; made if missing.
            rows: All that it is to hold, of all processes.
            recipe: What decides the images: JSON values, `seed` and `format` among them.
            model: Where the model lies, for the reader.
            run: What they are drawn on: JSON values.

        Raises:
            UserError: Two rows share an id, or the folder holds something else: images of another recipe, of other
                prompts, or no images of ours.
        """
        writer = cls(path, rows, recipe["seed"], ".png" if recipe["format"] == "png" else ".safetensors")
        if len(writer._wanted) != len(rows):
            ids = [row.id for row in rows]
            raise UserError(f"id {next(i for i in ids if ids.count(i) > 1)!r} is there twice; wanted one row for each")
        path.mkdir(parents=True, exist_ok=True)
        sweep(path)
        with writer._locked():
            settings = writer._settings(recipe)
            settings = settings or {"format": FORMAT, "version": VERSION, "model": model, "recipe": recipe, "runs": []}
            _drop_torn_line(path / INDEX)
            found = _read_index(path)
            for entry in found.values():
                writer._check(entry)
            there = {name: entry for name, entry in found.items() if (path / entry.file).is_file()}
            if len(there) < len(found):  # deleted to be drawn again, say
                write_atomic(path / INDEX, "".join(map(_line, there.values())).encode())
            if run not in settings["runs"]:
                write_json(path / SETTINGS, {**settings, "runs": [*settings["runs"], run]})
        writer.finished = set(there)
        return writer

    def add(self, ids: Sequence[str]) -> None:
        """Say that these images are safe on disk.

        Raises:
            OSError: The disk is full; the index is as it was.
        """
        if not ids:
            return
        left = memoryview("".join(_line(self._wanted[name]) for name in ids).encode())
        # no buffer: when the disk is full, it would try again on closing, after what was torn is cut off
        with self._locked(), (self.path / INDEX).open("ab", buffering=0) as file:
            _drop_torn_line(self.path / INDEX)
            size = os.fstat(file.fileno()).st_size
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError as error:
                os.ftruncate(file.fileno(), size)
                error.filename = str(self.path / INDEX)
                raise
        self.finished |= set(ids)

    def finish(self) -> ImageFolder:
        """Put the index in the order of the rows if nothing is left to do, and read the folder."""
        with self._locked():
            in_order = "".join(map(_line, self._wanted.values())).encode()
            done = _read_index(self.path).keys() == self._wanted.keys()
            if done and (self.path / INDEX).read_bytes() != in_order:
                write_atomic(self.path / INDEX, in_order)
        return ImageFolder.open(self.path)

    def save_picture(self, id: str, pixels: Tensor) -> None:
        """Write a picture (H, W, 3) uint8; a crash leaves the whole file or none."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, "PNG")
        self._write(id, buffer.getvalue())

    def save_latents(self, id: str, latents: Tensor) -> None:
        """Write latents (C, h, w)."""
        self._write(id, save({"latents": latents.float().contiguous()}))

    def _write(self, id: str, data: bytes) -> None:
        write_atomic(self.path / self._wanted[id].file, data)

    def _settings(self, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
        """Those that are there, if they say the same."""
        if not (self.path / SETTINGS).exists():
            # what an atomic write of a killed process leaves begins with a dot
            if strangers := sorted(p.name for p in self.path.iterdir() if not p.name.startswith(".")):
                raise UserError(f"{self.path} holds {strangers[0]} and no {SETTINGS}; wanted an empty or a new folder")
            return None
        settings = _read_settings(self.path)
        theirs, ours = settings["recipe"], json.loads(json.dumps(dict(recipe)))
        for name in ours | theirs:
            if not _same(ours.get(name), theirs.get(name)):
                raise UserError(
                    f"{self.path} holds images made with {name} {theirs.get(name)!r}, not {ours.get(name)!r}; "
                    "delete it or choose another folder"
                )
        return settings

    def _check(self, found: DrawnImage) -> None:
        wanted = self._wanted.get(found.id)
        if wanted is None:
            raise UserError(
                f"{self.path} holds image {found.id!r} ({found.prompt!r}), which is not among the prompts; "
                "choose another folder"
            )
        for name, value in asdict(wanted).items():
            if (came := getattr(found, name)) != value:
                raise UserError(
                    f"{self.path} holds image {found.id!r} with {name} {came!r}, not {value!r}; choose another folder"
                )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.path / LOCK).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # ends with the file, or the process
            yield


def _seed(row: Row, seed: int) -> int:
    return seed if row.seed is None else row.seed


def _line(entry: DrawnImage) -> str:
    return json.dumps(asdict(entry), ensure_ascii=False) + "\n"


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two values of a recipe say the same; fingerprints do so in two ways."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in ours)
    return same_component(ours, theirs)


def _read_settings(path: Path) -> dict[str, Any]:
    file = path / SETTINGS
    settings = read_json(file)
    came = settings.get("format"), settings.get("version")
    if came != (FORMAT, VERSION):
        raise UserError(f"{file}: format {came[0]!r} version {came[1]!r}, wanted {FORMAT!r} version {VERSION}")
    if not isinstance(settings.get("recipe"), dict) or not isinstance(settings.get("runs"), list):
        raise UserError(f"{file}: wanted 'recipe', an object, and 'runs', a list")
    return settings


def _read_index(path: Path) -> dict[str, DrawnImage]:
    file = path / INDEX
    if not file.exists():
        return {}
    data = read_file(file)
    entries: dict[str, DrawnImage] = {}
    lines = data.split(b"\n")[:-1]  # what follows the last end of line is torn, or nothing
    for number, line in enumerate(lines, start=1):
        try:
            fields = parse_json(line, "")
            entry = DrawnImage(**fields)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{file} line {number} is no entry of an image: {line[:80].decode(errors='replace')!r}"
            ) from error
        kinds = {"id": str, "prompt": str, "seed": int, "file": str}
        wrong = [name for name, kind in kinds.items() if type(getattr(entry, name)) is not kind]
        if wrong or not is_name(entry.file):
            raise UserError(f"{file} line {number}: {(wrong or ['file'])[0]} is {fields[(wrong or ['file'])[0]]!r}")
        if entries.get(entry.id, entry) != entry:  # the same twice: somebody drew it twice
            raise UserError(f"{file} line {number}: image {entry.id!r} is there twice")
        entries[entry.id] = entry
    return entries


def _drop_torn_line(file: Path) -> None:
    """Cut off what a killed process has left of a line, so that the next one begins where a line begins."""
    if not file.exists():
        return
    with file.open("r+b") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, size - 1))
        if handle.read() in (b"", b"\n"):
            return
        handle.seek(0)
        handle.truncate(handle.read().rfind(b"\n") + 1)
        os.fsync(handle.fileno())
