"""Latents on disk: what `prepare` writes once and training reads in any order.

Shards are read and never mapped: one that is cut short meanwhile would end the process without a word. One that is
another file than it was, by size, time of change and number, is another one only if its checksum says so.

    index.json            format, version, kind, latent shape, views, VAE, recipe, and the shards with their checksums
    shard-00000.safetensors   `moments` (n, V, 2C, H, W), float16 or float32: mean and log-variance of *scaled* latents
    shard-00000.jsonl     one line per sample: {"captions": [...], "file": ...} for images,
                          {"caption": ..., "anchor": ...} for concepts (the caption without the concept); for models
                          that read them also "sizes", V lists of the six size numbers of `models.conditioning`
    dropped.jsonl         what was left out and why: {"file": ..., "captions": n, "reason": ...} for an image with all
                          its captions, {"file": ..., "caption": ..., "reason": ...} for a caption alone

Every file is written aside and renamed, and `index.json` comes last, so a folder that has one is complete. While a
cache is being made, `index.partial.json` lists the shards that are done, and a new `CacheWriter` goes on after them.
Where several machines make one cache, the names of part 2 of 4 begin with `part-00002-of-00004-`, and whoever is last
writes the index of the whole.

Shape legend: B batch, n samples of a shard, V views, C latent channels, H W latent size.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import clip, is_name, open_safetensors, parse_json, read_json, read_json_lines, sha256
from bilevel_fast.base.limits import CHANNELS, PIXELS
from bilevel_fast.models.architecture import UNetConfig
from bilevel_fast.models.conditioning import SIZES
from bilevel_fast.models.weights import same_component

FORMAT, VERSION = "bilevel_fast.cache", 3
READABLE = (1, 2, VERSION)
"""Version 1 had no `dropped`, version 2 no `sizes`; what has no sizes is still written as version 2."""
INDEX, PARTIAL, DROPPED = "index.json", "index.partial.json", "dropped.jsonl"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_DTYPE_NAMES = {"F16": "float16", "F32": "float32"}  # as safetensors calls them

Kind = Literal["images", "concepts"]


@dataclass(frozen=True)
class Shard:
    """One safetensors file and the captions beside it."""

    file: str
    samples: int
    sha256: str
    captions_sha256: str

    @property
    def captions(self) -> str:
        return self.file.removesuffix(".safetensors") + ".jsonl"


@dataclass(frozen=True)
class LeftOut:
    """What was left out of a cache: the lines of `dropped.jsonl`, in the order of its source."""

    pairs: int = 0
    """Images that are missing with all their captions."""
    captions: int = 0
    """Captions that are missing from an image."""
    sha256: str = ""
    """Of the file; empty if there is none."""

    @property
    def lines(self) -> int:
        return self.pairs + self.captions


@dataclass(frozen=True)
class Index:
    """`index.json`."""

    kind: Kind
    latent_shape: tuple[int, int, int]
    """(C, H, W)."""
    vae: str
    """Fingerprint of the VAE whose latents these are."""
    views: int = 1
    dtype: str = "float16"
    sizes: bool = False
    """Whether each view has its size numbers."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """How the samples were made, as far as it decides what they are. Goes on only with the same recipe."""
    shards: tuple[Shard, ...] = ()
    dropped: LeftOut = LeftOut()

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def entries(self) -> int:
        """Entries of the source that were looked at: they are samples now, or dropped."""
        return self.samples + self.dropped.pairs

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        if not self.sizes:
            del fields["sizes"]
        return {"format": FORMAT, "version": VERSION if self.sizes else 2, "samples": self.samples, **fields}

    def check_same_making(self, found: "Index", folder: Path) -> None:
        """Refuse what lies in a folder if it is not this cache, or a beginning of it.

        Raises:
            UserError: A setting differs; it is named.
        """
        ours, theirs = _settings(self), _settings(found)
        for name in ours | theirs:
            if not same_component(ours.get(name), theirs.get(name)):
                raise UserError(
                    f"{folder} holds a cache made with {name} {theirs.get(name)!r}, not {ours.get(name)!r}; "
                    "delete it or choose another folder"
                )

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read and check.

        Raises:
            UserError: The file is missing, of another format or version, or a field is wrong; it is named.
        """
        fields = read_json(path)
        came = fields.pop("format", None), fields.pop("version", None)
        if came[0] != FORMAT or came[1] not in READABLE:
            raise UserError(f"{path}: format {came[0]!r} version {came[1]!r}, wanted {FORMAT!r} version {VERSION}")
        samples = fields.pop("samples", None)
        try:
            shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
            shape = tuple(fields.pop("latent_shape"))
            dropped = LeftOut(**fields.pop("dropped", {}))
            index = cls(latent_shape=shape, shards=shards, dropped=dropped, **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: a field is missing or unknown: {error}") from error
        wrong = {
            "kind": type(index.kind) is not str or index.kind not in get_args(Kind),
            "latent_shape": len(shape) != 3 or not all(type(size) is int and 0 < size <= CHANNELS for size in shape),
            "vae": type(index.vae) is not str,
            "views": type(index.views) is not int or index.views < 1,
            "dtype": type(index.dtype) is not str or index.dtype not in DTYPES,
            "sizes": type(index.sizes) is not bool,
            "recipe": type(index.recipe) is not dict,
            # A name with a separator could lead out of the folder.
            "shards": any(not is_name(shard.file) or not _are_text(shard) for shard in shards),
            "dropped": any(type(count) is not int or count < 0 for count in (dropped.pairs, dropped.captions))
            or type(dropped.sha256) is not str,
            "samples": any(type(shard.samples) is not int or shard.samples < 0 for shard in shards)
            or samples != index.samples,
        }
        for name, bad in wrong.items():
            if bad:
                raise UserError(
                    f"{path}: field {name} is wrong: {clip(samples if name == 'samples' else getattr(index, name))}"
                )
        return index


def _are_text(shard: Shard) -> bool:
    return type(shard.sha256) is str and type(shard.captions_sha256) is str


def _settings(index: Index) -> dict[str, Any]:
    """What the caller of a writer decides, as it reads back from JSON, where a tuple is a list."""
    fields = json.loads(json.dumps(asdict(index)))
    del fields["shards"], fields["dropped"]
    return {f"recipe.{name}": value for name, value in fields.pop("recipe").items()} | fields


class Cache:
    """A finished cache; a `LatentSource`. `Cache.open` makes one."""

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.index = path, index
        self._starts = [0, *accumulate(shard.samples for shard in index.shards)]
        self._moments = [_Moments(path / shard.file, shard, self._wanted(shard)) for shard in index.shards]
        self._lines: dict[int, list[dict[str, Any]]] = {}

    @classmethod
    def open(cls, path: Path | str) -> "Cache":
        """Open a cache and check everything that costs no reading of data; `verify` does the rest.

        Raises:
            UserError: The folder is no finished cache, or a shard is missing, cut short or of another shape.
        """
        path = Path(path)
        if not (path / INDEX).is_file():
            if any(path.glob(f"*{PARTIAL}")):
                raise UserError(f"{path} is an unfinished cache; run the command that makes it again to finish it")
            if parts := sorted(file.name.removesuffix(f"-{INDEX}") for file in path.glob(f"part-*-{INDEX}")):
                raise UserError(f"{path} is an unfinished cache: it has {', '.join(parts)} only; make the other parts")
            raise UserError(f"{path} is not a cache: {INDEX} is missing")
        index = Index.load(path / INDEX)
        if not index.samples:
            raise UserError(f"{path} holds no samples")
        return cls(path, index)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.index.latent_shape

    @property
    def views(self) -> int:
        return self.index.views

    def __len__(self) -> int:
        return self._starts[-1]

    def moments(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        channels, height, width = self.latent_shape
        out = torch.empty(len(indices), 2 * channels, height, width)
        for row, (index, view) in enumerate(zip(indices, views, strict=True)):
            shard, local = self._locate(int(index))
            out[row] = self._moments[shard].read(local, int(view))
        if not out.isfinite().all():
            row = int((~out.flatten(1).isfinite().all(1)).nonzero()[0])
            shard, local = self._locate(int(indices[row]))
            raise UserError(f"{self.path / self.index.shards[shard].file}: latents of sample {local} are not finite")
        return out

    def sizes(self, indices: Sequence[int], views: Sequence[int]) -> Tensor | None:
        if not self.index.sizes:
            return None
        rows = zip(indices, views, strict=True)
        return torch.tensor([self._line(int(index))["sizes"][int(view)] for index, view in rows], dtype=torch.float32)

    def captions(self, index: int) -> tuple[str, ...]:
        line = self._line(index)
        return tuple(line["captions"]) if self.index.kind == "images" else (line["caption"],)

    def anchor(self, index: int) -> str | None:
        return None if self.index.kind == "images" else self._line(index)["anchor"]

    def verify(self) -> None:
        """Read every byte and compare checksums.

        Raises:
            UserError: A file is not the one that was written; it is named.
        """
        for shard in self.index.shards:
            for name, wanted in ((shard.file, shard.sha256), (shard.captions, shard.captions_sha256)):
                check_sum(self.path / name, wanted)

    def check_model(self, config: UNetConfig, vae: str) -> None:
        """Refuse to train a model on latents that it was not made for.

        Args:
            config: Of the UNet that will read the latents.
            vae: Fingerprint of the VAE of the model folder.

        Raises:
            UserError: The channels, the size or the VAE differ; both sides are named.
        """
        check_latents(self.path, self.latent_shape, self.index.vae, config, vae)

    def _wanted(self, shard: Shard) -> tuple[str, list[int]]:
        if not (self.path / shard.captions).is_file():
            raise UserError(f"{self.path / shard.captions} is missing")
        channels, height, width = self.latent_shape
        return self.index.dtype, [shard.samples, self.views, 2 * channels, height, width]

    def _locate(self, index: int) -> tuple[int, int]:
        assert 0 <= index < len(self), f"sample {index} of {len(self)}"
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _line(self, index: int) -> dict[str, Any]:
        shard, local = self._locate(index)
        if shard not in self._lines:
            found = self.index.shards[shard]
            self._lines[shard] = _read_lines(self.path, found, self.index)
            check_sum(self.path / found.captions, found.captions_sha256)
        return self._lines[shard][local]


class _Moments:
    """The moments of one shard. Opened for each sample: shards may be more than a process may hold open.

    Raises:
        UserError: It is missing, cut short, or holds something else.
    """

    def __init__(self, path: Path, shard: Shard, wanted: tuple[str, list[int]]) -> None:
        self.path, self.sha256 = path, shard.sha256
        handle = open_safetensors(path)
        if "moments" not in handle.keys():  # noqa: SIM118  (not a mapping)
            raise UserError(f"{path}: wanted a tensor 'moments', found {sorted(handle.keys())}")
        moments = handle.get_slice("moments")
        came = (_DTYPE_NAMES.get(moments.get_dtype()), moments.get_shape())
        if came != wanted:
            raise UserError(f"{path}: moments are {came[0]} of shape {came[1]}, {INDEX} says {wanted[0]} {wanted[1]}")
        self._dtype, (_, self._views, *self._shape) = DTYPES[wanted[0]], wanted[1]
        self._size = prod(self._shape) * self._dtype.itemsize
        with path.open("rb") as file:
            self._state = _state(file.fileno())
            length = int.from_bytes(file.read(8), "little")  # what follows was checked when it was opened above
            header = parse_json(file.read(length), str(path))
        self._start = 8 + length + header["moments"]["data_offsets"][0]

    def read(self, sample: int, view: int) -> Tensor:
        """(2C, H, W), as stored.

        Raises:
            UserError: It is gone, or not the file that was opened.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                if (state := _state(file.fileno())) != self._state:
                    check_sum(self.path, self.sha256)
                    self._state = state
                data = os.pread(file.fileno(), self._size, self._start + (sample * self._views + view) * self._size)
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing; it was there when the cache was opened") from None
        except OSError as error:
            error.filename = str(self.path)
            raise
        if len(data) < self._size:
            raise UserError(f"{self.path} was cut short while it was read")
        return torch.frombuffer(bytearray(data), dtype=self._dtype).view(self._shape)


def _state(number: int) -> tuple[int, ...]:
    """Another one, though it may be the same file: times go back with clocks, and are set back by programs."""
    found = os.fstat(number)
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_latents(path: Path, shape: tuple[int, int, int], made_by: str, config: UNetConfig, vae: str) -> None:
    """Refuse to train a model on latents that it was not made for.

    Args:
        path: Of what holds the latents, for the message.
        shape: (C, H, W) of the latents.
        made_by: Fingerprint of the VAE that made them.
        config: Of the UNet that will read the latents.
        vae: Fingerprint of the VAE of the model folder.

    Raises:
        UserError: The channels, the size or the VAE differ; both sides are named.
    """
    channels, height, width = shape
    if channels != config.in_channels:
        raise UserError(f"{path}: latents have {channels} channels, the UNet reads {config.in_channels}")
    stride = 2 ** (len(config.block_out_channels) - 1)
    if height % stride or width % stride:
        raise UserError(f"{path}: latents of {height}x{width} are no multiple of the UNet's stride {stride}")
    if not same_component(vae, made_by):
        raise UserError(f"{path}: latents of VAE {made_by}, the model has VAE {vae}")


def check_sum(path: Path, wanted: str) -> None:
    """Refuse a file that is not the one that was written.

    Raises:
        UserError: It is missing or was changed.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if sha256(path) != wanted:
        raise UserError(f"{path} was changed after it was written: its checksum is wrong")


def _read_lines(folder: Path, shard: Shard, index: Index) -> list[dict[str, Any]]:
    path, kind = folder / shard.captions, index.kind
    lines = [line for _, line in read_json_lines(path)]
    if len(lines) != shard.samples:
        raise UserError(f"{path} has {len(lines)} lines for {shard.samples} samples")
    for number, line in enumerate(lines, start=1):
        try:
            values = line["captions"] if kind == "images" else [line["caption"], line["anchor"]]
            good = type(values) is list and values and all(type(value) is str for value in values)
        except (KeyError, TypeError):
            good = False
        if not good:
            wanted = "'captions', a list of strings" if kind == "images" else "'caption' and 'anchor', strings"
            raise UserError(f"{path} line {number}: wanted {wanted}")
        if index.sizes and not _are_sizes(line.get("sizes"), index.views):
            found, wanted = clip(line.get("sizes")), f"{index.views} lists of {SIZES} numbers"
            raise UserError(f"{path} line {number}: sizes is {found}, wanted {wanted}")
    return lines


def _are_sizes(value: Any, views: int) -> bool:
    return (
        type(value) is list
        and len(value) == views
        and all(type(view) is list and len(view) == SIZES for view in value)
        and all(type(number) is int and 0 <= number <= PIXELS for view in value for number in view)
    )
