"""The ranks of a run: what they give each other, agree on and wait for.

    with Team.join(Ranks.from_environment(), "auto") as team:
        ...

A rank that leaves with an error says so to the others, which end then, too: one line, by whom it concerns. One that is
killed or stopped is missed after seconds (`watch`). Tensors travel as bytes, over gloo on CPUs and NCCL on GPUs.

This is the only module that makes process groups.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bilevel_fast.base.devices import ONE, Ranks
from bilevel_fast.base.errors import UserError, describe
from bilevel_fast.scale.watch import EVERY, PATIENCE, Watch

T = TypeVar("T")

_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"

# newer releases of torch warn of the names that this one has
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

_START = timedelta(minutes=5)  # for all ranks to be there
_NEVER = timedelta(days=1)  # collectives wait as long as the others live, which is `Watch`'s to say


class Pending(Protocol):
    """A collective on its way: wait before what it fills is read, or what it sends is written to."""

    def wait(self) -> object: ...


class _Done:
    """Of a process alone."""

    def wait(self) -> None:
        return


DONE = _Done()


class Team:
    """One rank among all. `Team()` is a process alone: it has no process group, and every call is its own answer.

    Attributes:
        ranks: Which one, of how many.
        launched: Whether torchrun started it.
    """

    def __init__(self, ranks: Ranks = ONE):
        self.ranks, self.rank, self.world = ranks, ranks.rank, ranks.world
        self.launched = ranks.local is not None
        self._watch: Watch | None = None
        self._store: Any = None
        self._asked = 0
        self._pending: tuple[Any, Tensor] | None = None

    @classmethod
    def join(cls, ranks: Ranks) -> Self:
        """Meet the others, as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say.

        Raises:
            UserError: They did not come.
        """
        team = cls(ranks)
        if ranks.world == 1:
            return team
        try:
            team._meet()
        except UserError:
            if ranks.local:  # the first one of this machine says it
                time.sleep(PATIENCE)
                raise SystemExit(2) from None
            raise
        return team

    def _meet(self) -> None:
        ranks = self.ranks
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and os.environ.get(_OWN_STORE) != "1":
            # restarted processes would read what the dead ones have left there (pytorch #135712)
            raise UserError(f"torchrun has --max-restarts, and {_OWN_STORE} is not 1: no restart would succeed; set it")
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
        if not host:
            raise UserError("MASTER_ADDR is not set; wanted the machine of rank 0, as torchrun says it")
        if not port.isdecimal():
            raise UserError(f"MASTER_PORT is {port!r}, wanted a number")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            found = dist.rendezvous("env://", ranks.rank, ranks.world, timeout=_START)  # pyright: ignore[reportPrivateImportUsage]
            store, rank, world = next(found)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_NEVER)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"rank {ranks.rank} of {ranks.world} did not meet the others at {host}:{port}: {reason}"
            ) from error
        self._store = dist.PrefixStore("bilevel_fast", store)  # pyright: ignore[reportPrivateImportUsage]
        name = f"{os.uname().nodename} process {os.getpid()}"
        names = [str(found) for found in self._told(name)]
        self._watch = Watch(self._store, self.rank, self.world, names)
        self._watch.beat()
        self._told(None)  # all have beaten
        self._watch.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is None:
            return
        if error is None or (isinstance(error, SystemExit) and error.code != 2):
            self._leave()
        else:
            self._fail(error)

    def _leave(self) -> None:
        """When rank 0 has done all there is to do; with an error if that went wrong: it has said why."""
        assert self._watch is not None
        if self._pending is not None:
            self._pending[0].wait()
        while self.rank and (said := self._watch.heard()[0]) != ("done", ""):
            if said is not None:
                os._exit(2)
            time.sleep(0.1)
        self._watch.say("done")
        while self.rank == 0 and not all(self._watch.heard()):  # it may hold the store
            time.sleep(0.05)
        self._watch.stop()
        dist.destroy_process_group()

    def _fail(self, error: BaseException) -> NoReturn:
        """Say why, unless the first rank says the same, and end the process: its group cannot be left in good order."""
        assert self._watch is not None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to all when one is gone
        if isinstance(error, RuntimeError):
            self._watch.hurry()
            self._watch.wait(2 * PATIENCE)  # if it is another's fault, the watch ends this process meanwhile
        known = isinstance(error, UserError | OSError | KeyboardInterrupt)
        message, code = describe(error)
        if not known:
            traceback.print_exception(error)
        if self.rank == 0:
            if known:
                print(f"error: {message}", file=sys.stderr, flush=True)
            self._watch.say("failed", message)
            time.sleep(2 * EVERY)  # it may hold the store: the others read there that they need not say the same
        else:
            self._watch.say("failed", message)
            # torchrun ends all others as soon as one has ended: the first has said it before it says that it failed
            if known and not self._first_says(message):
                print(f"error: rank {self.rank}: {message}", file=sys.stderr, flush=True)
        os._exit(code)

    def _first_says(self, message: str) -> bool:
        """Whether rank 0 fails with this message, too, and soon."""
        assert self._watch is not None
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                if self._watch.heard()[0] == ("failed", message):
                    return True
            except RuntimeError:  # the store is gone
                return False
            time.sleep(0.05)
        return False

    # ---- tensors

    def exchange(self, out: Tensor, x: Tensor) -> Pending:
        """Part r of `x` goes to rank r; `out` is what came, in the order of ranks. Both (world n,), of one dtype."""
        if self.world == 1:
            out.copy_(x)
            return DONE
        return _of(dist.all_to_all_single(out.view(torch.uint8), x.view(torch.uint8), async_op=True))

    def gather(self, out: Tensor, x: Tensor) -> Pending:
        """`out` (world n,) becomes everybody's `x` (n,), in the order of ranks."""
        if self.world == 1:
            out.copy_(x)
            return DONE
        return _of(_all_gather(out.view(torch.uint8), x.view(torch.uint8), async_op=True))

    def add_up(self, out: Tensor, x: Tensor) -> Pending:
        """`out` (n,) becomes the sum of part r of everybody's `x` (world n,), in the dtype of both, in any order."""
        if self.world == 1:
            out.copy_(x)
            return DONE
        return _of(_reduce_scatter(out, x, async_op=True))

    def has_given(self, device: torch.device) -> None:
        """The device has been given a step; if it is a GPU and does not end it, the process ends."""
        if self._watch is not None and device.type == "cuda":
            self._watch.overdue.given()

    # ---- agreements

    def any(self, flag: bool) -> bool:
        """Whether `flag` was up somewhere at the call before this one, the same on all ranks: nobody waits for it.

        Alone it is the flag of this call.
        """
        if self.world == 1:
            return flag
        said = False
        if self._pending is not None:
            work, up = self._pending
            work.wait()
            said = bool(up.item())
        up = torch.tensor([int(flag)])
        self._pending = dist.all_reduce(up, dist.ReduceOp.MAX, async_op=True), up
        return said

    def first(self, call: Callable[[], T]) -> T:
        """What `call`, which rank 0 alone makes, has returned: of JSON. If it raises there, all ranks end."""
        if self.world == 1:
            return call()
        key = self._next_key()
        if self.rank == 0:
            found = call()
            self._store.set(key, json.dumps(found))
            return found
        self._wait_for(key)
        return json.loads(self._store.get(key))

    def in_turn(self, call: Callable[[], T]) -> T:
        """`call` by rank 0, and when it has returned, by all others: what the first has made, these find."""
        if self.rank == 0:
            found = call()
            self.first(lambda: None)
            return found
        self.first(lambda: None)
        return call()

    def least(self, number: int) -> int:
        """The least of everybody's numbers."""
        return min(self._told(number))

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Go on if all ranks say the same.

        Args:
            facts: JSON values, by what they are.

        Raises:
            UserError: On all ranks the same: who says what about what.
        """
        told = self._told(dict(facts))
        for rank, other in enumerate(told):
            for name in told[0] | other:
                ours, theirs = (json.dumps(said.get(name, "absent")) for said in (told[0], other))
                if ours != theirs:
                    raise UserError(
                        f"rank {rank} differs from rank 0 in {name}: {theirs}, wanted {ours}; start all ranks alike"
                    )

    def _told(self, value: Any) -> list[Any]:
        """Everybody's JSON values, by rank."""
        if self.world == 1:
            return [value]
        key = self._next_key()
        keys = [f"{key}/{rank}" for rank in range(self.world)]
        self._store.set(keys[self.rank], json.dumps(value))
        for other in keys:
            self._wait_for(other)
        return [json.loads(found) for found in self._store.multi_get(keys)]

    def _next_key(self) -> str:
        self._asked += 1
        return f"said/{self._asked}"

    def _wait_for(self, key: str) -> None:
        """Asked again and again: a store that waits would not let the watch through."""
        until = time.monotonic() + _START.total_seconds()
        while not self._store.check([key]):
            if self._watch is None and time.monotonic() > until:
                raise UserError(f"rank {self.rank} of {self.world} has waited {_START} for the others")
            time.sleep(0.02)


def _of(work: Pending | None) -> Pending:
    assert work is not None, "this process is no member of the group"
    return work


ALONE = Team()
"""The only process of its run."""
