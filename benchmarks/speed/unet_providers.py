"""The ways to run a UNet that `benchmarks.speed.unet` compares, and whether they compute the same.

A provider takes a UNet and its inputs and returns the call to be timed, which returns the output (B, C, H, W). It
raises Unavailable where it cannot run.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Unavailable, recorded
from benchmarks.speed.diffusers_unet import diffusers_unet
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.providers import ops

Inputs = tuple[Tensor, Tensor, Tensor]  # x (B, C, H, W), t (B,), text (B, L, D)


def plain(unet: Callable[..., Any], inputs: Inputs, provider: str | None) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad(), ops(provider):
            return unet(*inputs).out

    return call


def eager(unet: UNet, inputs: Inputs) -> Callable[[], Tensor]:
    theirs = diffusers_unet(unet.structure, unet.state_dict(), memory_format=torch.channels_last).eval()

    def call() -> Tensor:
        with torch.no_grad():
            return theirs(*inputs).sample

    return call


def compiled(unet: UNet, inputs: Inputs) -> Callable[[], Tensor]:
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # every UNet is another version of the same `forward`
    return plain(torch.compile(unet, fullgraph=True, dynamic=False), inputs, "torch")


def graph(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need CUDA")
    replay, done = recorded(lambda: call, device)
    if not done:
        raise Unavailable("could not be captured in a CUDA graph")
    return replay


def ours(unet: UNet, inputs: Inputs) -> Callable[[], Tensor]:
    call = plain(unet, inputs, None)
    return graph(call, inputs[0].device) if inputs[0].is_cuda else call


PROVIDERS: dict[str, Callable[[UNet, Inputs], Callable[[], Tensor]]] = {
    "eager": eager,
    "torch": lambda unet, inputs: plain(unet, inputs, "torch"),
    "compile": compiled,
    "graphs": lambda unet, inputs: graph(plain(unet, inputs, "torch"), inputs[0].device),
    "ours": ours,
}


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|; infinite unless every entry of `a` is finite and the shapes agree."""
    if a.shape != b.shape or not a.isfinite().all():
        return float("inf")
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


def bound(unet: UNet, inputs: Inputs) -> float:
    """How far from torch's output another provider's may be.

    Twice as far as rounding to this dtype takes torch itself: the distance of its output for the first image from that
    in the next wider dtype, fp32 or fp64. Two that round independently are 1.4 times that apart. At least 1e-5.
    """
    x, t, text = (tensor[:1] for tensor in inputs)
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    exact = plain(copy.deepcopy(unet).to(wide), (x.to(wide), t, text.to(wide)), "torch")()
    return max(1e-5, 2 * distance(plain(unet, (x, t, text), "torch")(), exact))
