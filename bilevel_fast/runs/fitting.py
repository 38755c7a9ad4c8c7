"""Whether a run fits on its card: by the memory model, how many images of a batch are computed at once."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing import registry as erasers
from bilevel_fast.models.structure import Structure
from bilevel_fast.profiling.memory import Memory, describe, estimate, largest_micro_batch, standing
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.training.settings import MicroBatch

_GIB = 2**30


@dataclass(frozen=True)
class Fitting:
    """A student and a batch's shapes, as the memory model asks for them.

    Attributes:
        config: The settings of the run.
        structure: Of the student.
        latent: Height and width of the latents.
        text: Text tokens.
        dtype: What the networks compute in.
        graphs: Whether steps are recorded as CUDA graphs.
        ranks: Processes that share the leaves of a batch.
    """

    config: TrainConfig
    structure: Structure
    latent: int
    text: int
    dtype: torch.dtype
    graphs: bool = False
    ranks: int = 1

    def wanted(self, batch: int, micro: int | None = None) -> Memory:
        """What a training takes of one rank whose leaves, of both levels, are of so many images."""
        shared = {"ranks": self.ranks, "leaves": self.config.scale.leaves}
        return estimate(self.structure, self.latent, self.text, batch, micro=micro, **shared, **self._how)

    def standing(self) -> int:
        """Bytes of `wanted` on one rank that no batch changes, without counting a step."""
        return standing(self.structure, self.latent, self.text, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        config = self.config
        return {
            "precision": "bf16" if self.dtype == torch.bfloat16 else "fp32",
            "recompute": config.recompute,
            "ema": config.ema is not None,
            "weights": config.lower.weights,
            "in_parts": config.scale.in_parts,
            **erasers.holds(config.upper, self.graphs),
        }

    def micro_batches(self, card: int | None) -> tuple[int, int]:
        """Images of the lower and of the upper level that are computed at once, a leaf of a batch at most.

        Args:
            card: Bytes that the run may take; None where nobody knows, which leaves `auto` at whole batches.

        Raises:
            UserError: Not even micro-batches of one image fit, or what suppresses wants whole batches.
        """
        lower, upper = self.config.lower, self.config.upper
        leaves = self.config.scale.leaves
        sizes = (self._size("lower", lower.batch // leaves, lower.micro_batch, card), upper.batch // leaves)
        why = erasers.whole(upper)
        if why and upper.micro_batch not in ("auto", sizes[1]):
            raise UserError(f"--upper.micro-batch is {upper.micro_batch}: wanted {sizes[1]} or auto, as {why}")
        if why or not self._descends:
            return sizes
        return sizes[0], self._size("upper", sizes[1], upper.micro_batch, card)

    @property
    def _descends(self) -> bool:
        """Whether upper steps compute a loss of images; edits of weights do not."""
        return erasers.holds(self.config.upper, self.graphs)["upper"]

    def _size(self, level: str, batch: int, given: MicroBatch, card: int | None) -> int:
        if given != "auto":
            return given
        if card is None:
            return batch
        size = largest_micro_batch(self.wanted(batch), card)
        if size:
            return size
        least = self.wanted(batch, 1).total
        takes, short, free = (f"{size / _GIB:.1f} GiB" for size in (least, least - card, card))
        raise UserError(
            f"--{level}.batch {batch} does not fit even as micro-batches of 1: that takes about {takes}, {short} more "
            f"than the {free} that the card has free{self._advice(batch, card)}"
        )

    def _advice(self, batch: int, card: int) -> str:
        if self.config.recompute:
            return ""
        least = replace(self, config=replace(self.config, recompute=True)).wanted(batch, 1).total
        fits = "which fits" if least <= card else "which does not fit either"
        return f"; --recompute takes {least / _GIB:.1f}, {fits}"

    def out_of_memory(self, device: torch.device) -> UserError:
        """What the memory model says about a run that did not fit, and about what would."""
        lower, upper = self.config.lower, self.config.upper
        level = upper if self._descends and upper.batch > lower.batch else lower
        micro = None if level.micro_batch == "auto" else level.micro_batch
        card = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        text = describe(self.wanted(level.batch // self.config.scale.leaves, micro), card)
        return UserError(f"{device} is out of memory; what was saved is whole", text)


def free_bytes(device: torch.device, *counted: nn.Module) -> int | None:
    """What the memory model may hand out on a GPU; None elsewhere.

    That is what nothing holds, and what `counted` holds there: models that it counts itself. The text encoder is none.
    """
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    held = sum(p.nbytes for module in counted for p in module.parameters() if p.device.type == device.type)
    return torch.cuda.mem_get_info(device)[0] + unused + held
