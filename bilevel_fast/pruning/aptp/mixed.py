"""One batch whose rows belong to different experts, from the weights of the one dense UNet that all were cut from.

    mix = Mix(structures, device)
    mixed(unet, x, t, text, mix, expert).out[b]     is     unet.cut(structures[expert[b]])(x, t, text).out[b]

For experts as they were cut: one that was fine-tuned since has weights of its own, and is run by itself. Rows are
sorted by expert inside, so that equal lists are neighbours. A site that an expert dropped is computed without its rows.

Legend: B rows, K experts, C channels, H W latent size, L text tokens, D text width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import Site, sites
from bilevel_fast.models.layers import Attention, FeedForward, ResNet, Transformer, TransformerBlock, whole
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import Prediction, Sites, UNet
from bilevel_fast.ops.dispatch import Branch
from bilevel_fast.pruning.aptp import mixed_ops
from bilevel_kernels.kept import Kept

# Assignments of rows to experts that are remembered: a sampler asks with the same one again and again. The kernels
# remember 1024 lists (`bilevel_kernels.kept`), and an assignment has 118 of them in SD 2.1.
_PLANS = 8


@dataclass(frozen=True, eq=False)
class _Rows:
    """What one site does to the rows of a batch, which are sorted by expert; of a transformer block that is a site, to
    those that have its Transformer."""

    there: Tensor | None
    """Which rows have the site, int64 on the device; None for all of them."""
    count: int
    """How many have it."""
    kept: Mapping[str, Kept | None]
    """What those rows keep of each width vector; None for everything."""


@dataclass(frozen=True, eq=False)
class _Plan:
    """What a batch does, for one assignment of its rows to experts."""

    order: Tensor | None
    """Sorts the rows by expert, int64 on the device; None if they are sorted."""
    back: Tensor | None
    """Undoes it."""
    by_site: Mapping[str, _Rows]


@dataclass(frozen=True, eq=False)
class Mix:
    """The experts of a mixture, ready to share batches.

    What depends on the assignment of rows alone is worked out when it first comes, and stays on the device: a later
    batch of the same assignment copies nothing to it.

    Attributes:
        structures: K of them.
        device: Where the batches will be.

    Raises:
        UserError: There is none, or two are of different UNets.
    """

    structures: tuple[Structure, ...]
    device: torch.device

    def __post_init__(self) -> None:
        if not self.structures:
            raise UserError("a mixture wants at least one expert, there is none")
        for number, structure in enumerate(self.structures):
            if structure.config != self.structures[0].config:
                raise UserError(f"expert {number} is cut from another UNet than expert 0")

    def bind(self, unet: UNet, expert: Tensor) -> Callable[[Tensor, Tensor, Tensor], Prediction]:
        """What to call for these rows in place of a UNet, all of them once, or several times over.

        `samplers.guided` asks for a prompt's rows with and without the prompt in one batch, twice as long.
        """
        return lambda x, t, text: mixed(unet, x, t, text, self, expert.repeat(len(x) // len(expert)))


def mixed(
    unet: UNet, x: Tensor, t: Tensor, text: Tensor, structures: Sequence[Structure] | Mix, expert: Tensor
) -> Prediction:
    """Predict every row with its expert; differentiable as `UNet.forward` is.

    Args:
        unet: Dense; its weights are read where they lie.
        x: (B, C_in, H, W) noisy latents, any float dtype.
        t: (B,) timesteps.
        text: (B, L, D) text states, any float dtype.
        structures: K of this UNet. Who calls more than once makes a `Mix` of them.
        expert: (B,) int64 in 0..K-1, best on the CPU: reading it from a GPU waits for the GPU.

    Returns:
        As `UNet.forward`, in the order of the rows.

    Raises:
        UserError: The UNet is pruned or stores padding, the structures are of another one, or a row's expert is not
            among them.
    """
    mix = structures if isinstance(structures, Mix) else Mix(tuple(structures), x.device)
    if mix.structures[0].config != unet.config:
        raise UserError("the experts are cut from another UNet than the one they are to share")
    if expert.shape != x.shape[:1] or expert.dtype != torch.int64:
        raise UserError(
            f"expert: {expert.dtype} of shape {tuple(expert.shape)}, wanted torch.int64, one for each of {len(x)} rows"
        )
    plan = _plan(mix, tuple(expert.tolist()))
    if plan.order is not None:
        x, t, text = (value.index_select(0, plan.order) for value in (x, t, text))

    def resnet(name: str, module: ResNet, h: Tensor, skip: Tensor | None, time: Tensor) -> Tensor:
        rows = plan.by_site[name]
        return _some(rows, partial(_resnet, rows, module), h, skip, time)

    def transformer(name: str, module: Transformer, h: Tensor, text: Tensor) -> Tensor:
        rows = plan.by_site[name]

        def run(number: int, block: TransformerBlock, h: Tensor | Branch, text: Tensor) -> Tensor:
            if rows.kept:  # it is the only block
                return _block(rows, block, h, text)
            own = plan.by_site[f"{name}.transformer_blocks.{number}"]
            return _some(own, partial(_block, own, block), whole(h), text)

        return _some(rows, lambda h, text: module(h, text, run), h, text)

    found = unet(x, t, text, Sites(resnet, transformer))
    if plan.back is None:
        return found
    out, *blocks = (_take(value, plan.back) for value in (found.out, *found.blocks))
    return Prediction(out, tuple(blocks))


# --- tables ---


@lru_cache(maxsize=_PLANS)
def _plan(mix: Mix, expert: tuple[int, ...]) -> _Plan:
    for row, number in enumerate(expert):
        if not 0 <= number < len(mix.structures):
            raise UserError(f"row {row} wants expert {number}, there are {len(mix.structures)}, counted from 0")
    order = sorted(range(len(expert)), key=expert.__getitem__)
    ordered = [mix.structures[expert[row]] for row in order]
    by_site = {site.name: _rows(site, ordered, mix.device) for site in sites(ordered[0].config)}
    if order == list(range(len(order))):
        return _Plan(None, None, by_site)
    there = torch.tensor(order)
    return _Plan(there.to(mix.device), there.argsort().to(mix.device), by_site)


def _rows(site: Site, structures: Sequence[Structure], device: torch.device) -> _Rows:
    structures = [structure for structure in structures if site.within not in structure.dropped]
    there = [row for row, structure in enumerate(structures) if site.name not in structure.dropped]
    kept: dict[str, Kept | None] = {}
    for width in site.widths if there else ():
        lists = Kept.per_sample(width.units, [structures[row].kept[site.name][width.name] for row in there])
        kept[width.name] = None if lists.is_everything else lists
    index = None if len(there) == len(structures) else torch.tensor(there, dtype=torch.int64, device=device)
    return _Rows(index, len(there), kept)


# --- sites ---


def _some(rows: _Rows, compute: Callable[..., Tensor], h: Tensor, *others: Tensor | None) -> Tensor:
    """`compute(h, *others)` for the rows that have the site; the others hand h (B, C, H, W) or (B, T, C) on."""
    if not rows.count:
        return h
    there = rows.there
    if there is None:
        return compute(h, *others)
    out = compute(_take(h, there), *(None if x is None else _take(x, there) for x in others))
    if h.dim() != 4:
        return h.index_copy(0, there, out)
    return h.permute(0, 2, 3, 1).index_copy(0, there, out.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _resnet(rows: _Rows, module: ResNet, h: Tensor, skip: Tensor | None, time: Tensor) -> Tensor:
    kept = rows.kept["groups"]
    if kept is None:
        return module(h, skip, time)
    return mixed_ops.resnet(module, h if skip is None else torch.cat([h, skip], dim=1), time, kept)


def _block(rows: _Rows, module: TransformerBlock, h: Tensor | Branch, text: Tensor) -> Tensor:
    def attend(name: str, attention: Attention, x: Tensor, context: Tensor) -> Tensor:
        kept = rows.kept[name]
        return attention(x, context) if kept is None else mixed_ops.attention(attention, x, context, kept)

    def feed(module: FeedForward, x: Tensor) -> Tensor:
        kept = rows.kept["ff"]
        return module(x) if kept is None else mixed_ops.feed_forward(module, x, kept)

    return module(h, text, attend, feed)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x, which stays channels_last if it is a map."""
    if x.dim() != 4:
        return x.index_select(0, rows)
    return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
