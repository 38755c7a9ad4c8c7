"""Which provider runs each op on a device, and why: what `python -m bilevel_fast.doctor` says about `ops.providers`."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bilevel_fast.ops import providers
from bilevel_fast.ops.providers import BEFORE_SM_90, PROJECTED, SIZES, TABLE, VARIABLE, choose

IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "adamw_ema": ("native", "triton", "cuda"),
    "denoise_loss": ("triton",),
    "feature_kd": ("native", "triton"),
    "feed_forward": ("triton",),
    "geglu": ("triton",),
    "group_norm_silu": ("native", "triton"),
    "layer_norm": ("triton",),
    "linear_add": ("triton",),
    "linear_geglu": ("triton",),
    "linear_norm": ("triton",),
    "mixture": ("triton",),
    "pruned_attention": ("triton", "xformers"),
}
"""Providers of each op besides torch, which has them all. The ops are those that `choose` is asked for."""

CLASSES = (*SIZES, "large")


@dataclass(frozen=True)
class Choice:
    """What runs an op on inputs that every provider can take.

    Attributes:
        op: Its name.
        runs: Provider by size class.
        why: One line: `measured` here, `projected` from what other cards should do, or `unmeasured`; what is wanted
            elsewhere, or was wanted and cannot run.
    """

    op: str
    runs: dict[str, str]
    why: str


def choices(device: torch.device, missing: Mapping[str, str]) -> list[Choice]:
    """What runs each op, asked of `choose` itself.

    Args:
        device: Where the inputs are.
        missing: Why a provider cannot run here, by name; those that can are not in it (`dispatch.missing`).

    Raises:
        UserError: The environment names a provider that there is not.
    """
    sizes = dict(zip(CLASSES, (*(limit - 1 for limit in SIZES.values()), max(SIZES.values())), strict=True))
    found = []
    for op, having in IMPLEMENTED.items():
        able = [name for name in having if name not in missing]
        default = "triton" if op == "mixture" and device.type == "cuda" else "torch"
        runs = {size: choose(op, device, numel, *able, default=default) for size, numel in sizes.items()}
        found.append(Choice(op, runs, _why(op, providers.architecture(device), set(runs.values()), missing)))
    return found


def _why(op: str, here: str, runs: set[str], missing: Mapping[str, str]) -> str:
    asked = providers.asked_for()
    if asked is not None:
        if asked == "torch" or asked in runs:
            return f"{VARIABLE}={asked}"
        return f"{VARIABLE}={asked}, but {missing.get(asked, f'it has no {op}')}"
    row = providers.table(here).get(op, {})
    wanted = {name for ranking in row.values() for name in ([ranking] if isinstance(ranking, str) else ranking)}
    if op in TABLE.get(here, {}):
        said = "measured"
    elif row:
        said = "projected"
    elif op == "mixture" and here.startswith("sm_"):
        return "torch has no such op"
    else:
        said = "unmeasured"
    refused = [f"{name} wanted, but {missing[name]}" for name in sorted(wanted & set(missing) - runs)]
    if op == "pruned_attention" and "triton" in runs:
        refused.append("fp32 heads of more than 128 on torch: registers would spill")
    return "; ".join([said, *(refused or ([] if row and "triton" in wanted else _elsewhere(op, here)))])


def _elsewhere(op: str, here: str) -> list[str]:
    """Where triton is wanted instead."""
    if op == "mixture":
        return ["triton wanted on any GPU"]
    for name, cards in ((PROJECTED, "sm_80+"), (BEFORE_SM_90, "sm_80..89")):
        if any("triton" in ranking for ranking in TABLE.get(name, {}).get(op, {}).values()):
            return [f"triton wanted on {cards}"]
    return []
