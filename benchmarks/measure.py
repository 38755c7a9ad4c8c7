"""How we measure: providers interleaved in one run, medians and quantiles, ratios rather than absolute times.

Shared machines drift by more than most differences are worth. So every round times each provider once, in an order
that rotates, and a ratio is the median over rounds of the ratio within a round.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles


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


def captured(make: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object], bool]:
    """The call that `make` returns, as a CUDA graph and True; or itself and False where it cannot be captured.

    All of it happens on one side stream: what `make` prepares for a backward pass must be on the stream of the capture.
    """
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call = make()
        for _ in range(3):  # lazy initialisation and autotuning must be over
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call, False
    return graph.replay, True


def interleaved_cuda(providers: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, Timing]:
    """As `interleaved`, timed by the GPU itself, with an L2 cache that holds nothing of the call's."""
    import torch

    names = list(providers)
    cache = torch.empty(2**26, dtype=torch.float32, device="cuda")  # 256 MiB, more than any L2
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            start.record()
            providers[name]()
            end.record()
            if number >= warmup:
                spans[name].append((start, end))
    torch.cuda.synchronize()
    return {name: Timing(tuple(s.elapsed_time(e) / 1e3 for s, e in found)) for name, found in spans.items()}
