"""What graphics cards can do at most, from data sheets and from what others have measured, and what this machine can.

    CARDS["H200"].matmul          published; nothing here was measured by this project
    this_machine(device).matmul   measured, here and now

Sources
    flops, bytes_per_s, bytes   NVIDIA's data sheets; dense bf16 with fp32 accumulation. A6000 and 6000 Ada give sparse
                                rates or none: SMs x boost clock x 1,024 FLOP per cycle, 84 x 1.80 GHz and 142 x
                                2.505 GHz (the A40 and L40S, for which it is published, agree)
    matmul                      the fastest bf16 product, of whatever shape, that github.com/mag-/gpu_benchmark reports
                                (README at 2218e0a); github.com/stas00/ml-engineering (compute/accelerator) says that
                                an H200 multiplies as an H100 does
    launch_s                    what eager PyTorch takes on the host for one op: an assumption, 5 us, on every card
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Card:
    """One card.

    Attributes:
        sm: Compute capability, as in `sm_90`.
        flops: Peak bf16 FLOP/s, dense, fp32 accumulation.
        matmul: Best published measured bf16 FLOP/s.
        bytes_per_s: Peak memory bandwidth.
        bytes: Memory that a program gets of it, about.
        launch_s: Seconds of the host for one op.
    """

    sm: int
    flops: float
    matmul: float
    bytes_per_s: float
    bytes: int
    launch_s: float = 5e-6


_GIB = 2**30

# by what torch.cuda.get_device_name says, or a part of it
CARDS = {
    "RTX A6000": Card(86, 154.8e12, 131.2e12, 768e9, int(47.4 * _GIB)),
    "RTX 6000 Ada": Card(89, 364.2e12, 278.5e12, 960e9, int(47.4 * _GIB)),
    # GeForce: half the rate where sums are fp32, which is what PyTorch asks for; it ran above its nominal clock
    "RTX 4090": Card(89, 165.2e12, 178.8e12, 1008e9, int(23.5 * _GIB)),
    "A100-SXM4-80GB": Card(80, 312e12, 267.9e12, 2039e9, int(79.1 * _GIB)),
    "H100 80GB HBM3": Card(90, 989.4e12, 821.2e12, 3350e9, int(79.1 * _GIB)),
    "H200": Card(90, 989.4e12, 821.2e12, 4800e9, int(139.7 * _GIB)),
}


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: FLOP/s of a matrix product, bytes per second of a copy (read and written)."""

    matmul: float
    copy: float


def this_machine(device: torch.device, dtype: torch.dtype | None = None, seconds: float = 1.0) -> Ceilings:
    """Measure a product of square matrices and a copy that exceeds all caches; the best of what fits `seconds` each.

    Args:
        device: `cpu` or `cuda`.
        dtype: Of the product: bf16 on a GPU and fp32 on a CPU if None.
        seconds: For each of the two, warm-up excluded.
    """
    cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if cuda else torch.float32)
    n = 8192 if cuda else 1024
    # random: a GPU multiplies zeros faster, as they need less power
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(2**28 if cuda else 2**24, device=device)
    target = torch.empty_like(source)

    wait = partial(torch.cuda.synchronize, device) if cuda else (lambda: None)
    best = partial(_best, repeat=10 if cuda else 1, seconds=seconds, wait=wait)
    product = best(lambda: torch.mm(a, b, out=out))
    return Ceilings(2 * n**3 / product, 2 * source.nbytes / best(lambda: target.copy_(source)))


def _best(call: Callable[[], object], repeat: int, seconds: float, wait: Callable[[], None]) -> float:
    """Seconds of the fastest call, called `repeat` times at a time."""
    call()
    wait()
    found: list[float] = []
    start = end = time.perf_counter()
    while not found or end - start < seconds:
        before = time.perf_counter()
        for _ in range(repeat):
            call()
        wait()
        end = time.perf_counter()
        found.append((end - before) / repeat)
    return min(found)
