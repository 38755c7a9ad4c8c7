"""Batches ahead of time: the same ones, in whatever order they are asked for, and errors where they belong."""

import threading
from pathlib import Path

import pytest
import torch

from bilevel_fast.base.devices import Ranks
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.cache import Cache, Index
from bilevel_fast.data.loader import Loader, RankBatches
from bilevel_fast.data.writer import CacheWriter
from bilevel_fast.ops.randomness import Stream, integers, normal
from world import SEED, make_batch


def test_batches_come_drawn_and_on_the_device(device):
    with Loader(lambda step: make_batch(0, step), torch.device(device), SEED, timesteps=1000) as loader:
        # in order, a jump as after a resume, and back
        for step in (0, 1, 2, 3, 9, 10, 4):
            batch, wanted = loader(step), make_batch(0, step)
            assert torch.equal(batch.index, wanted.index)
            assert torch.equal(batch.latents.cpu(), wanted.latents)
            assert torch.equal(
                batch.eps.cpu(), normal(SEED, Stream.NOISE, wanted.index, tuple(wanted.latents.shape[1:]))
            )
            assert torch.equal(batch.t.cpu(), integers(SEED, Stream.TIMESTEP, wanted.index, 1000))
            assert {x.device.type for x in (batch.latents, batch.text, batch.anchor, batch.eps, batch.t)} == {device}


def test_what_is_drawn_is_not_drawn_again():
    batch = make_batch(0, 0).drawn(SEED, 1000)
    assert batch.drawn(SEED + 1, 10) is batch


def test_an_error_is_raised_where_the_batch_is_wanted(device):
    def broken(step):
        if step == 2:
            raise ValueError("shard 7 is damaged")
        return make_batch(0, step)

    with Loader(broken, torch.device(device), SEED, timesteps=1000) as loader:
        loader(0), loader(1)
        with pytest.raises(ValueError, match="shard 7 is damaged"):
            loader(2)


def test_no_thread_is_left_behind(device):
    before = threading.active_count()
    with Loader(lambda step: make_batch(0, step), torch.device(device), SEED, timesteps=1000) as loader:
        loader(0)
    assert threading.active_count() == before


@pytest.mark.gpu
def test_the_gpu_waits_for_a_batch_that_is_still_on_its_way():
    """Many batches while the device is busy: every one is whole when it is read."""
    device = torch.device("cuda")
    big = torch.randn(4096, 4096, device=device)
    with Loader(lambda step: make_batch(0, step), device, SEED, timesteps=1000) as loader:
        sums = []
        for step in range(50):
            big = big @ big.T / 4096
            sums.append(loader(step).latents.sum())
    for step, total in enumerate(sums):
        torch.testing.assert_close(total.cpu(), make_batch(0, step).latents.sum(), rtol=1e-4, atol=1e-4)


class _Letters:
    """A text encoder whose states do not depend on the rest of the batch."""

    width, length = 1, 12

    def encode(self, prompts):
        codes = [[ord(letter) for letter in prompt.ljust(self.length)] for prompt in prompts]
        return torch.tensor(codes, dtype=torch.float32)[..., None]

    def mask(self, prompts):
        return torch.ones(len(prompts), self.length, dtype=torch.bool)


@pytest.fixture
def cache(tmp_path) -> Cache:
    """Ten samples in three files, two views each; the posterior is wide."""
    writer = CacheWriter(tmp_path, Index("images", (2, 4, 4), vae="none", views=2, dtype="float32"), shard_samples=4)
    for sample in range(10):
        writer.add(normal(3, Stream.WORLD, [sample], (2, 4, 4, 4))[0], [f"{sample} {letter}" for letter in "abc"])
    return writer.finish()


def _batches(cache: Cache | Path) -> Batches:
    return Batches(Cache.open(cache) if isinstance(cache, Path) else cache, _Letters(), 6, SEED, p_uncond=0.2)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_the_batch_that_one_process_has(cache, world):
    """Over several epochs, whose ends lie within batches; noise and timesteps included."""
    whole = _batches(cache)
    ranks = [RankBatches(_batches(cache.path), Ranks(rank, world)) for rank in range(world)]
    for step in range(5):
        wanted = whole(step).drawn(SEED, 1000)
        for rank, batches in enumerate(ranks):
            batch = batches(step).drawn(SEED, 1000)
            for name in ("latents", "text", "index", "eps", "t"):
                assert torch.equal(getattr(batch, name), getattr(wanted, name)[rank::world]), (name, step, rank)
            assert batch.captions == wanted.captions[rank::world]


def test_an_epoch_has_each_sample_once_whatever_the_world(cache):
    seen = []
    for rank in range(2):
        share = RankBatches(Batches(cache, _Letters(), 6, SEED), Ranks(rank, 2))
        seen += [caption.split()[0] for step in range(5) for caption in share(step).captions]
    assert sorted(seen) == sorted(str(sample) for sample in range(10) for _ in range(3)), "30 rows are three epochs"


def test_a_rank_goes_on_in_the_middle_of_an_epoch(cache):
    """A new process, that never saw the steps before, makes the same batch; so does one that jumps back."""
    whole = RankBatches(_batches(cache), Ranks(1, 2))
    steps = [whole(step) for step in range(7)]
    for step in (4, 1, 6):
        fresh = RankBatches(_batches(cache.path), Ranks(1, 2))(step)
        assert torch.equal(fresh.latents, steps[step].latents)
        assert fresh.captions == steps[step].captions
    assert torch.equal(whole(2).latents, steps[2].latents)


def test_ranks_must_share_evenly(cache):
    with pytest.raises(UserError, match="a batch of 6 cannot be shared evenly by 4 processes"):
        RankBatches(_batches(cache), Ranks(0, 4))
