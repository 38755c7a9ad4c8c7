"""fp8 linear layers for the frozen teacher, on sm_89 and sm_90; off unless asked for.

    fp8 = to_fp8(unet)
    kd_error(unet, fp8, x, t, text)     what it does to the targets of distillation: look before you train

The linear layers of the Transformers compute in e4m3 (arXiv:2209.05433), weights scaled per output channel, activations
per row and anew in every call; products are summed in fp32. Convolutions, norms, attention itself and everything that
the timestep goes through stay as they are. It is the teacher alone that may be coarse: no gradient goes through it. But
its answers are the student's targets: the mini world's teacher is off by 4 to 5 %, five times what bf16 costs.

    y[m, n] = scale_x[m] scale_w[n] sum_k q_x[m, k] q_w[n, k] + bias[n],    scale = max |row| / 448,  q = row / scale

It is no gain yet: `quantise` runs as kernels of torch that move `QUANTISE_BYTES` an element where one would move 3,
and q, k and v quantise the same rows each. docs/performance.md says why the flag is there all the same.

Not measured: its speed, and `torch._scaled_mm` itself; nothing of this has run on a GPU. `emulate` multiplies the same
rounded numbers in fp32, anywhere: what tests look at, and what the error of a teacher can be judged by without a card.

Shape legend: B batch, T tokens, M = B T rows, K inputs, N outputs of a layer.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel_kernels as triton_ops
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.layers import GEGLU, Transformer
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.providers import choose

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448; what is rounded above it becomes NaN, not 448
SMALLEST_SCALE = 1e-12  # of a row of zeros, which has no scale of its own
ALIGNMENT = 16  # of K and N, as the hardware wants them
CARDS = ((8, 9), (9, 0))
QUANTISE_BYTES = 39  # an element of bf16: to fp32, abs, maximum of a row, quotient, clamp, to e4m3


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (M, K), any float dtype, as e4m3 (M, K) and their scales (M, 1) fp32: rows = scale * quantised, nearly.

    A row that is not finite stays so: its scale is not.
    """
    rows = rows.float()
    scale = (rows.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    return (rows / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


class Fp8Linear(nn.Module):
    """A frozen nn.Linear in e4m3.

    Its weight is called `quantised`, so that code which would read `weight` past it fails.

    Args:
        linear: Its K and N are multiples of 16.
        emulate: Compute in fp32 what the card would compute.
    """

    quantised: Tensor  # (N, K) e4m3
    scale: Tensor  # (1, N) fp32
    bias: Tensor | None  # (N,)

    def __init__(self, linear: nn.Linear, emulate: bool = False):
        super().__init__()
        quantised, scale = quantise(linear.weight.detach())
        self.in_features, self.out_features, self.emulate = linear.in_features, linear.out_features, emulate
        self.register_buffer("quantised", quantised)
        self.register_buffer("scale", scale.t().contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), in the dtype of x; bf16 unless emulated."""
        return self._product(x, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """`forward` for those that add the bias themselves."""
        return self._product(x, None)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        assert (self.quantised.dtype, self.scale.dtype) == (E4M3, torch.float32), "cast a UNet before to_fp8"
        rows, scale = quantise(x.reshape(-1, self.in_features))
        if self.emulate:
            out = scale * (rows.float() @ self.quantised.float().t()) * self.scale
            out = (out if bias is None else out + bias.float()).to(x.dtype)
        else:
            scales: dict[str, Any] = {"scale_a": scale, "scale_b": self.scale}
            product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
            out = product(rows, self.quantised.t(), bias=bias, out_dtype=x.dtype, **scales)
        return out.reshape(*x.shape[:-1], self.out_features)


class Fp8GEGLU(nn.Module):
    """`layers.GEGLU` over an Fp8Linear. `ops.geglu` reads the weight of an nn.Linear, so this stands in its place."""

    def __init__(self, proj: Fp8Linear):
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, K) -> (B, T, N / 2)."""
        able = ["triton"] * (self.proj.bias is not None and (x.is_cuda or triton_ops.INTERPRETED))
        numel = x.numel() // self.proj.in_features * self.proj.out_features
        if choose("geglu", x.device, numel, *able) == "triton":
            assert self.proj.bias is not None
            return triton_ops.geglu(self.proj.without_bias(x), self.proj.bias)
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


def to_fp8(unet: UNet, emulate: bool = False) -> UNet:
    """A copy of a frozen UNet with the linear layers of its Transformers in e4m3; all other weights are shared with it.

    Layers whose inputs or outputs are no multiple of 16 stay as they are, and so do the 1x1 convolutions that are the
    projections of SD 1.x.

    Args:
        unet: In bf16 on an sm_89 or sm_90 card, unless `emulate` is set.
        emulate: Compute in fp32 what the card would compute: slow, on any device and in any dtype.

    Raises:
        UserError: A parameter needs a gradient, or the UNet is not where and what it must be.
    """
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            raise UserError(f"fp8: {name} needs a gradient; wanted a frozen UNet, call requires_grad_(False) first")
    if not emulate:
        _check_card(unet.conv_in.weight)
    shared = [unet.config, unet.structure, *unet.parameters(), *unet.buffers()]
    fp8 = copy.deepcopy(unet, {id(it): it for it in shared})
    for transformer in [m for m in fp8.modules() if isinstance(m, Transformer)]:
        for path, module in list(transformer.named_modules()):
            parent, _, name = path.rpartition(".")
            if isinstance(module, GEGLU) and _fits(module.proj):
                setattr(transformer.get_submodule(parent), name, Fp8GEGLU(Fp8Linear(module.proj, emulate)))
            elif isinstance(module, nn.Linear) and _fits(module):
                owner = transformer.get_submodule(parent)
                if not isinstance(owner, GEGLU | Fp8GEGLU):
                    setattr(owner, name, Fp8Linear(module, emulate))
    return fp8


def _fits(linear: nn.Linear) -> bool:
    return linear.in_features % ALIGNMENT == 0 and linear.out_features % ALIGNMENT == 0


def _check_card(weight: Tensor) -> None:
    wanted = " or ".join(f"sm_{major}{minor}" for major, minor in CARDS)
    if weight.device.type != "cuda":
        raise UserError(f"fp8: the teacher is on {weight.device}; wanted a GPU of {wanted}")
    major, minor = torch.cuda.get_device_capability(weight.device)
    if (major, minor) not in CARDS:
        card = torch.cuda.get_device_name(weight.device)
        raise UserError(f"fp8: the card is {card}, sm_{major}{minor}; wanted {wanted}")
    if weight.dtype != torch.bfloat16:
        raise UserError(f"fp8: the teacher is in {weight.dtype}; wanted torch.bfloat16")


@torch.no_grad()
def kd_error(unet: UNet, fp8_unet: UNet, x: Tensor, t: Tensor, text: Tensor) -> dict[str, float]:
    """What fp8 does to the teacher's answers, for the log. Waits for the device once.

    Args:
        unet, fp8_unet: Before and after `to_fp8`.
        x, t, text: As `UNet.forward` takes them.

    Returns:
        For `output` and every block, named as in `unet.config.blocks`: `NAME/relative`, ||fp8 - exact|| / ||exact||,
        and the same as a signal to quantisation noise ratio, `NAME/sqnr_db`.
    """
    exact, rough = unet(x, t, text), fp8_unet(x, t, text)
    names = ("output", *unet.config.blocks)
    pairs = zip((exact.out, *exact.blocks), (rough.out, *rough.blocks), strict=True)
    errors = torch.stack([(b.float() - a.float()).norm() / a.float().norm() for a, b in pairs]).tolist()
    found = {}
    for name, error in zip(names, errors, strict=True):
        found[f"{name}/relative"] = error
        found[f"{name}/sqnr_db"] = -20 * math.log10(error) if error else math.inf
    return found
