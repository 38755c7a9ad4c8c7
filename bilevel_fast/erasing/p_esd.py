"""P-ESD (arXiv:2405.16534): which weights to zero is learnt under ESD's loss; no weight changes its value.

    min_m  E |v_(theta m)(x_t, c) - y|^2,   y = v_theta(x_t, a) - eta (v_theta(x_t, c) - v_theta(x_t, a)),   m in {0, 1}

with concept prompt c, anchor prompt a and x_t half painted by the masked model, as `erasing.esd` does it. m = 1(s >= 0)
by element; the gradient goes through to the scores s as if m were s, dL/ds = theta dL/d(theta m), and Adam moves them
from 1. Of the weights whose scores end below 0 at most a share `ratio` goes, the lowest ones. Masked are the linear
layers of the cross-attentions, ESD's parameters for styles. Rates, the bound and the number of updates are ours: the
paper's text was not at hand in full, only that it learns a mask over single parameters with ESD's loss.

The frozen model is the same one without masks, so no copy of it is made; in the loop masks are put on again at every
upper step, as ConceptPrune's are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.limits import LATENTS
from bilevel_fast.data.batch import Batch
from bilevel_fast.erasing.concept_prune import FIRST
from bilevel_fast.erasing.edit import Job, Outcome, Record, transformers
from bilevel_fast.erasing.esd import Esd
from bilevel_fast.erasing.pairs import Pair
from bilevel_fast.erasing.references import Itself
from bilevel_fast.erasing.subsets import modules
from bilevel_fast.erasing.uce import texts
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.training.lower import Answers


@dataclass(frozen=True)
class Learning:
    """How masks are learnt; the same for the command and for the loop."""

    ratio: float = 0.05
    """Share of the cross-attentions' weights that may go, at most."""
    updates: int = 100
    """Of the masks, by Adam."""
    lr: float = 0.05
    """Learning rate of the masks' scores, which begin at 1 and zero a weight below 0."""
    eta: float = 1.0
    """How far the target lies beyond the guide, away from the text to erase."""
    steps: int = 50
    """DDIM steps of a whole sample, at least 3; 1 to steps - 2 of them are painted."""
    guidance: float = 3.0
    """Classifier-free guidance of the half painted samples."""
    batch: int = 4
    """Samples for each update."""


@dataclass(frozen=True)
class PEsd(Learning):
    """Zero the weights of cross-attentions that a mask learns to do without for the concept."""

    size: int | None = None
    """Height and width of the latents. Default: what the model was made for."""
    seed: int = 0
    """Of the samples."""

    def __post_init__(self) -> None:
        check(self, "--")
        if self.size is not None and self.size < 1:
            raise UserError(f"--size is {self.size}; wanted 1 or more")

    def edit(self, unet: UNet, job: Job) -> Outcome:
        """Change the weights of a UNet in place.

        Raises:
            UserError: The UNet has no cross-attention left, or the latents have a size that it cannot halve.
        """
        _, skipped = transformers(unet.structure)
        folder = job.folder
        size = folder.config.sample_size if self.size is None else self.size
        stride = 2 ** (len(folder.config.block_out_channels) - 1)
        if size % stride or size > LATENTS:
            raise UserError(f"--size is {size}; wanted a multiple of the UNet's stride {stride}, {LATENTS} at most")
        pairs = texts(job.pairs, job)
        learning = Learning(**{field.name: getattr(self, field.name) for field in fields(Learning)})
        masks, losses = learn(
            unet, folder.schedule, folder.text_encoder, pairs, learning, self.seed, size, job.progress
        )
        gone = sum(int(mask.sum()) for mask in masks.values())
        table = {"attn2": {"matrices": len(masks), "zeroed": gone / sum(mask.numel() for mask in masks.values())}}
        for name, mask in masks.items():
            unet.get_parameter(name).data.masked_fill_(mask, 0.0)
        settings = {field.name: getattr(self, field.name) for field in fields(PEsd)} | {"size": size}
        record = Record("p-esd", job.pairs, job.frames, (), settings, skipped)
        note = f"ESD's loss: {losses[0]:.4g} in the first update, {losses[-1]:.4g} in the last one"
        return Outcome(record, table, (note,))


def check(learning: Learning, before: str) -> None:
    """Refuse values out of range; `before` stands before the names of the flags.

    Raises:
        UserError: Names the flag.
    """
    for name, good, wanted in (
        ("ratio", 0 < learning.ratio <= 1, "0 < ratio <= 1"),
        ("updates", learning.updates >= 1, "1 or more"),
        ("lr", 0 < learning.lr < float("inf"), "a positive number"),
        ("steps", learning.steps >= 3, "3 or more"),
        ("batch", learning.batch >= 1, "1 or more"),
    ):
        if not good:
            raise UserError(f"{before}{name} is {getattr(learning, name)}; wanted {wanted}")


def matrices(unet: UNet) -> dict[str, nn.Parameter]:
    """Weights of the linear layers of the cross-attentions that are left, by parameter name."""
    transformers(unet.structure)  # refuses a model that has none
    names = [f"{name}.weight" for name in modules(unet, "esd-x")]
    return {name: unet.get_parameter(name) for name in names}


def learn(
    unet: UNet,
    schedule: Schedule,
    encoder: TextEncoder,
    pairs: Sequence[Pair],
    learning: Learning,
    seed: int,
    size: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Which weights go, bool by parameter name, and ESD's loss in every update. The UNet stays as it is.

    Args:
        pairs: Texts to erase and their anchors; updates go round them.
        seed: Of noise and of how far samples are painted.
        size: Height and width of the latents.
        progress: Called with the updates done and to do.
    """
    weights = {name: w.detach() for name, w in matrices(unet).items()}
    device = unet.conv_in.weight.device
    scores = {name: torch.ones_like(w, dtype=torch.float32) for name, w in weights.items()}
    optimizer = torch.optim.Adam(list(scores.values()), lr=learning.lr)
    schedule, null = schedule.to(device), encoder.encode([""]).to(device)
    source = Itself(unet)
    eraser = Esd(source, null, learning.eta, learning.guidance, learning.steps, compat=False)
    answers, losses = Answers(source, schedule, seed), list[float]()
    latents = torch.zeros(learning.batch, unet.config.in_channels, size, size, device=device)
    for number in range(learning.updates):
        rows = range(number * learning.batch, (number + 1) * learning.batch)
        some = [pairs[row % len(pairs)] for row in rows]
        text, anchor = (encoder.encode([getattr(p, side) for p in some]).to(device) for side in ("erase", "guide"))
        batch = Batch(latents, text, anchor, torch.tensor(rows) + FIRST)
        loss, gradients = _descent(unet, weights, scores, eraser, answers, batch)
        for name, score in scores.items():
            score.grad = weights[name].float() * gradients[name].float()
        optimizer.step()
        losses.append(loss)
        if progress:
            progress(number + 1, learning.updates)
    return _lowest(scores, learning.ratio), losses


def _descent(
    unet: UNet,
    weights: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    eraser: Esd,
    answers: Answers,
    batch: Batch,
) -> tuple[float, dict[str, Tensor]]:
    """ESD's loss of the masked model, and its gradient by the masked weights; nobody else's gradient is touched."""
    masked = {name: (w * (scores[name] >= 0)).requires_grad_() for name, w in weights.items()}

    def student(*inputs: Tensor) -> object:
        return functional_call(unet, masked, inputs)

    with torch.enable_grad():
        total = eraser.loss(student, answers, batch).total  # pyright: ignore[reportArgumentType]  # it is only called
        found = torch.autograd.grad(total, list(masked.values()))
    return total.item(), dict(zip(masked, found, strict=True))


def _lowest(scores: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Of all scores below 0 a share `ratio` of all scores at most, the lowest ones: True where a weight goes."""
    every = torch.cat([score.flatten() for score in scores.values()])
    low = every.topk(int(ratio * len(every)), largest=False)  # of equal ones no more than fit
    gone = torch.zeros_like(every, dtype=torch.bool)
    gone[low.indices] = low.values < 0
    parts = gone.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for part, (name, score) in zip(parts, scores.items(), strict=True)}
