"""How we measure: providers interleaved in one run, medians and quantiles, ratios rather than absolute times.

Shared machines drift by more than most differences are worth. So every round times each provider once, in an order
that rotates, and a ratio is the median over rounds of the ratio within a round.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds."""

    seconds: tuple[float, ...]

    @property
    def p50(self) -> float:
        return median(self.seconds)

    @property
    def p20(self) -> float:
        return quantiles(self.seconds, n=5)[0]

    @property
    def p80(self) -> float:
        return quantiles(self.seconds, n=5)[3]

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
