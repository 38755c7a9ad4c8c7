"""The optimizer step over all of SD 2.1's UNet: parameters in fp32, gradient in the compute dtype, EMA, 16-bit copy.

`apart`: the gradient lies in many tensors, as backward leaves it; torch moves them into one first.

What torch and apex ship, and our CUDA code, take fp32 gradients only: those peers read 2 B an element more. EMA and
copy are further passes where the library has none.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.measure import Unavailable
from bilevel_fast.ops.native import AdamW, Trained
from bilevel_fast.ops.native import cuda as native
from bilevel_kernels.adamw_ema import GROUP, Places, adamw_ema_, adamw_ema_bytes, adamw_ema_ref

DENSE = 865_910_724  # parameters of SD 2.1's UNet; 16 does not divide it
SIZES = {"dense": DENSE, "0.80": 676_000_000}  # at 0.80 of the MACs
EMA_DECAY = 0.9999
LR = 1e-5

Call = Callable[[], object]


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    """`batch` plays no part. On the CPU, where they are compiled and not run, the sizes are small."""
    copy_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    sizes = SIZES if device.type == "cuda" else {name: n % 2**10 + 2**12 for name, n in SIZES.items()}
    return [
        Case(
            "adamw_ema",
            f"{name} {n} step",
            _providers(n, device, dtype, copy_dtype),
            bytes=adamw_ema_bytes(n, dtype, ema=True, copy=copy_dtype),
            numel=n,
        )
        for name, n in sizes.items()
    ] + [
        Case(
            "adamw_ema",
            f"{name} {n} step apart",
            {"triton": partial(_apart, n, device, dtype, True), "torch": partial(_apart, n, device, dtype, False)},
            bytes=adamw_ema_bytes(n, dtype, ema=False, copy=copy_dtype),
            numel=n,
        )
        for name, n in list(sizes.items())[:1]
    ]


def _apart(n: int, device: torch.device, dtype: torch.dtype, where_they_lie: bool) -> Call:
    """Without an average, as the trainer does it by default; 250 gradients are about those of SD 2.1 that are large."""
    size = max(n // 250 // GROUP, 1) * GROUP
    n = max(n, 250 * size)
    starts = [number * size for number in range(250)]
    places = Places.of(n, starts, [size] * 250, device)
    p, m, v = (torch.zeros(n, device=device) for _ in range(3))
    g, found = torch.zeros(n, device=device, dtype=dtype), [torch.ones(size, device=device, dtype=dtype)] * 250
    copy = torch.empty(n, device=device, dtype=torch.bfloat16 if dtype == torch.float32 else dtype)
    lr, step, skip = (torch.tensor(x, device=device) for x in (LR, 100.0, 0.0))
    views = [g[start : start + size] for start in starts]

    def apart() -> None:
        adamw_ema_(p, g, m, v, lr=lr, step=step, copy=copy, skip=skip, apart=found, places=places)

    def moved() -> None:
        torch._foreach_copy_(views, found)  # pyright: ignore[reportPrivateImportUsage]
        adamw_ema_(p, g, m, v, lr=lr, step=step, copy=copy, skip=skip)

    return apart if where_they_lie else moved


def _providers(
    n: int, device: torch.device, dtype: torch.dtype, copy_dtype: torch.dtype
) -> dict[str, Callable[[], Call]]:
    def fp32(value: float) -> Tensor:
        return torch.full((n,), value, device=device)

    def room(needed: int) -> None:
        if device.type != "cuda":
            return
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
        if free < needed:
            raise Unavailable(f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")

    def flat(op: Callable[..., None], temporaries: int = 0) -> Callable[[], Call]:
        """`temporaries`: of 4 bytes an element."""

        def make() -> Call:
            room(n * (16 + dtype.itemsize + copy_dtype.itemsize + 4 * temporaries))
            p, m, v, ema = (fp32(x) for x in (0.1, 0.0, 0.0, 0.1))
            g = torch.full((n,), 1e-3, device=device, dtype=dtype)
            copy = torch.empty(n, device=device, dtype=copy_dtype)
            lr, step, clip = (torch.tensor(x, device=device) for x in (LR, 100.0, 0.5))
            skip = torch.zeros((), device=device)
            return lambda: op(
                p, g, m, v, lr=lr, step=step, clip=clip, ema=ema, ema_decay=EMA_DECAY, copy=copy, skip=skip
            )

        return make

    def library(build: Callable[[Tensor], torch.optim.Optimizer]) -> Callable[[], Call]:
        def make() -> Call:
            if device.type != "cuda":
                raise Unavailable("measured on a GPU")
            room(n * (20 + copy_dtype.itemsize))
            p = fp32(0.1).requires_grad_()
            p.grad, ema = fp32(1e-3), fp32(0.1)
            copy = torch.empty(n, device=device, dtype=copy_dtype)
            optimizer = build(p)

            def call() -> None:
                optimizer.step()
                with torch.no_grad():
                    ema.lerp_(p, 1 - EMA_DECAY)
                    copy.copy_(p)

            return call

        return make

    def apex(p: Tensor) -> torch.optim.Optimizer:
        try:
            from apex.optimizers import FusedAdam
        except ImportError as error:
            raise Unavailable(f"apex: {error}") from error
        return FusedAdam([p], lr=LR, adam_w_mode=True, weight_decay=0.0, capturable=True)

    def cuda() -> Call:
        if device.type != "cuda" or not native.is_built():
            raise Unavailable(
                "bilevel_fast.ops.native._cuda is not built" if device.type == "cuda" else "measured on a GPU"
            )
        room(n * 22)
        p, m, v, ema = (fp32(x) for x in (0.1, 0.0, 0.0, 0.1))
        gradients, copies = [fp32(1e-3)], [torch.empty(n, device=device, dtype=torch.bfloat16)]
        lr, step, clip = (torch.tensor(x, device=device) for x in (LR, 100.0, 0.5))
        skip = torch.zeros((), device=device)
        trained, settings = Trained([p], [m], [v], [ema], copies), AdamW(ema_decay=EMA_DECAY)
        return lambda: native.adamw_ema(settings, trained, gradients, lr, step, clip, skip)

    return {
        "triton": flat(adamw_ema_),
        "torch": flat(adamw_ema_ref, temporaries=6),
        "torch_fused": library(lambda p: torch.optim.AdamW([p], lr=LR, weight_decay=0.0, fused=True, capturable=True)),
        "apex": library(apex),
        "cuda": cuda,
    }
