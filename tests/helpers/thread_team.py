"""Ranks that are threads of one process, and what they have sent each other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from bilevel_fast.base.devices import Ranks
from bilevel_fast.scale.team import DONE, Team


class Threads(Team):
    """A team within a process.

    Attributes:
        events: What this rank has sent, in order: ("exchange" | "gather", where it begins in its buffer).
    """

    def __init__(self, rank, table, barrier, store):
        super().__init__(Ranks(rank, len(table)))
        self._store = store
        self.table, self.barrier, self.events = table, barrier, []

    def everybodys(self, x):
        self.table[self.rank] = x.clone()
        self.barrier.wait()
        found = list(self.table)
        self.barrier.wait()
        return found

    def exchange(self, out, x):
        self.events.append(("exchange", x.storage_offset()))
        out.copy_(torch.cat([part.chunk(self.world)[self.rank] for part in self.everybodys(x)]))
        return DONE

    def gather(self, out, x):
        self.events.append(("gather", x.storage_offset()))
        out.copy_(torch.cat(self.everybodys(x)))
        return DONE


def together(world, call):
    """What `call(team)` returns on each rank."""
    table, barrier, store = [None] * world, threading.Barrier(world, timeout=60), dist.HashStore()

    def work(rank):
        try:
            return call(Threads(rank, table, barrier, store))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, range(world)))
