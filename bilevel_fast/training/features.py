"""What self-attentions and whole layers inside a UNet hand on while it answers, for losses that compare them.

    self-attention  KOALA (arXiv:2312.04005): outputs of the self-attentions, each (B, T, C)
    layer           SSD-1B and Segmind-Vega (arXiv:2401.02677): outputs of ResNets and Transformers, each (B, C, H, W)

Of a student only what it has kept; the teacher's module of the same name is its counterpart. So a student that keeps
the first blocks of a Transformer is compared with the teacher's first ones, as KOALA does it.

Hooks are there while a step is recorded and gone when it is replayed: what they hand out lies where the replay writes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.layers import ResNet, Transformer
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.dispatch import Branch
from bilevel_fast.training.settings import LossWeights

Heard = Mapping[str, Tensor]
"""By the module's name."""


def is_self_attention(name: str) -> bool:
    """Whether a module is a self-attention; what else is listened to is a layer."""
    return name.endswith(".attn1")


def listened_to(student: UNet, weights: LossWeights) -> tuple[str, ...]:
    """Names of the modules that the terms of a loss compare.

    Raises:
        UserError: A term has a weight and the student has nothing that it compares.
    """
    modules = list(student.named_modules())
    found: list[str] = []
    if weights.self_attention:
        found = [name for name, _ in modules if is_self_attention(name)]
        if not found:
            raise UserError("--lower.weights.self-attention: this student has no self-attention left; wanted 0")
    if weights.layer:
        found += [name for name, module in modules if isinstance(module, ResNet | Transformer)]
    return tuple(found)


@contextmanager
def listening(unet: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within, what the named modules hand on is kept, by name."""
    heard: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, out: Tensor | Branch) -> None:
            heard[name] = out.whole() if isinstance(out, Branch) else out

        return hook

    handles = [unet.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
