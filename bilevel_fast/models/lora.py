"""LoRAs of a dense UNet, for the student that was cut from it.

A LoRA adds B A to a weight W of (outputs, inputs). A student's W keeps some rows and some columns, so the same rows of
B and columns of A belong to it: cut so, the student with the LoRA is what is cut from the dense model with the LoRA.
Modules that were dropped take theirs with them.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.structure import Structure, channel_index

_AXES = {"lora_A": 1, "lora_B": 0}
"""The axis of the weight that lies along the same axis of this factor."""


def for_structure(
    structure: Structure, lora: Mapping[str, Tensor], alphas: Mapping[str, Any] | None, prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a LoRA as the student takes them, in peft's names, and its alphas.

    Args:
        structure: Of the student; a dense one changes nothing.
        lora: By name, `PREFIX.MODULE.lora_A.weight` in peft's names or those of diffusers before it. What has another
            prefix is handed on.
        alphas: By `PREFIX.MODULE.alpha`.
        prefix: `unet`.

    Raises:
        UserError: A tensor fits neither the dense UNet nor the student.
    """
    if structure.is_dense:
        return dict(lora), None if alphas is None else dict(alphas)
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    ours = {name.removeprefix(f"{prefix}."): tensor for name, tensor in lora.items() if name.startswith(f"{prefix}.")}
    if not any(".lora_A" in name for name in ours):
        ours = convert_unet_state_dict_to_peft(ours)
    found = {name: tensor for name, tensor in lora.items() if not name.startswith(f"{prefix}.")}
    cuts = structure.cuts()
    for name, tensor in ours.items():
        if structure.drops(name):
            continue
        module, _, factor = name.rpartition(".lora_")
        factor = f"lora_{factor.partition('.')[0]}"
        for cut, width, units in cuts.get(f"{module}.weight", ()):
            if cut.axis != _AXES.get(factor):
                if factor not in _AXES:
                    raise UserError(f"LoRA: {name} is not supported on a pruned UNet; wanted lora_A and lora_B")
                continue
            size, each = tensor.shape[cut.axis], width.unit_size * cut.copies
            if size == width.units * each:
                index = channel_index(units, width, cut.copies).to(tensor.device)
                tensor = tensor.index_select(cut.axis, index).contiguous()
            elif size != len(units) * each:
                raise UserError(
                    f"LoRA: {name} has size {size} on axis {cut.axis}, wanted {width.units * each} as of the dense "
                    f"UNet, or {len(units) * each} as of this one"
                )
        found[f"{prefix}.{name}"] = tensor
    if alphas is not None:
        alphas = {name: value for name, value in alphas.items() if not structure.drops(name.removeprefix(f"{prefix}."))}
    return found, None if alphas is None else dict(alphas)
