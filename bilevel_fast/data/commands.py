"""`python -m bilevel_fast.prepare coco`, `folder` and `webdataset`."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from bilevel_fast.base import flags
from bilevel_fast.base.devices import Ranks, pick_device
from bilevel_fast.base.errors import UserError, in_range
from bilevel_fast.base.limits import SIDE
from bilevel_fast.base.progress import Bar
from bilevel_fast.data.cache import DROPPED, INDEX, Cache, Index, LeftOut
from bilevel_fast.data.dali import Decoder, pick_backend, usable_cores
from bilevel_fast.data.encode import Files, Source, encode, latent_shape
from bilevel_fast.data.listing import coco, metadata_folder
from bilevel_fast.data.pictures import MAX_VIEWS, Framing
from bilevel_fast.data.stream import ImageIndex, write_list
from bilevel_fast.data.tars import Tars, find_tars
from bilevel_fast.data.writer import Part, at_work, read_report, reasons
from bilevel_fast.models.folder import ModelFolder, load_folder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Making:
    """How a cache is made."""

    MAIN: ClassVar = (
        *("root", "split", "tars", "caption_field", "out", "model"),
        *("resolution", "views", "latents", "shard", "device"),
    )
    GROUPS: ClassVar = {
        "what is read": ("root", "split", "tars", "caption_field"),
        "what is made": ("out", "model", "resolution", "views", "crop", "flip", "seed", "latents", "dtype"),
        "the work": ("shard", "batch", "per_file", "backend", "threads", "precision", "device"),
    }

    out: Path
    """Folder of the cache. If it holds a part of this cache, the command goes on with it."""
    model: Path
    """Model folder whose VAE makes the latents, or its id on the hub."""
    resolution: int = 512
    """The short side of an image is scaled to this many pixels, and a square of that side cut out."""
    views: int = 1
    """Random crops and flips of each image."""
    crop: Literal["random", "center"] = "random"
    """Where the square lies."""
    flip: bool = True
    """Mirror half of the views."""
    seed: int = 0
    """Of crops and flips, which depend on it, the image and the number of the view alone."""
    latents: bool = True
    """With --no-latents every image is looked at and the list of those that are fine is written, nothing else: `train`
    on it decodes (DALI) and encodes (VAE) images as it goes, with crops that never repeat."""
    shard: str | None = None
    """i/n: make the i-th, from 0, of n equal parts. Whoever is last joins them. Default: torchrun's part, else all."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the latents in the cache."""
    batch: int = 16
    """Images decoded and encoded together."""
    per_file: int = 1024
    """Images per file of the cache, a multiple of --batch; a killed run does so many again."""
    backend: Literal["auto", "cpu", "mixed"] = "auto"
    """Where DALI decodes; mixed: partly on a GPU. auto: there if there is one."""
    threads: int | None = None
    """Of DALI on the CPU; by default one per core."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What the VAE computes in."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class CocoArgs(Making):
    """Make a latent cache of COCO's images and captions."""

    root: Path
    """Folder with annotations/captions_SPLIT.json and SPLIT/ or images/SPLIT/."""
    split: str = "train2017"
    """train2017, val2017, train2014, val2014, or any other that has such files."""

    def source(self) -> Source:
        return Files(coco(self.root, self.split))


@dataclass(frozen=True, kw_only=True)
class FolderArgs(Making):
    """Make a latent cache of a folder of images with a metadata.jsonl."""

    root: Path
    """Folder with metadata.jsonl, whose lines name files relative to it."""
    caption_field: str = "text"
    """Field of metadata.jsonl with the caption, or a list of them."""

    def source(self) -> Source:
        return Files(metadata_folder(self.root, self.caption_field))


@dataclass(frozen=True, kw_only=True)
class TarArgs(Making):
    """Make a latent cache of webdataset tars."""

    tars: str
    """Path of a tar, or a pattern such as 'DIR/*.tar' or 'DIR/a-{000..012}.tar'; they are read in the order of their
    names."""
    caption_field: str = "caption"
    """Field of a sample's .json with the caption, or a list of them; a .txt comes first."""

    def source(self) -> Source:
        tars = Tars(find_tars(self.tars), self.caption_field)
        if tars.unread:
            kinds = ", ".join(f"{count} {kind}" for kind, count in tars.unread.most_common(8))
            _log.warning("%d of %d members of the tars are not read: %s", tars.unread.total(), tars.members, kinds)
        return tars


ARGS: dict[str, type[CocoArgs | FolderArgs | TarArgs]] = {
    "coco": CocoArgs,
    "folder": FolderArgs,
    "webdataset": TarArgs,
}


def images(name: str, argv: Sequence[str]) -> None:
    """Carry out one of the commands."""
    kind = ARGS[name]
    args = flags.parse(kind, f"bilevel_fast.prepare {name}", kind.__doc__, args=argv)
    if not args.latents:
        kept, dropped = make_list(args)
        print(f"{args.out}: a list of {kept} images")
        _say_what_is_missing(args.out, dropped)
        return
    cache = make(args)
    if cache is None:
        part = _part(args)
        print(f"{args.out}: part {part.number}/{part.count} is finished, others are not")
        return
    print(f"{args.out}: {len(cache)} images, {cache.views} views each; VAE {cache.index.vae}")
    _say_what_is_missing(args.out, cache.index.dropped)


def _say_what_is_missing(out: Path, dropped: LeftOut) -> None:
    if dropped.lines:
        print(f"left out: {dropped.pairs} images, {dropped.captions} captions; {out / DROPPED} names them")
        for reason, count in reasons(read_report(out / DROPPED)).most_common():
            print(f"  {count:>8}  {reason}")


def _part(args: CocoArgs | FolderArgs | TarArgs) -> Part:
    if args.shard is not None:
        return Part.parse(args.shard)
    ranks = Ranks.from_environment()
    return Part(ranks.rank, ranks.world)


def make(args: CocoArgs | FolderArgs | TarArgs) -> Cache | None:
    """Make the cache; None if other parts of it are to be made.

    Raises:
        UserError: Bad input of any kind.
    """
    part, device = _part(args), pick_device(Ranks.from_environment().device(args.device))
    backend = pick_backend(args.backend, device)
    source = args.source()
    folder, shape = _model(args, device)
    recipe = {"backend": backend, "precision": args.precision}
    sizes = folder.text_encoder.pooled > 0  # a cache is of one VAE, and so of one family
    index = Index("images", shape, folder.vae_fingerprint, args.views, args.dtype, sizes, recipe)
    framing = Framing(args.resolution, args.seed, args.flip, args.crop)
    decoder = Decoder(args.resolution, args.views, args.batch, backend, device, args.threads or usable_cores())
    with Bar("img") as bar:
        return encode(
            source,
            args.out,
            index,
            framing,
            decoder,
            folder.vae,
            batch=args.batch,
            per_file=args.per_file,
            part=part,
            progress=_shown(bar),
        )


def make_list(args: CocoArgs | FolderArgs | TarArgs) -> tuple[int, LeftOut]:
    """Make the list of images that can be used; how many they are, and what was left out.

    Raises:
        UserError: Bad input of any kind.
    """
    device = pick_device(args.device)
    source = args.source()
    if not isinstance(source, Files) or _part(args).count != 1:
        raise UserError("--no-latents lists files of a folder, all at once; tars and --shard make a cache of latents")
    folder, shape = _model(args, device)
    framing = Framing(args.resolution, args.seed, args.flip, args.crop)
    root = str(source.listing.folder.resolve())
    index = ImageIndex(root, framing, shape, folder.vae_fingerprint, args.backend, 0, "", LeftOut())
    with at_work(args.out), Bar("img") as bar:
        write_list(source.listing, args.out, index, threads=args.threads or usable_cores(), progress=_shown(bar))
    made = ImageIndex.load(args.out / INDEX)
    return made.samples, made.dropped


def _model(args: Making, device: torch.device) -> tuple[ModelFolder, tuple[int, int, int]]:
    """The model folder, and the shape of its latents at the resolution that is asked for."""
    in_range("--resolution", args.resolution, f">= 1 and <= {SIDE}", 1 <= args.resolution <= SIDE)
    in_range("--views", args.views, f">= 1 and <= {MAX_VIEWS}", 1 <= args.views <= MAX_VIEWS)
    folder = load_folder(args.model, device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    shape = latent_shape(folder.vae, args.resolution)
    if args.resolution % shape[1]:
        raise UserError(f"--resolution {args.resolution} is no multiple of {args.resolution // shape[1]}")
    stride = 2 ** (len(folder.config.block_out_channels) - 1)
    if shape[1] % stride:
        raise UserError(
            f"--resolution {args.resolution} gives latents of {shape[1]}x{shape[2]}, no multiple of the UNet's "
            f"stride {stride}; wanted a multiple of {args.resolution * stride // shape[1]}"
        )
    return folder, shape


def _shown(bar: Bar) -> Callable[[int, int, LeftOut], None]:
    return lambda done, total, dropped: bar(done, total, f"{dropped.pairs} dropped")
