"""What cuDNN makes of odd channel counts, and to which multiple pruned widths are best padded.

    python -m benchmarks.speed.alignment --device cuda --out rows.jsonl            the widths around 0.7 of a level
    python -m benchmarks.speed.alignment --device cuda --full --out rows.jsonl     every kept-group count of every level
    python -m benchmarks.speed.alignment --tiny                                    a rehearsal on the CPU

Times the 3x3 convolutions of a pruned ResNet: conv1, from the level's channels C to the kept width, and conv2 back;
forward, gradient of the input (dgrad) and gradient of the weight (wgrad) apart; channels_last, bf16 on CUDA and fp32 on
the CPU. All widths of one convolution are timed in one interleaved run; on CUDA from graphs, with a cold L2 cache.

A kept group is C / 32 channels wide, so k groups are stored as k C / 32 channels rounded up to a multiple of `align`.
The rule that the times support is the `align` in 1, 8, 16, 32 with the least total time over the group counts of which
all four widths were measured (no time is interpolated), over levels, positions and directions, each counted once; the
smaller of equals.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.measure import Timing, interleaved, interleaved_cuda, recorded
from benchmarks.rows import append_rows
from bilevel_fast.base import errors, flags
from bilevel_fast.base.devices import settle_libraries
from bilevel_fast.base.errors import UserError
from bilevel_fast.ops.randomness import Stream, normal

ALIGNS = (1, 8, 16, 32)
DIRECTIONS = ("fwd", "dgrad", "wgrad")
POSITIONS = ("conv1", "conv2")
Row = dict[str, Any]


@dataclass(frozen=True)
class Level:
    """ResNets of one resolution: `groups` norm groups of `channels` channels at `size` x `size`."""

    channels: int
    size: int
    groups: int
    widths: tuple[int, ...]
    """What is measured of it unless everything is."""

    @property
    def unit(self) -> int:
        """Channels of one group."""
        return self.channels // self.groups

    def all_widths(self) -> tuple[int, ...]:
        """Every group count, padded in every way."""
        counts = range(1, self.groups + 1)
        return tuple(sorted({padded(k * self.unit, align) for k in counts for align in ALIGNS}))


SD21 = (
    Level(320, 64, 32, (210, 216, 220, 224, 230, 232, 240, 248, 256)),
    Level(640, 32, 32, (420, 424, 430, 432, 440, 448)),
)
SD21_FULL = (*SD21, Level(1280, 16, 32, ()))
MINI = (Level(48, 16, 16, (27, 30, 32)), Level(96, 8, 16, (48, 54, 56, 64)))


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    tiny: bool = False
    """The mini world's levels instead of SD 2.1's."""
    full: bool = False
    """Measure every group count of every level, padded in every way; with SD 2.1's 1280 channels at 16 x 16 as well."""
    batch: int = 16
    """Images."""
    rounds: int = 20
    """Rounds that count."""
    out: Path | None = None
    """Append rows to this file, convolution by convolution."""
    json: bool = False
    """One JSON object per row instead of text."""


def padded(width: int, align: int) -> int:
    """`width` rounded up to a multiple of `align`."""
    return -(-width // align) * align


# --- measuring ---


@dataclass(frozen=True)
class Numbers:
    """Normal numbers, each (n,), that inputs, weights and upstream gradients of every width are views of."""

    x: Tensor
    weight: Tensor
    upstream: Tensor

    @classmethod
    def make(cls, level: Level, batch: int, device: torch.device, dtype: torch.dtype) -> "Numbers":
        widest = max(level.channels, *level.widths, *level.all_widths())
        sizes = (batch * level.size**2 * widest, 9 * level.channels * widest, batch * level.size**2 * widest)
        streams = (Stream.WORLD, Stream.INITIAL, Stream.NOISE)
        return cls(*(normal(0, s, [0], (n,))[0].to(device, dtype) for s, n in zip(streams, sizes, strict=True)))


def _channels_last(numbers: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    return numbers[: n * c * h * w].view(n, h, w, c).permute(0, 3, 1, 2)


def convolution(numbers: Numbers, cin: int, cout: int, size: int, batch: int, direction: str) -> Callable[[], Any]:
    """A 3x3 convolution of (batch, cin, size, size) to cout channels, or its gradients as `direction` says, ready to be
    called; a backward call returns (dgrad, wgrad, None) with None for what was not asked for."""
    x = _channels_last(numbers.x, batch, cin, size, size)
    weight = _channels_last(numbers.weight, cout, cin, 3, 3)
    shape = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups
    if direction == "fwd":
        return lambda: torch.ops.aten.convolution(x, weight, None, *shape)
    upstream = _channels_last(numbers.upstream, batch, cout, size, size)
    wanted = [direction == "dgrad", direction == "wgrad", False]
    return lambda: torch.ops.aten.convolution_backward(upstream, x, weight, None, *shape, wanted)


def measure(settings: Settings) -> Iterator[list[Row]]:
    """Rows of one level, position and direction after the other: `ms` of each width, and what padding does to it."""
    device = torch.device(settings.device)
    settle_libraries(device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    machine = describe(device) | {
        "dtype": str(dtype).removeprefix("torch."),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
    for level in MINI if settings.tiny else SD21_FULL if settings.full else SD21:
        widths = level.all_widths() if settings.full else level.widths
        numbers = Numbers.make(level, settings.batch, device, dtype)
        for position in POSITIONS:
            for direction in DIRECTIONS:
                calls = {}
                for width in widths:
                    cin, cout = (level.channels, width) if position == "conv1" else (width, level.channels)
                    call = convolution(numbers, cin, cout, level.size, settings.batch, direction)
                    calls[str(width)] = recorded(lambda call=call: call, device)[0]
                timings = (interleaved_cuda if cuda else interleaved)(calls, settings.rounds)
                found = {int(width): timing for width, timing in timings.items()}
                yield [row | machine for row in rows_of(found, level, settings.batch, position, direction)]


def rows_of(timings: dict[int, Timing], level: Level, batch: int, position: str, direction: str) -> Iterator[Row]:
    """`ms` of each width, and `times_faster_than_unpadded` of each that a whole number of groups is padded to."""
    size = level.size
    for width, timing in timings.items():
        config = {
            "channels": level.channels, "size": size, "groups": level.groups, "batch": batch,
            "position": position, "direction": direction, "width": width,
        }  # fmt: skip
        shared = {
            "suite": "alignment",
            "case": f"{level.channels} {size}x{size} b{batch} {position} {direction} {width}",
            "config": config,
        }
        macs = 9 * level.channels * width * size**2 * batch
        yield shared | {
            "provider": "unpadded", "metric": "ms", "unit": "ms", "value": timing.p50 * 1e3, "p20": timing.p20 * 1e3,
            "p80": timing.p80 * 1e3, "tflop_per_s": 2 * macs / timing.p50 / 1e12,
        }  # fmt: skip
        if width % level.unit:
            continue
        for wider in sorted({padded(width, align) for align in ALIGNS} & timings.keys() - {width}):
            gain = timings[wider].times_faster_than(timing)
            yield shared | {
                "provider": f"padded to {wider}", "metric": "times_faster_than_unpadded", "unit": "x",
                "value": gain.p50, "p20": gain.p20, "p80": gain.p80,
                "aligns": [align for align in ALIGNS if padded(width, align) == wider],
            }  # fmt: skip


# --- the rule ---


def totals(rows: Sequence[Row]) -> tuple[dict[int, float], int]:
    """Milliseconds of all convolutions, for each `align`, and how many of them there are.

    A convolution is a level, position, direction and kept-group count; it counts if it was measured at all the widths
    that it is padded to.
    """
    ms: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        if row["metric"] == "ms" and row["value"] is not None:
            c = row["config"]
            key = (c["channels"], c["size"], c["groups"], c["batch"], c["position"], c["direction"])
            ms.setdefault(key, {})[c["width"]] = row["value"]
    sums, number = dict.fromkeys(ALIGNS, 0.0), 0
    for (channels, _, groups, *_), measured in ms.items():
        for count in range(1, groups + 1):
            widths = {align: padded(count * channels // groups, align) for align in ALIGNS}
            if all(width in measured for width in widths.values()):
                number += 1
                for align, width in widths.items():
                    sums[align] += measured[width]
    return sums, number


def best_align(rows: Sequence[Row]) -> int:
    """The multiple to pad kept widths to: the least total time, the smaller of equals.

    Raises:
        UserError: No kept-group count was measured at all the widths that it is padded to.
    """
    sums, number = totals(rows)
    if not number:
        raise UserError("no kept width was measured together with all that it is padded to")
    return min(ALIGNS, key=lambda align: (sums[align], align))


# --- command line ---


def text(row: Row) -> str:
    spread = f"({row['p20']:.3f} .. {row['p80']:.3f})"
    start = f"{row['case']:<36}{row['value']:>9.3f} {row['unit']:<3}{spread:<19}"
    if row["metric"] == "ms":
        return f"{start}{row['tflop_per_s']:>7.1f} TFLOP/s"
    return f"{start}  as fast, {row['provider']} (align {', '.join(map(str, row['aligns']))})"


def conclusion(rows: Sequence[Row]) -> str:
    """Total times, level by level and together, and the rule."""
    channels = dict.fromkeys(row["config"]["channels"] for row in rows)
    parts = {f"{c} channels": [row for row in rows if row["config"]["channels"] == c] for c in channels}
    lines = [f"{'total ms':<16}" + "".join(f"{f'align {align}':>12}" for align in ALIGNS)]
    for name, part in (parts | {"together": rows}).items():
        sums, number = totals(part)
        lines.append(
            f"{name:<16}" + "".join(f"{sums[align]:>12.3f}" for align in ALIGNS) + f"   of {number} convolutions"
        )
    return "\n".join([*lines, f"best align: {best_align(rows)}"])


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.speed.alignment", __doc__)
    for flag, least in (("batch", 1), ("rounds", 4)):
        if getattr(settings, flag) < least:
            raise UserError(f"--{flag} {getattr(settings, flag)}: wanted at least {least}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU")
    rows: list[Row] = []
    for found in measure(settings):
        rows += found
        for row in found:
            print(json.dumps(row) if settings.json else text(row), flush=True)
        if settings.out is not None:
            append_rows(settings.out, found)
    if not settings.json:
        print("\n" + conclusion(rows))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
