"""Batches ahead of time: the same ones, in whatever order they are asked for, and errors where they belong."""

import threading

import pytest
import torch

from bilevel_fast.data.loader import Loader
from bilevel_fast.randomness import Stream, integers, normal
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
