"""SD 2.1's attention at 512 px: over its own tokens, and over 77 text tokens; heads of 64, and those of SD 1.x.

And SDXL's at 1024 px (`xl`): as many tokens at twice the heads.

`triton` works on dense projections with kept lists; all others on the projections of the physically pruned model.
`torch` is what the trainer runs: SDPA, which chooses its backend.
"""

import random
from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.cases import Case, Provider, compiled
from benchmarks.measure import Unavailable
from bilevel_kernels.kept import Kept
from bilevel_kernels.pruned_attention import pruned_attention, pruned_attention_bytes, pruned_attention_flops

LEVELS = ((5, 4096), (10, 1024), (20, 256), (20, 64))  # heads, tokens
HEAD_DIM, TEXT = 64, 77
XL = (("self", 10, 4096), ("self", 20, 1024), ("cross", 10, 4096))
OLDER = ((40, 4096), (80, 1024), (160, 256))  # SD 1.x: eight heads of so many channels, and tokens
BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    found = [
        _case(batch, tokens, keys, heads, ratio, backward, device, dtype, f"{name} {heads}x{tokens} b{batch} {label}")
        for heads, tokens in LEVELS
        for name, keys in (("self", tokens), ("cross", TEXT))
        for label, ratio in (("dense", 1.0), ("0.80", 0.80), ("0.55", 0.55))
        for backward in (False, True)
    ]
    found += [
        _case(
            *(batch, tokens, TEXT if name == "cross" else tokens, heads, 1.0, backward, device, dtype),
            f"{name} {heads}x{tokens} b{batch} xl",
        )
        for name, heads, tokens in XL
        for backward in (False, True)
    ]
    return found + [
        _case(batch, tokens, tokens, 8, 1.0, backward, device, dtype, f"self 8x{tokens} of {D} b{batch} dense", D)
        for D, tokens in OLDER
        for backward in (False, True)
    ]


def _case(
    batch: int,
    tokens: int,
    keys: int,
    heads: int,
    ratio: float,
    backward: bool,
    device: torch.device,
    dtype: torch.dtype,
    name: str,
    head_dim: int = HEAD_DIM,
) -> Case:
    count = max(1, int(ratio * heads))
    kept = Kept.same(heads, sorted(random.Random(0).sample(range(heads), count))) if ratio < 1 else None
    width = batch * count * head_dim
    return Case(
        "pruned_attention",
        f"{name} {'bwd' if backward else 'fwd'}",
        _providers(batch, tokens, keys, heads, count, kept, device, dtype, backward, head_dim),
        bytes=pruned_attention_bytes(tokens, keys, width, dtype.itemsize, backward),
        flops=pruned_attention_flops(tokens, keys, width, backward),
        numel=batch * tokens * heads * head_dim,
    )


def _providers(
    batch: int,
    tokens: int,
    keys: int,
    heads: int,
    count: int,
    kept: Kept | None,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
    head_dim: int,
) -> dict[str, Provider]:
    def provider(attend: Attend, width: int) -> Provider:
        def make() -> Callable[[], object]:
            new = torch.empty if device.type == "cpu" else torch.randn
            q, k, v = (new(batch, n, width * head_dim, device=device, dtype=dtype) for n in (tokens, keys, keys))
            if not backward:
                with torch.no_grad():
                    attend(q, k, v)
                return lambda: torch.no_grad()(attend)(q, k, v)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = attend(*leaves)
            dout = torch.ones_like(out)
            return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

        return make

    def sliced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(q, k, v, count)

    def xformers() -> Callable[[], object]:
        try:
            attend = import_module("xformers.ops").memory_efficient_attention
        except (ImportError, OSError) as error:
            raise Unavailable(f"xformers: {error}") from error

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(-1, (count, head_dim)) for x in (q, k, v))
            try:
                return attend(q, k, v).flatten(-2)
            except NotImplementedError as error:
                raise Unavailable(f"xformers: {str(error).splitlines()[0]}") from error

        return provider(call, count)()

    def sdpa(backend: SDPBackend) -> Provider:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            try:
                with sdpa_kernel(backend):
                    return _sdpa(q, k, v, count)
            except RuntimeError as error:
                raise Unavailable(str(error).splitlines()[0]) from error

        return provider(call, count)

    return {
        "triton": provider(lambda q, k, v: pruned_attention(q, k, v, heads, kept=kept), heads),
        "torch": provider(sliced, count),
        **{name: sdpa(backend) for name, backend in BACKENDS.items()},
        "xformers": xformers,
        "compile": compiled(lambda: provider(torch.compile(sliced), count)(), device),
    }


def _sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
