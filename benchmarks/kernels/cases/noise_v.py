"""Noising of a batch of SD 2.1 latents at 512 px, counter-based noise included."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.measure import Unavailable
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_kernels.noise_v import noise_v

SEED = 1


def _noised(x: Tensor, alpha: Tensor, sigma: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    x, alpha, sigma = x.float(), alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    return alpha * x + sigma * eps, alpha * eps - sigma * x


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    shape = (batch, 4, 64, 64)

    def case(layout: str, memory_format: torch.memory_format) -> Case:
        def tensors() -> tuple[Tensor, Tensor, Tensor]:
            x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format)
            angle = torch.rand(batch, device=device)
            return x, angle.cos(), angle.sin()

        def triton() -> Callable[[], object]:
            (x, alpha, sigma), index = tensors(), torch.arange(batch, device=device)
            return lambda: noise_v(x, alpha, sigma, SEED, index, Stream.NOISE)

        def native() -> Callable[[], object]:
            """The same numbers made on the host and copied, as the engine does without this op."""
            (x, alpha, sigma), index = tensors(), torch.arange(batch)
            return lambda: _noised(x, alpha, sigma, normal(SEED, Stream.NOISE, index, shape[1:]).to(device))

        def torch_randn() -> Callable[[], object]:
            """Other numbers, which depend on what was drawn before: what most trainers do."""
            x, alpha, sigma = tensors()
            return lambda: _noised(x, alpha, sigma, torch.randn_like(x, dtype=torch.float32))

        def compiled() -> Callable[[], object]:
            """As `torch.randn`, by inductor's generator: one kernel."""
            if device.type != "cuda":
                raise Unavailable("torch.compile is measured on a GPU only")
            x, alpha, sigma = tensors()

            @torch.compile
            def op(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
                return _noised(x, alpha, sigma, torch.randn_like(x, dtype=torch.float32))

            return lambda: op(x, alpha, sigma)

        providers = {"triton": triton, "native": native, "torch (randn)": torch_randn, "compile (randn)": compiled}
        elements = batch * 4 * 64 * 64
        moved = elements * (dtype.itemsize + 2 * 4)
        return Case("noise_v", f"4x64x64 b{batch} {layout} fwd", providers, moved, numel=elements)

    return [case("contiguous", torch.contiguous_format), case("channels_last", torch.channels_last)]
