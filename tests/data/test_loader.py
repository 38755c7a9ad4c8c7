"""Batches ahead of time: the same ones, in whatever order they are asked for, and errors where they belong."""

import threading

import pytest
import torch

from bilevel_fast.data.loader import Ahead, Loader
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


def test_made_ahead_in_order_by_one_other_thread():
    made, here = [], threading.current_thread()

    def make(step):
        made.append((step, threading.current_thread() is here))
        return 10 * step

    ahead = Ahead(make)
    assert [ahead(step) for step in (0, 1, 2, 7, 8, 3)] == [0, 10, 20, 70, 80, 30]
    ahead.close()
    steps = [step for step, _ in made]
    # every queue in order, at most two beyond the step that was wanted, and anew after each jump
    assert steps[:5] == [0, 1, 2, 3, 4]
    assert steps[5:9] == [7, 8, 9, 10]
    assert steps[9] == 3
    assert len(steps) <= 12
    assert not any(mine for _, mine in made)


def test_an_error_of_the_thread_is_raised_in_its_step_and_can_be_outlived():
    broken = {2}

    def make(step):
        if step in broken:
            raise ValueError("shard 7 is damaged")
        return step

    ahead = Ahead(make)
    assert (ahead(0), ahead(1)) == (0, 1), "it was made already, and is not wanted yet"
    with pytest.raises(ValueError, match="shard 7 is damaged"):
        ahead(2)
    broken.clear()
    assert (ahead(2), ahead(3)) == (2, 3)
    ahead.close()


def test_closed_while_the_queue_is_full():
    """What is being made ends; what only waits for its turn is not made; no thread is left."""
    gate, started, made = threading.Event(), threading.Event(), []

    def make(step):
        if step == 1:
            started.set()
            gate.wait(10)
        made.append(step)

    ahead = Ahead(make)
    ahead(0)
    assert started.wait(10)
    threading.Timer(0.2, gate.set).start()
    ahead.close()
    assert made == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
