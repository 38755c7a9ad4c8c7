"""Who is gone, seen with a clock of the test's own."""

import time
from types import SimpleNamespace

import pytest

from bilevel_fast.scale.overdue import LEAST, TIMES
from bilevel_fast.scale.watch import EVERY, LIMIT, PATIENCE, Watch


class Ranks:
    """Four ranks that beat once a second, until they are told not to; `ended` is what ended whom."""

    def __init__(self, world: int = 4):
        self.words, self.now, self.ended = {}, 0.0, {}
        names = [f"node{rank // 2} process {100 + rank}" for rank in range(world)]
        self.watches = [Watch(self, rank, world, names, lambda: self.now, self.end(rank)) for rank in range(world)]
        for watch in self.watches:
            watch.beat()

    def set(self, key, value):
        if self.words is None:
            raise RuntimeError("connection reset by peer")
        self.words[key] = value.encode()

    def multi_get(self, keys):
        return [self.words[key] for key in keys]

    def end(self, rank):
        return lambda line: self.ended.setdefault(rank, (self.now, line))

    def run(self, seconds: float, silent=()):
        for _ in range(round(seconds / EVERY)):
            self.now += EVERY
            for watch in self.watches:
                if watch.rank not in silent and watch.rank not in self.ended:
                    watch.look()


def test_nobody_is_gone_while_all_beat():
    ranks = Ranks()
    ranks.run(10 * LIMIT)
    assert not ranks.ended


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_a_silent_rank_ends_all_others_and_one_of_them_names_it(gone):
    ranks = Ranks()
    ranks.run(5)
    ranks.run(LIMIT + 3, silent=[gone])
    others = set(range(4)) - {gone}
    assert set(ranks.ended) == others
    assert all(LIMIT < when - 5 <= LIMIT + 2 * EVERY for when, _ in ranks.ended.values())
    lines = [line for _, line in ranks.ended.values() if line]
    assert len(lines) == 1
    assert lines[0].startswith(f"rank {gone}, on node{gone // 2} process {100 + gone}, is gone: not a word for 1")
    assert ranks.ended[min(others)][1], "the lowest that is left"


def test_whose_collective_has_failed_waits_less_for_the_one_that_is_gone():
    ranks = Ranks()
    ranks.run(5)
    for rank in (0, 2, 3):
        ranks.watches[rank].hurry()
    ranks.run(PATIENCE + 3, silent=[1])
    assert set(ranks.ended) == {0, 2, 3}
    assert all(PATIENCE < when - 5 <= PATIENCE + 2 * EVERY for when, _ in ranks.ended.values())
    assert "rank 1, on node0 process 101, is gone" in ranks.ended[0][1]


def test_who_hosts_the_store_and_fails_is_not_said_to_be_gone():
    """Rank 0 has said why, and its store goes with it."""
    ranks = Ranks()
    ranks.watches[0].say("failed", "the disk is full")
    ranks.run(EVERY, silent=[0])
    ranks.words = None
    ranks.run(PATIENCE + 1, silent=[0])
    assert set(ranks.ended) == {1, 2, 3}
    assert [line for _, line in ranks.ended.values()] == [None] * 3


def test_who_has_left_in_good_order_is_not_missed():
    ranks = Ranks()
    ranks.watches[2].say("done")
    ranks.run(3 * LIMIT, silent=[2])
    assert not ranks.ended
    assert ranks.watches[0].heard() == [None, None, ("done", ""), None]


def test_who_ends_with_an_error_has_said_so_itself():
    ranks = Ranks()
    ranks.watches[1].say("failed", "the disk is full")
    ranks.run(PATIENCE + 3, silent=[1])
    assert set(ranks.ended) == {0, 2, 3}
    assert [line for _, line in ranks.ended.values()] == [None] * 3
    assert ranks.watches[0].heard()[1] == ("failed", "the disk is full")


def test_a_lost_store_ends_its_users_and_says_whose_it_was():
    ranks = Ranks()
    ranks.run(2)
    ranks.words = None
    ranks.run(PATIENCE + 1)
    assert set(ranks.ended) == {0, 1, 2, 3}
    assert all(PATIENCE <= when - 2 <= PATIENCE + EVERY for when, _ in ranks.ended.values())
    lines = {rank: line for rank, (_, line) in ranks.ended.items() if line}
    assert lines.keys() == {1}
    assert lines[1].startswith("rank 0, on node0 process 100, is gone, or the process that started it")


def test_a_store_that_does_not_answer_is_one_that_is_lost():
    """`look` waits for it; the other thread does not."""
    ranks = Ranks()
    ranks.run(2)
    for watch in ranks.watches:
        ranks.now = 2 + LIMIT
        watch.guard()
        assert not ranks.ended
    ranks.now += EVERY
    ranks.watches[1].guard()
    assert ranks.ended[1][1].startswith("rank 0, on node0 process 100, is gone, or the process that started it")


class Steps:
    """Events that have come to pass when the test says so."""

    def __init__(self, watch):
        self.done, self.made = 0, 0
        watch.overdue._make = self.event

    def event(self):
        self.made += 1
        number = self.made
        return SimpleNamespace(record=lambda: None, query=lambda: self.done >= number)


@pytest.mark.situation
def test_a_gpu_that_does_not_end_a_step_ends_its_rank():
    """A collective that waits for ever inside a CUDA graph: one line by its rank, after two minutes at least"""
    ranks = Ranks()
    watch = ranks.watches[3]
    steps = Steps(watch)

    def at(seconds):
        ranks.now = seconds
        watch.wait_for_device()

    for _ in range(30):  # the host is far ahead of the GPU, which takes 10 s for each
        watch.overdue.given()
    for number in range(31):
        steps.done = number
        at(10.0 * number)
    at(4000.0)
    watch.overdue.given()
    at(4000.0 + LEAST)
    assert not ranks.ended
    at(4001.0 + LEAST)
    assert ranks.ended == {
        3: (4121.0, "rank 3, on node1 process 103: its GPU has been at one step for 121 s; go on with --resume")
    }


def test_a_gpu_that_has_failed_is_not_for_the_watch_to_say():
    """The training is told by CUDA; the thread goes on, as others would take its silence for an end."""
    ranks = Ranks()

    def query():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    watch = ranks.watches[0]
    watch.overdue._make = lambda: SimpleNamespace(record=lambda: None, query=query)
    watch.overdue.given()
    ranks.now += 2 * LEAST
    watch.wait_for_device()
    assert not ranks.ended


def test_long_steps_have_long_limits():
    ranks = Ranks()
    watch = ranks.watches[0]
    steps = Steps(watch)
    watch.overdue.given()
    ranks.now = 100.0
    steps.done = 1
    watch.wait_for_device()
    watch.overdue.given()
    ranks.now += TIMES * 100
    watch.wait_for_device()
    assert not ranks.ended
    ranks.now += 1
    watch.wait_for_device()
    assert ranks.ended.keys() == {0}


def test_who_waits_for_the_watch_waits_for_its_looks(monkeypatch):
    """Where it gets none, as on a machine that is too busy, no longer than for a rank that is silent."""
    ranks = Ranks()
    watch = ranks.watches[1]

    def sleeping(look):
        def sleep(seconds):
            ranks.now += seconds
            if look:
                watch.look()

        return sleep

    monkeypatch.setattr(time, "sleep", sleeping(True))
    watch.wait(6.0)
    assert ranks.now == pytest.approx(6.0, abs=0.2)
    monkeypatch.setattr(time, "sleep", sleeping(False))
    watch.wait(6.0)
    assert ranks.now == pytest.approx(6.0 + 6.0 + LIMIT, abs=0.4)
