"""Training on images without a cache of latents: decoded by DALI and encoded by the VAE when a batch wants them.

    index.json     format, version, where the images are, how views are cut out, VAE, checksums
    images.jsonl   one line per image that can be used: {"key": ..., "file": ..., "bytes": ..., "captions": [...]}
    dropped.jsonl  as in a cache

`prepare ... --no-latents` writes such a folder after decoding every image once: a picture that turns out to be damaged
in the middle of a run could not be left out without moving its neighbours. Which crop a sample shows follows from its
index, as everything else that is random, so a run can go on in the middle of an epoch.

Shape legend: B batch, C latent channels, H W latent size.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import clip, read_json, read_json_lines, whole, write_atomic, write_json
from bilevel_fast.base.limits import CHANNELS, SIDE
from bilevel_fast.data.cache import DROPPED, INDEX, Cache, LeftOut, check_latents, check_sum
from bilevel_fast.data.dali import Decoder, pick_backend, usable_cores
from bilevel_fast.data.encode import Files, ahead, decode
from bilevel_fast.data.listing import ListedImage, Listing, path_problem
from bilevel_fast.data.pictures import MAX_KEY, MAX_VIEWS, Framing, Unusable, upright_size
from bilevel_fast.models.autoencoder import Autoencoder
from bilevel_fast.models.folder import ModelFolder

FORMAT, VERSION = "bilevel_fast.images", 1
LIST = "images.jsonl"

_LOOK = 32  # pixels: an image is decoded whole all the same
_READERS = 4  # threads: what a network file system keeps waiting
_CHUNK = 16  # images encoded together


@dataclass(frozen=True)
class ImageIndex:
    """`index.json` of a list of images."""

    root: str
    """Folder of the images."""
    framing: Framing
    latent_shape: tuple[int, int, int]
    """(C, H, W)."""
    vae: str
    """Fingerprint of the VAE that is to encode them."""
    backend: str
    """As for `pick_backend`."""
    samples: int
    sha256: str
    """Of `images.jsonl`."""
    dropped: LeftOut

    @classmethod
    def load(cls, path: Path) -> "ImageIndex":
        """Read and check.

        Raises:
            UserError: The file is missing, of another format or version, or a field is wrong.
        """
        fields = read_json(path)
        came = fields.pop("format", None), fields.pop("version", None)
        if came != (FORMAT, VERSION):
            raise UserError(f"{path}: format {came[0]!r} version {came[1]!r}, wanted {FORMAT!r} version {VERSION}")
        try:
            framing, dropped = Framing(**fields.pop("framing")), LeftOut(**fields.pop("dropped"))
            shape = tuple(fields.pop("latent_shape"))
            index = cls(framing=framing, dropped=dropped, latent_shape=shape, **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: a field is missing or unknown: {error}") from error
        whole(index.framing.resolution, f"{path}: resolution", 1, SIDE)
        whole(index.framing.seed, f"{path}: seed", 0, 2**64 - 1)
        wrong = {
            "root": type(index.root) is not str or "\0" in index.root,
            "framing": type(index.framing.flip) is not bool or index.framing.crop not in ("random", "center"),
            "latent_shape": len(shape) != 3 or not all(type(side) is int and 0 < side <= CHANNELS for side in shape),
            "vae": type(index.vae) is not str,
            "backend": type(index.backend) is not str,
            "samples": type(index.samples) is not int or index.samples < 1,
            "sha256": type(index.sha256) is not str,
        }
        for name, bad in wrong.items():
            if bad:
                raise UserError(f"{path}: field {name} is wrong: {clip(getattr(index, name))}")
        return index


def write_list(
    listing: Listing,
    out: Path,
    index: ImageIndex,
    *,
    batch: int = 64,
    threads: int = 1,
    progress: Callable[[int, int, LeftOut], None] | None = None,
) -> None:
    """Decode every image of a listing once, and write down which can be used.

    Args:
        listing: Images and captions.
        out: The folder; made if missing.
        index: All but the counts and checksums, which are filled in.
        batch: Images decoded together.
        threads: Of the CPU.
        progress: Called with the entries done and to do, and what was dropped.

    Raises:
        UserError: The folder holds something already, or no image can be used.
    """
    if (out / INDEX).exists():
        raise UserError(f"{out} already holds a finished cache or list; delete it or choose another folder")
    source, framing = Files(listing), Framing(_LOOK, 0)
    decoder = Decoder(_LOOK, 1, batch, "cpu", torch.device("cpu"), threads)
    kept: list[str] = []
    report: list[str] = []
    dropped = LeftOut()
    starts = range(0, len(source), batch)
    looked_at = ahead(lambda start: _look(source, start, batch, framing, decoder), starts)
    for entries in looked_at:
        for entry, size in entries:
            report += [_json(file=entry.file, caption=text, reason=why) for text, why in entry.refused]
            dropped = replace(dropped, captions=dropped.captions + len(entry.refused))
            if entry.problem is None:
                kept.append(_json(key=entry.key, file=entry.file, bytes=size, captions=entry.captions))
            else:
                report.append(_json(file=entry.file, captions=len(entry.captions), reason=entry.problem))
                dropped = replace(dropped, pairs=dropped.pairs + 1)
        if progress:
            progress(len(kept) + dropped.pairs, len(source), dropped)
    if not kept:
        raise UserError(f"{listing.folder}: none of {len(source)} images can be used")
    out.mkdir(parents=True, exist_ok=True)
    sums = []
    for name, lines in ((DROPPED, report), (LIST, kept)):
        data = "".join(line + "\n" for line in lines).encode()
        sums.append(hashlib.sha256(data).hexdigest() if lines else "")
        if lines:
            write_atomic(out / name, data)
    index = replace(index, samples=len(kept), sha256=sums[1], dropped=replace(dropped, sha256=sums[0]))
    write_json(out / INDEX, {"format": FORMAT, "version": VERSION, **asdict(index)})


def _look(source: Files, start: int, batch: int, framing: Framing, decoder: Decoder) -> list[tuple[ListedImage, int]]:
    found = source.read(range(start, min(start + batch, len(source))))
    entries = decode(found, 1, framing, decoder).entries
    return [(entry, len(data)) for entry, (_, data) in zip(entries, found, strict=True)]


def _json(**fields: Any) -> str:
    return json.dumps(fields, ensure_ascii=False)


class ImageStream:
    """A `LatentSource` over a list of images. It has so many views that no sample sees one twice."""

    def __init__(self, path: Path, vae: Autoencoder | None = None, device: torch.device | str = "cpu") -> None:
        """Open a list.

        Args:
            path: Its folder.
            vae: On the device; without it there are no moments.
            device: Where images are encoded.

        Raises:
            UserError: The folder holds no list, or one that was changed.
        """
        self.path, self.index = path, ImageIndex.load(path / INDEX)
        index, device = self.index, torch.device(device)
        self._vae, self._listing = vae, Listing(Path(index.root), ())
        check_sum(path / LIST, index.sha256)
        self._entries, self._bytes = read_list(path / LIST)
        backend = pick_backend(index.backend, device)
        self._decoder = Decoder(index.framing.resolution, 1, _CHUNK, backend, device, usable_cores())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.index.latent_shape

    @property
    def views(self) -> int:
        return MAX_VIEWS

    def __len__(self) -> int:
        return len(self._entries)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._entries[index].captions

    def anchor(self, index: int) -> str | None:
        return None

    def damages(self) -> Iterator[str]:
        """Files that are not as they were when the list was made, as far as their sizes tell; one line each."""
        for index in range(len(self)):
            try:
                self._read(index)
            except UserError as error:
                yield str(error)

    def moments(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """As `LatentSource.moments`.

        Raises:
            UserError: An image is not the one that was looked at when the list was made.
        """
        vae = self._vae
        assert vae is not None
        starts = range(0, len(indices), _CHUNK)
        chunks = [(indices[start : start + _CHUNK], views[start : start + _CHUNK]) for start in starts]
        return torch.cat([vae.moments(pixels).cpu() for pixels in ahead(self._pixels, chunks)])

    def _pixels(self, chunk: tuple[Sequence[int], Sequence[int]]) -> Tensor:
        """(B, 3, R, R)."""
        indices, views = chunk
        with ThreadPoolExecutor(_READERS) as readers:
            files = list(readers.map(self._read, indices))
        entries = [self._entries[index] for index in indices]
        sizes = [upright_size(data, entry.file) for data, entry in zip(files, entries, strict=True)]
        crops = self.index.framing.cut([entry.key for entry in entries], views, sizes)
        (pixels,), reasons = self._decoder(files, [[crop] for crop in crops])
        for entry, reason in zip(entries, reasons, strict=True):
            if reason is not None:
                raise self._changed(entry, reason)
        return pixels

    def _read(self, index: int) -> bytes:
        entry = self._entries[index]
        try:
            data = self._listing.read(entry)
        except Unusable as error:
            raise self._changed(entry, str(error)) from None
        if len(data) != self._bytes[index]:
            raise self._changed(entry, f"{len(data)} bytes, {self._bytes[index]} when the list was made")
        return data

    def _changed(self, entry: ListedImage, reason: str) -> UserError:
        return UserError(f"{self._listing.folder / entry.file}: {reason}; {self.path} was made when it was fine")


def read_list(path: Path) -> tuple[list[ListedImage], list[int]]:
    """The images of an `images.jsonl`, and the bytes of each file.

    Raises:
        UserError: A line is no image, or names a file outside the folder of images.
    """
    entries: list[ListedImage] = []
    sizes: list[int] = []
    for number, row in read_json_lines(path):
        where, captions = f"{path} line {number}", row.get("captions")
        if problem := path_problem(row.get("file")):
            raise UserError(f"{where}: {problem}: {clip(row.get('file'))}")
        if type(captions) is not list or not captions or not all(type(caption) is str for caption in captions):
            raise UserError(f"{where}: captions is {clip(captions)}, wanted a list of texts")
        key = whole(row.get("key"), f"{where}: key", 0, MAX_KEY - 1)
        entries.append(ListedImage(key, row["file"], tuple(captions)))
        sizes.append(whole(row.get("bytes"), f"{where}: bytes", 0, 2**63))
    return entries, sizes


def open_images(
    path: Path | str, folder: ModelFolder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> "Cache | ImageStream":
    """Open what `--data` names: a latent cache, or a list of images.

    Args:
        path: The folder.
        folder: The model's.
        device: Where the VAE encodes images, if there are no latents.
        dtype: What it computes in there; on the CPU the folder's own encodes.

    Raises:
        UserError: It is neither, is a bank of concepts, or was made for another model.
    """
    path, device = Path(path), torch.device(device)
    if not is_list(path):
        cache = Cache.open(path)
        if cache.index.kind != "images":
            raise UserError(f"--data {path} is a cache of {cache.index.kind}, wanted one of images")
        cache.check_model(folder.config, folder.vae_fingerprint)
        return cache
    vae = folder.vae if device.type == "cpu" else folder.family.vae(folder.path, device, dtype)
    stream = ImageStream(path, vae, device)
    check_latents(path, stream.latent_shape, stream.index.vae, folder.config, folder.vae_fingerprint)
    return stream


def is_list(path: Path) -> bool:
    """Whether a folder holds a list of images, not latents."""
    return (path / INDEX).is_file() and read_json(path / INDEX).get("format") == FORMAT
