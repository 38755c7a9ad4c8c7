"""Making a latent cache (`cache.py` has the format): shard by shard, and on from where a killed run stopped."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from bilevel_fast.data.cache import DTYPES, INDEX, PARTIAL, Cache, Index, Shard
from bilevel_fast.errors import UserError
from bilevel_fast.files import write_atomic, write_json


class CacheWriter:
    """Adds samples one by one; every full shard is safe on disk.

    In a folder where an earlier writer with the same settings was interrupted it goes on after the last full shard:
    `samples` says how many samples are there, and the caller adds those that follow.
    """

    def __init__(self, path: Path | str, index: Index, shard_samples: int = 1024) -> None:
        """Start or go on.

        Args:
            path: The folder; made if missing.
            index: Kind, shapes and recipe of the cache, with no shards.
            shard_samples: Samples per shard.

        Raises:
            UserError: The folder holds a finished cache, or an unfinished one that is not a beginning of this one.
        """
        assert not index.shards
        assert shard_samples > 0
        self.path, self.index, self.shard_samples = Path(path), index, shard_samples
        self._moments: list[Tensor] = []
        self._lines: list[str] = []
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / INDEX).exists():
            raise UserError(f"{self.path} already holds a finished cache; delete it or choose another folder")
        if (self.path / PARTIAL).exists():
            self.index = self._resume()

    @property
    def samples(self) -> int:
        """Samples added so far, those of an earlier writer included."""
        return self.index.samples + len(self._lines)

    def add(self, moments: Tensor, captions: Sequence[str], anchor: str | None = None) -> None:
        """Add one sample.

        Args:
            moments: (V, 2C, H, W) mean and log-variance of the scaled latents.
            captions: One or more; exactly one for a concept.
            anchor: The caption without the concept, for a concept only.

        Raises:
            UserError: The moments are not finite in the cache's dtype.
        """
        channels, height, width = self.index.latent_shape
        assert moments.shape == (self.index.views, 2 * channels, height, width), tuple(moments.shape)
        assert captions
        assert (anchor is not None) == (self.index.kind == "concepts")
        stored = moments.detach().to("cpu", DTYPES[self.index.dtype], copy=True)
        if not stored.isfinite().all():
            raise UserError(f"sample {self.samples} ({captions[0]!r}): latents are not finite in {self.index.dtype}")
        line = {"captions": list(captions)} if anchor is None else {"caption": captions[0], "anchor": anchor}
        self._moments.append(stored)
        self._lines.append(json.dumps(line, ensure_ascii=False))
        if len(self._lines) == self.shard_samples:
            self._write_shard()

    def finish(self) -> Cache:
        """Write what is left and the index; return the cache.

        Raises:
            UserError: No sample was added.
        """
        if not self.samples:
            raise UserError(f"{self.path}: there are no samples to write")
        if self._lines:
            self._write_shard()
        write_json(self.path / INDEX, self.index.to_dict())
        (self.path / PARTIAL).unlink(missing_ok=True)
        return Cache.open(self.path)

    def _write_shard(self) -> None:
        name = f"shard-{len(self.index.shards):05d}"
        moments = save({"moments": torch.stack(self._moments)})
        captions = ("\n".join(self._lines) + "\n").encode()
        write_atomic(self.path / f"{name}.safetensors", moments)
        write_atomic(self.path / f"{name}.jsonl", captions)
        sums = hashlib.sha256(moments).hexdigest(), hashlib.sha256(captions).hexdigest()
        shard = Shard(f"{name}.safetensors", len(self._lines), *sums)
        self.index = replace(self.index, shards=(*self.index.shards, shard))
        self._moments, self._lines = [], []
        write_json(self.path / PARTIAL, self.index.to_dict())

    def _resume(self) -> Index:
        begun = Index.load(self.path / PARTIAL)
        self.index.check_same_making(begun, self.path)
        Cache(self.path, begun).verify()
        return begun
