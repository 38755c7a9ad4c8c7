"""Which parameters of a UNet, dense or pruned, an eraser may change.

    esd-x     everything of the cross-attentions (ESD, arXiv:2303.07345: for styles)
    esd-u     every other linear layer and convolution, time embedding and first and last convolution included
    selfattn  everything of the self-attentions
    full      every parameter, those of the norms included

The first three are made of linear layers and convolutions only, as in ESD: norms stay as they are.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.models.unet import UNet

PRESETS: dict[str, Callable[[str], bool]] = {
    "esd-x": lambda module: ".attn2." in module,
    "esd-u": lambda module: ".attn2." not in module,
    "selfattn": lambda module: ".attn1." in module,
}
"""Of the name of a linear layer or convolution, whether it belongs to the subset."""
NAMES = (*PRESETS, "full")


def modules(unet: UNet, name: str) -> tuple[str, ...]:
    """Names of the linear layers and convolutions of a preset that has such a rule."""
    wanted = PRESETS[name]
    return tuple(n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and wanted(n))


def subset(unet: UNet, which: str) -> frozenset[str]:
    """Names of parameters.

    Args:
        unet: Its dropped sites have no parameters, and none here.
        which: One or more presets or patterns of parameter names, separated by commas; `*` in a pattern stands for any
            characters: `esd-x`, `*.attn2.to_k.*,*.attn2.to_v.*`.

    Raises:
        UserError: A pattern or preset has no parameter in this UNet.
    """
    everything = [name for name, _ in unet.named_parameters()]
    found: set[str] = set()
    for part in (part.strip() for part in which.split(",")):
        if part == "full":
            names = everything
        elif part in PRESETS:
            owners = set(modules(unet, part))
            names = [name for name in everything if name.rpartition(".")[0] in owners]
        else:
            names = [name for name in everything if fnmatchcase(name, part)]
        if not names:
            hint = "; its sites were dropped" if part in NAMES else nearest(part, NAMES)
            raise UserError(f"parameter subset {part!r} holds nothing of this UNet{hint}")
        found.update(names)
    return frozenset(found)
