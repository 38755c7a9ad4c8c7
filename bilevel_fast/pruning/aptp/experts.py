"""From codes to experts: our own, and those that APTP's authors publish (arXiv:2406.12042).

    arch_vector.pt              (1, V) or (V,)   the gates of one expert           torch.save of a tensor
    quantizer_embeddings.pt     (K, V)           the soft gates of all experts     torch.save of a tensor
    unet/diffusion_pytorch_model.safetensors     one expert's weights, fine-tuned, under diffusers' names

Of published gates, one >= 0.5 stays; `planned` cuts those of a training to its budget. Pickles are read as plain
tensors or not at all; nothing in them runs.

Legend: K codes, V entries of the architecture vector (1620 for SD 2.1).
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.pickles import Damaged, load_plain
from bilevel_fast.models.architecture import SD21, UNetConfig
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.vector import from_vector, layout
from bilevel_fast.pruning.aptp.binarise import TEMPERATURE
from bilevel_fast.pruning.budget import MacBudget
from bilevel_fast.pruning.planner import DROP, spend

VECTOR = "arch_vector.pt"
_EPS = 1e-6  # gates of 0 and 1 have finite odds
_ONE_UNIT = 1e-9  # as `min_keep`: how little stays of a width vector is up to the gates


def experts(config: UNetConfig, gates: Tensor) -> tuple[Structure, ...]:
    """The structures of codes (K, V), soft or hard.

    Raises:
        UserError: Their length is another, or a width vector of a code keeps nothing; code and site are named.
    """
    found: list[Structure] = []
    for number, row in enumerate(gates):
        try:
            found.append(from_vector(config, row))
        except UserError as error:
            raise UserError(f"expert {number}: {error}") from error
    return tuple(found)


def planned(config: UNetConfig, gates: Tensor, budget: MacBudget) -> tuple[Structure, ...]:
    """The structures of codes (K, V), each at the budget to the last unit; `min_keep` is not looked at.

    A unit is worth its MACs times odds^tau of its gate, tau the temperature of `binarise`: e^(z + b) of its logit. Per
    MAC that is what the gates say, so the plan that keeps the most (`planner.spend`, by sums) moves the threshold from
    one half to where the budget is met. A unit is not worth more per MAC than its site is by its depth gate.

    Raises:
        UserError: The length is another, or the budget is out of reach.
    """
    plan, prices = layout(config), budget.prices(config)
    worth = gates.detach().double().cpu().clamp(_EPS, 1.0 - _EPS).logit().mul(TEMPERATURE).exp()
    widths, depths = plan.split(worth)
    found: list[Structure] = []
    for row in range(len(gates)):
        depth = {site.name: depths[row, i] for i, site in enumerate(plan.depths)}
        importance: dict[str, dict[str, Tensor]] = {}
        for segment, values in zip(plan.segments, widths, strict=True):
            name, price = segment.site.name, float(prices.sites[segment.site.name].widths[segment.width.name][1])
            values = values[row] if name not in depth else values[row].minimum(depth[name])
            importance.setdefault(name, {})[segment.width.name] = price * values
        for name, value in depth.items():
            units = sum(values.sum() for values in importance[name].values())
            importance[name][DROP] = -(prices.sites[name].fixed * value + units)
        found.append(spend(config, budget, importance, droppable=depth, min_keep=_ONE_UNIT, objective="sum"))
    return tuple(found)


def read_vector(path: Path, config: UNetConfig) -> Structure:
    """The structure in an `arch_vector.pt`.

    Args:
        path: The file.
        config: The dense UNet that the expert was cut from.

    Raises:
        UserError: The file is missing, unreadable, holds code or something else than one vector of this UNet's length,
            or a width vector, such as the heads of an attention, keeps nothing.
    """
    gates = _read_gates(path, config)
    if len(gates) != 1:
        raise UserError(f"{path} has {len(gates)} architecture vectors, wanted one; read it as a codebook")
    try:
        return from_vector(config, gates[0])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_codebook(path: Path, config: UNetConfig) -> tuple[Structure, ...]:
    """The structures of all experts in a file of soft codes (K, V).

    Raises:
        UserError: As `read_vector`; the expert is named.
    """
    gates = _read_gates(path, config)
    try:
        return experts(config, gates)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def find_vector(folder: Path) -> Path:
    """The `arch_vector.pt` of a published expert, beside `unet/` or in it.

    Raises:
        UserError: There is none.
    """
    places = [folder / VECTOR, folder / "unet" / VECTOR]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise UserError(f"{places[0]} is missing, and so is {places[1]}")
    return path


def _read_gates(path: Path, config: UNetConfig) -> Tensor:
    """(K, V) fp32, finite, in [0, 1]."""
    gates = _load_tensor(path).detach()
    gates = gates[None] if gates.ndim == 1 else gates
    if gates.ndim != 2 or not len(gates) or gates.is_complex():
        raise UserError(f"{path} has a {gates.dtype} tensor of shape {list(gates.shape)}, wanted rows of gates")
    wanted, came = layout(config).size, gates.shape[1]
    if came != wanted:
        whose = " (those of SD 2.1)" if came == layout(SD21).size else ""
        raise UserError(f"{path} has vectors of {came} entries{whose}, this UNet wants {wanted}: another base model")
    gates = gates.to("cpu", torch.float32)
    if not gates.isfinite().all():
        raise UserError(f"{path} has {int((~gates.isfinite()).sum())} entries that are not finite")
    low, high = gates.min().item(), gates.max().item()
    if low < 0.0 or high > 1.0:
        raise UserError(f"{path} has entries from {low:.3g} to {high:.3g}, wanted gates in 0..1: are they logits?")
    return gates


def _load_tensor(path: Path) -> Tensor:
    try:
        value: Any = load_plain(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, wanted a file that torch.save wrote") from error
    except (pickle.UnpicklingError, Damaged) as error:
        if code := _code_in(path):
            raise UserError(f"{path} is refused: it holds code ({', '.join(code)}), wanted one tensor") from error
        raise UserError(f"{path} cannot be read as one tensor that torch.save wrote; nothing in it was run") from error
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        raise UserError(f"{path} holds {type(value).__name__}, wanted one dense tensor")
    return value


def _code_in(path: Path) -> Sequence[str]:
    """Names that unpickling would import beyond what tensors need; nothing is imported or run to find out."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file makes it raise anything
        return ()
