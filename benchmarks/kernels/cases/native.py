"""Native CPU code (csrc/) at the sizes of the mini UNet, against torch."""

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider
from benchmarks.measure import Unavailable
from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.native import AdamW, GroupNorm, Trained, feature_kd
from bilevel_kernels.adamw_ema import adamw_ema_bytes
from bilevel_kernels.feature_kd import feature_kd_bytes
from bilevel_kernels.group_norm_silu import group_norm_silu_bytes

BLOCKS = ((48, 8), (96, 4), (96, 4), (96, 4), (96, 8), (96, 16), (48, 16))  # channels, side: what the blocks put out
NORMS = ((48, 16), (96, 8), (96, 4), (192, 16))
GROUPS = 16
LR = 1e-6


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    def provider(make: Provider) -> Provider:
        def checked() -> Callable[[], object]:
            if device.type != "cpu" or dtype != torch.float32:
                raise Unavailable("native code is for fp32 on the CPU")
            return make()

        return checked

    def case(op: str, name: str, native: Provider, torch_: Provider, moved: int, numel: int) -> Case:
        return Case(op, name, {"native": provider(native), "torch": provider(torch_)}, moved, numel=numel)

    blocks = [(batch, channels, side, side) for channels, side in BLOCKS]
    sizes = [p.numel() for p in UNet(MINI).parameters()]
    meta = [torch.empty(block, device="meta") for block in blocks]
    distilled = feature_kd_bytes(meta, meta, True), sum(map(prod, blocks))
    total = sum(sizes)
    updated = adamw_ema_bytes(total, torch.float32, ema=False, copy=None), total
    rows = [
        case("feature_kd", f"7 blocks b{batch} fwd+bwd", *_feature_kd(blocks), *distilled),
        case("adamw_ema", f"{len(sizes)} tensors step", *_adamw([()]), *updated),
        case("adamw_ema", "1 flat tensor step", *_adamw([(total,)]), *updated),
    ]
    for channels, side in NORMS:
        shape = (batch, channels, side, side)
        for backward in (False, True):
            name = f"{channels}x{side}x{side} b{batch} {'bwd' if backward else 'fwd'}"
            moved = group_norm_silu_bytes(prod(shape), 4, backward)
            rows.append(case("group_norm_silu", name, *_group_norm_silu(shape, backward), moved, prod(shape)))
    return rows


def _feature_kd(shapes: list[tuple[int, ...]]) -> tuple[Provider, Provider]:
    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        student, teacher = ([torch.randn(s).to(memory_format=torch.channels_last) for s in shapes] for _ in range(2))
        return student, teacher

    def native() -> Callable[[], object]:
        student, teacher = inputs()
        return lambda: feature_kd(student, teacher, 0.1)

    def eager() -> Callable[[], object]:
        student, teacher = inputs()
        for s in student:
            s.requires_grad_()

        def call() -> object:
            losses = torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)])
            return torch.autograd.grad(0.1 * losses.mean(), student)

        return call

    return native, eager


def _adamw(shapes: list[tuple[int, ...]]) -> tuple[Provider, Provider]:
    """Of the mini UNet's own parameters where the shapes are [()]."""

    def inputs() -> list[Tensor]:
        if shapes == [()]:
            parameters = list(UNet(MINI).parameters())
        else:
            parameters = [torch.randn(s).requires_grad_() for s in shapes]
        for p in parameters:
            p.grad = 0.1 * torch.randn_like(p)
        return parameters

    def native() -> Callable[[], object]:
        parameters = inputs()
        moments = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        trained, settings = Trained(parameters, *moments), AdamW()
        return lambda: settings.step(trained, [p.grad for p in parameters if p.grad is not None], LR, 1)

    def eager() -> Callable[[], object]:
        return torch.optim.AdamW(inputs(), lr=LR, weight_decay=0.0, fused=True).step

    return native, eager


def _group_norm_silu(shape: tuple[int, int, int, int], backward: bool) -> tuple[Provider, Provider]:
    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, dout = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(2))
        return x, dout, torch.randn(shape[1]), torch.randn(shape[1])

    def native() -> Callable[[], object]:
        x, dout, weight, bias = inputs()
        norm = GroupNorm(GROUPS, 1e-5, padding=0, silu=True)
        if not backward:
            return lambda: norm.forward(x, weight, bias)
        _, mean, rstd = norm.forward(x, weight, bias)
        return lambda: norm.backward(dout, x, mean, rstd, weight, bias)

    def eager() -> Callable[[], object]:
        x, dout, weight, bias = inputs()
        if not backward:
            return lambda: F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-5))
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        out = F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-5))
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return native, eager
