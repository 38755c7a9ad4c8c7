"""UCE (arXiv:2308.14761): keys and values of a text to erase become those of its guide, in closed form.

For the keys' or values' matrix W of a cross-attention, with text states k of width D,

    min_W'  lambda |W' - W|^2 + sum_E s |W' k_e - W k_g|^2 + sum_P p |W' k_p - W k_p|^2

over tokens e of erased texts, each with a token g of its guide, and tokens p of preserved texts. The targets are W
times something, so one matrix serves all W of all layers, whatever rows pruning has left of them:

    W' = W + W D,   D = [sum_E s (k_g - k_e) k_e^T] G^-1,   G = lambda I + sum_E s k_e k_e^T + sum_P p k_p k_p^T

In this form nothing changes, to the bit, where every guide is its text. D is computed in fp64.

**One concept after another.** Completing the square, the objective of an edit that led to W is a constant plus
tr (W' - W) G (W' - W)^T. So the next edit, which adds the earlier G to its own (lambda only once), minimises all
objectives together, as recursive least squares does; what it is *not* told is the W of before, so its own guides and
preserved texts have the keys and values that the earlier edits left them. G is made of texts alone, which `erased.json`
keeps.

Tokens: those of a pair are matched from the last word of each text to the end of the padding, as far as both go, since
what a text means gathers in its last word and in what follows; preserved texts count with all their tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.edit import Job, Outcome, Record, transformers
from bilevel_fast.erasing.pairs import Pair, framed, last_words
from bilevel_fast.models.text_encoder import TextEncoder, token_states
from bilevel_fast.models.unet import UNet
from bilevel_fast.sampling.prompts import same_text

_BATCH = 64  # texts encoded at once
_MEASURED = 64  # preserved texts looked at for the table


@dataclass(frozen=True)
class Matched:
    """Tokens of erased texts and of their guides: (n, D) each, fp64, and their weights (n, 1)."""

    erased: Tensor
    guide: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Uce:
    """Closed-form edit of the keys and values of all cross-attentions."""

    ridge: float = 0.5
    """Lambda: how much the weights hold on to what they are."""
    preserve_scale: float | None = None
    """Weight of preserved texts against a weight of 1 for erased ones. Default: 1 / their number, and 0.1 at least. 1e6
    leaves them in place, as far as what is to be erased is anything else."""

    def __post_init__(self) -> None:
        for name, value in (("ridge", self.ridge), ("preserve-scale", self.preserve_scale)):
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"--{name} is {value}; wanted a positive number")

    def edit(self, unet: UNet, job: Job) -> Outcome:
        """Change the weights of a UNet in place.

        The null prompt is always preserved.

        Raises:
            UserError: The UNet has no cross-attention left.
        """
        encoder = job.folder.text_encoder
        _, skipped = transformers(unet.structure)
        pairs = texts(job.pairs, job)
        preserve = tuple(dict.fromkeys(["", *job.preserve]))
        scale = max(0.1, 1 / len(preserve)) if self.preserve_scale is None else self.preserve_scale
        kept_pairs, kept_texts, notes = _carried(job, pairs)
        weights = dict.fromkeys(preserve, scale)
        for text, before in kept_texts.items():
            weights[text] = max(before, weights.get(text, 0.0))
        device = unet.conv_in.weight.device
        new, old = (match(encoder, some, device) for some in (pairs, kept_pairs))
        held = gram(encoder, weights, device) + old.erased.T @ (old.weight * old.erased)
        delta = solve(new, held, self.ridge)
        table = measure(dict(matrices(unet)), delta, new, old, states_of(encoder, preserve, device))
        apply(unet, delta)
        settings = {field.name: getattr(self, field.name) for field in fields(Uce)} | {"preserve_scale": scale}
        record = Record("uce", job.pairs, job.frames, preserve, settings, skipped)
        if len(preserve) > _MEASURED:
            notes.append(f"preserved texts measured: the first {_MEASURED} of {len(preserve)}")
        return Outcome(record, table, tuple(notes))


def texts(pairs: Sequence[Pair], job: Job | Record) -> tuple[Pair, ...]:
    """The pairs by themselves and in every sentence."""
    return (*pairs, *framed(pairs, job.frames))


def match(encoder: TextEncoder, pairs: Sequence[Pair], device: torch.device | str = "cpu") -> Matched:
    """States of the tokens that stand for each other."""
    wide = torch.empty(0, encoder.width, dtype=torch.float64, device=device)
    erased, guide, weight = [wide], [wide], [wide[:, :1]]
    for start in range(0, len(pairs), _BATCH):
        rows = pairs[start : start + _BATCH]
        sides = [[pair.erase for pair in rows], [pair.guide for pair in rows]]
        states = [token_states(encoder, side).to(device).double() for side in sides]
        starts = zip(*(last_words(encoder, side) for side in sides), strict=True)
        for i, (e, g) in enumerate(starts):
            count = encoder.length - max(e, g)
            erased.append(states[0][i, e : e + count])
            guide.append(states[1][i, g : g + count])
            weight.append(wide.new_full((count, 1), rows[i].weight))
    return Matched(torch.cat(erased), torch.cat(guide), torch.cat(weight))


def gram(encoder: TextEncoder, weights: dict[str, float], device: torch.device | str = "cpu") -> Tensor:
    """Sum of weight * k k^T over all tokens of texts, (D, D) fp64; their states are never there all at once."""
    total = torch.zeros(encoder.width, encoder.width, dtype=torch.float64, device=device)
    names = list(weights)
    for start in range(0, len(names), _BATCH):
        some = names[start : start + _BATCH]
        scale = torch.tensor([weights[name] for name in some], dtype=torch.float64, device=device)
        k = (token_states(encoder, some).to(device).double() * scale.sqrt()[:, None, None]).flatten(0, 1)
        total += k.T @ k
    return total


def solve(new: Matched, held: Tensor, ridge: float) -> Tensor:
    """D of `W' = W + W D`, (D, D) fp64.

    Args:
        new: What moves.
        held: (D, D): the Gram matrix of all that should stay, weighted.
        ridge: Lambda, > 0.
    """
    g = held + new.erased.T @ (new.weight * new.erased) + ridge * torch.eye(len(held)).to(held)
    pull = (new.weight * new.erased).T @ (new.guide - new.erased)
    return torch.cholesky_solve(pull, torch.linalg.cholesky(g)).T  # G is symmetric: (G^-1 pull)^T = pull^T G^-1


def matrices(unet: UNet) -> Iterator[tuple[str, nn.Parameter]]:
    """Keys' and values' matrices (heads * head_dim, D) of the cross-attentions that are left, by parameter name."""
    for site in transformers(unet.structure)[0]:
        for part in ("to_k", "to_v"):
            name = f"{site.transformer_block}.attn2.{part}.weight"
            yield name, unet.get_parameter(name)


@torch.no_grad()
def apply(unet: UNet, delta: Tensor) -> None:
    """Add W D, computed in fp64, to every keys' and values' matrix W."""
    for _, w in matrices(unet):
        w.copy_(w.double() + w.double() @ delta.to(w.device))


def _carried(job: Job, pairs: Sequence[Pair]) -> tuple[list[Pair], dict[str, float], list[str]]:
    """What earlier edits erased and preserved, less what is erased anew; and a line about each such overlap."""
    anew = {same_text(pair.erase) for pair in pairs}
    kept: dict[str, Pair] = {}
    weights: dict[str, float] = {}
    dropped: dict[str, None] = {}
    count = 0
    for record in job.earlier:
        if record.method != "uce":
            continue
        count += 1
        for pair in texts(record.pairs, record):
            kept[same_text(pair.erase)] = pair  # a text erased twice counts as it was erased last
        for text in record.preserve:
            weights[text] = max(record.settings["preserve_scale"], weights.get(text, 0.0))
    dropped.update(dict.fromkeys(pair.erase for name, pair in kept.items() if name in anew))
    dropped.update(dict.fromkeys(text for text in weights if same_text(text) in anew))
    notes = [f"kept: {count} earlier edit{'s' if count > 1 else ''} by uce"] if count else []
    notes += [f"no longer kept, as it is erased now: {text!r}" for text in dropped]
    return (
        [pair for name, pair in kept.items() if name not in anew],
        {text: weight for text, weight in weights.items() if same_text(text) not in anew},
        notes,
    )


def states_of(encoder: TextEncoder, preserve: Sequence[str], device: torch.device) -> Tensor:
    """Of all tokens of the first few texts, (n, D) fp64."""
    return token_states(encoder, preserve[:_MEASURED]).to(device).double().flatten(0, 1)


@torch.no_grad()
def measure(
    parameters: Mapping[str, Tensor], delta: Tensor, new: Matched, old: Matched, kept: Tensor
) -> dict[str, dict[str, float]]:
    """Norms over all matrices of a kind and all tokens of a group, before against after, from the fp64 solution."""
    table: dict[str, dict[str, float]] = {}
    for part in ("to_k", "to_v"):
        w = [p.double() for name, p in parameters.items() if f".{part}." in name]
        moved = [x @ delta for x in w]

        def through(layers: Sequence[Tensor], states: Tensor) -> float:
            return sum(((states @ layer.T).square().sum().item() for layer in layers), 0.0) ** 0.5

        far = through(w, new.erased - new.guide)
        left = through(w, new.erased + new.erased @ delta.T - new.guide)
        table[f"attn2.{part}"] = {
            "matrices": len(w),
            "weights": _norm(moved) / _norm(w),
            "erased moved": through(moved, new.erased) / through(w, new.erased),
            "left to guide": left / far if far else 0.0,
            "preserved moved": through(moved, kept) / through(w, kept),
        }
        if len(old.erased):
            table[f"attn2.{part}"]["earlier moved"] = through(moved, old.erased) / through(w, old.erased)
    return table


def _norm(tensors: Sequence[Tensor]) -> float:
    return sum(t.square().sum().item() for t in tensors) ** 0.5
