"""How we measure: providers interleaved in one run, medians and quantiles, ratios rather than absolute times.

Shared machines drift by more than most differences are worth. So every round times each provider once, in an order
that rotates, and a ratio is the median over rounds of the ratio within a round.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from bilevel_fast.ops.graphs import WARMUP, Record, cuda_recorder, side_stream


class Unavailable(Exception):
    """Why a provider cannot run here."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds."""

    seconds: tuple[float, ...]

    @property
    def p50(self) -> float:
        return median(self.seconds)

    @property
    def p20(self) -> float:
        return quantiles(self.seconds, n=5, method="inclusive")[0]

    @property
    def p80(self) -> float:
        return quantiles(self.seconds, n=5, method="inclusive")[3]

    def map(self, function: Callable[[float], float]) -> "Timing":
        """The same rounds in other units, such as images per second."""
        return Timing(tuple(map(function, self.seconds)))

    def times_faster_than(self, other: "Timing") -> "Timing":
        """other / self, round by round."""
        return Timing(tuple(b / a for a, b in zip(self.seconds, other.seconds, strict=True)))


def interleaved(
    providers: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every provider once per round.

    Args:
        providers: What to call, by name.
        rounds: At least 2.
        warmup: Rounds before the first that counts.
        synchronize: Waits for the device.
    """
    names = list(providers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize()
            start = time.perf_counter()
            providers[name]()
            synchronize()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def recorded(
    make: Callable[[], Callable[[], object]], device: torch.device, record: Record | None = None
) -> tuple[Callable[[], Any], bool]:
    """The call that `make` returns, replayed from a CUDA graph, and True; itself and False where it cannot be recorded.

    What `make` prepares for a backward pass is on the stream of the recording. The replay returns the tensors that it
    writes.

    Args:
        make: Makes the call.
        device: Where nothing can be recorded, the call runs as it is.
        record: Records instead of the device's own recorder.
    """
    record = record or cuda_recorder(device)
    if record is None:
        return make(), False
    with side_stream(device):
        call = make()
        for _ in range(WARMUP):
            call()
        try:
            replay, out = record(call)
        except RuntimeError:
            return call, False
    return lambda: (replay(), out)[1], True


def evict(cache: torch.Tensor) -> torch.Tensor:
    """Fill L2 with lines of `cache`, read and not written: dirty ones the next call would have to write back."""
    return cache.sum()


def interleaved_cuda(providers: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, Timing]:
    """As `interleaved`, timed by the GPU itself, with an L2 cache that holds nothing of the call's."""
    names = list(providers)
    cache = torch.zeros(2**26, dtype=torch.float32, device="cuda")  # 256 MiB, more than any L2
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            evict(cache)
            start.record()
            providers[name]()
            end.record()
            if number >= warmup:
                spans[name].append((start, end))
    torch.cuda.synchronize()
    return {name: Timing(tuple(s.elapsed_time(e) / 1e3 for s, e in found)) for name, found in spans.items()}
