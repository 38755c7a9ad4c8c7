"""SepME (arXiv:2402.05947): each concept is erased by an increment of its own that no other text sees, and that can be
taken back.

For a keys' or values' matrix W of a cross-attention, SepME's weight decoupling makes the increment of concept i a
linear combination of solutions of K Delta^T = 0, with the text states of everything else as rows of K: kept texts,
guides and the other concepts. These solutions are what is left of the singular vectors of K below `threshold` times the
largest singular value, 1e-4 in the paper; with the projection N onto them,

    C = columns k_e - k_g over matched tokens of the concept and its guide,    N C = U S V^T
    Delta_i = -W C V S^-1 U^T        (of S what is above `threshold` times |C|)

so that Delta_i k = 0 for kept k, and (W + Delta_i) k_e = (W + Delta_i) k_g: the least such combination. The paper
learns its coefficients by gradients, with a loss of its own; AdamW would lead them out of the null space, and keys and
values have the closed form. The texts are few there: where they span all of the D dimensions, nothing can be erased
without being seen, and that is refused.

W + sum Delta_i = W P with P P = P, so that an edit made again does nothing. An increment has rank r: it is kept as two
factors, (n, r) for each matrix and (D, r) for all, in `separable.safetensors` beside the model. To give a concept back,
it is subtracted: the old weights return to rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.tensors import read_tensors
from bilevel_fast.erasing.edit import Job, Outcome, Record, transformers
from bilevel_fast.erasing.pairs import Pair
from bilevel_fast.erasing.uce import Matched, gram, match, matrices, measure, states_of, texts
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.sampling.prompts import same_text

FILE = "separable.safetensors"
"""`left/TEXT/PARAMETER` (n, r) and `right/TEXT` (D, r) fp32 for each concept that can be given back."""

Parts = dict[str, Tensor]
"""An increment's factors: `right` (D, r), and (n, r) for each matrix by its name."""


def directions(concept: Matched, others: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """What makes the increment of a concept, Delta = W L R^T: L = -C V S^-1 and R = U, (D, r) fp64 each.

    Args:
        concept: Its tokens and its guide's.
        others: (D, D) fp64: sum of k k^T over all that should not see it.
        threshold: See above.
    """
    squares, vectors = torch.linalg.eigh(others)
    null = vectors[:, squares <= threshold**2 * squares[-1]]
    apart = (concept.erased - concept.guide).T
    u, s, vt = torch.linalg.svd(null @ (null.T @ apart), full_matrices=False)
    known = s > threshold * torch.linalg.matrix_norm(apart, 2)
    return -(apart @ vt[known].T) / s[known], u[:, known]


@dataclass(frozen=True)
class Separable:
    """Closed-form edit of the keys and values of all cross-attentions, one increment for each concept, which no text
    that is preserved and no other concept sees, and which can be given back."""

    threshold: float = 1e-4
    """Singular values of the preserved texts below this share of the largest one count as nothing. Higher where they
    are many: more can be erased then, and they are moved by about so much."""
    give_back: tuple[str, ...] = ()
    """Texts that such an edit has erased from this model: take their increments out of the weights again."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise UserError(f"--threshold is {self.threshold}; wanted a number between 0 and 1")

    def edit(self, unet: UNet, job: Job) -> Outcome:
        """Change the weights of a UNet in place; the null prompt is always preserved.

        Raises:
            UserError: The UNet has no cross-attention left, what is preserved leaves no direction to a concept, a text
                is erased already, or one that is to be given back is not.
        """
        skipped = transformers(unet.structure)[1]
        known, weights = _read(job, unet), dict(matrices(unet))
        if self.give_back:
            return self._given_back(weights, job, known, skipped)
        for pair in job.pairs:
            if any(same_text(pair.erase) == same_text(text) for text in known):
                raise UserError(f"{pair.erase!r} is erased by an increment already; --give-back takes it out")
        base = {name: w.double() - sum(_delta(parts, name) for parts in known.values()) for name, w in weights.items()}
        device, encoder = unet.conv_in.weight.device, job.folder.text_encoder
        matched = [match(encoder, texts([pair], job), device) for pair in job.pairs]
        held = dict.fromkeys(("", *job.preserve), 1.0)
        found, total = increments(
            encoder, [texts([pair], job) for pair in job.pairs], [*held, *known], self.threshold, "--threshold", device
        )
        parts = {
            pair.erase: {"right": right.float()} | {name: (w @ left).float() for name, w in base.items()}
            for pair, (left, right) in zip(job.pairs, found, strict=True)
        }
        every = Matched(*(torch.cat([getattr(m, side) for m in matched]) for side in ("erased", "guide", "weight")))
        earlier, kept = match(encoder, (), device), states_of(encoder, tuple(held), device)
        table = measure(base, total, every, earlier, kept)
        _add(weights, parts, 1.0)
        record = Record("separable", job.pairs, job.frames, tuple(held), {"threshold": self.threshold}, skipped)
        ranks = ", ".join(f"{some['right'].shape[1]} for {text!r}" for text, some in parts.items())
        notes = (f"directions: {ranks}", "--give-back TEXT takes an increment out again")
        return Outcome(record, table, notes, {FILE: _stored(known | parts)})

    def _given_back(
        self, weights: Mapping[str, Tensor], job: Job, known: dict[str, Parts], skipped: tuple[str, ...]
    ) -> Outcome:
        by_text = {same_text(text): text for text in known}
        for text in self.give_back:
            if same_text(text) not in by_text:
                there = ", ".join(map(repr, known)) or "none"
                raise UserError(f"--give-back {text!r}: {job.folder.path} has no such increment; there are: {there}")
        chosen = {by_text[same_text(text)]: known[by_text[same_text(text)]] for text in self.give_back}
        moved = _add(weights, chosen, -1.0)
        table = {
            f"attn2.{kind}": {
                "matrices": sum(f".{kind}." in name for name in weights),
                "weights": _norm(moved, kind) / _norm(weights, kind),
            }
            for kind in ("to_k", "to_v")
        }
        record = Record("separable", (), (), (), {"give_back": list(chosen)}, skipped)
        left = {text: parts for text, parts in known.items() if text not in chosen}
        notes = tuple(f"given back: {text!r}" for text in chosen)
        return Outcome(record, table, notes, {FILE: _stored(left)} if left else {})


def increments(
    encoder: TextEncoder,
    concepts: Sequence[Sequence[Pair]],
    kept: Sequence[str],
    threshold: float,
    flag: str,
    device: torch.device | str = "cpu",
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """`directions` of each concept, which sees neither kept texts, guides nor the other concepts; and P - I, (D, D).

    Args:
        concepts: Of each the pairs of texts that stand for it.
        kept: Texts that should stay what they are.
        flag: That sets the threshold, for what is said.

    Raises:
        UserError: Nothing is left to a concept.
    """
    guides = {pair.guide for pairs in concepts for pair in pairs}
    always = gram(encoder, dict.fromkeys((*kept, *guides), 1.0), device)
    own = [gram(encoder, dict.fromkeys((pair.erase for pair in pairs), 1.0), device) for pairs in concepts]
    total, found = torch.zeros_like(always), []
    for number, pairs in enumerate(concepts):
        others = always + sum(gram for n, gram in enumerate(own) if n != number)
        left, right = directions(match(encoder, pairs, device), others, threshold)
        if not right.shape[1]:
            raise UserError(
                f"what is preserved leaves no direction to {pairs[0].erase!r}: {len(kept)} texts; preserve fewer, or "
                f"raise {flag}, which is {threshold:g}"
            )
        found.append((left, right))
        total += left @ right.T
    return found, total


def _delta(parts: Parts, name: str) -> Tensor:
    """An increment of a matrix, fp64; the same whenever it is added or taken out."""
    return parts[name].double() @ parts["right"].double().T


@torch.no_grad()
def _add(weights: Mapping[str, Tensor], concepts: Mapping[str, Parts], sign: float) -> dict[str, Tensor]:
    """Add increments to matrices in place, or take them out; returns what was added, by matrix."""
    moved = {name: sign * torch.stack([_delta(p, name) for p in concepts.values()]).sum(0) for name in weights}
    for name, w in weights.items():
        w.copy_(w.double() + moved[name].to(w.device))
    return moved


def _norm(tensors: Mapping[str, Tensor], kind: str) -> float:
    return sum(t.double().square().sum().item() for name, t in tensors.items() if f".{kind}." in name) ** 0.5


def _stored(concepts: Mapping[str, Parts]) -> dict[str, Tensor]:
    return {
        f"right/{text}" if name == "right" else f"left/{text}/{name}": part.cpu()
        for text, parts in concepts.items()
        for name, part in parts.items()
    }


def _read(job: Job, unet: UNet) -> dict[str, Parts]:
    """Increments that earlier edits have left beside the model, by text.

    Raises:
        UserError: The file is broken, or of another model.
    """
    path, found = job.folder.path / FILE, dict[str, Parts]()
    if not path.exists():
        return found
    for key, value in read_tensors(path).items():
        side, _, rest = key.partition("/")
        text, name = (rest, "right") if side == "right" else rest.rpartition("/")[::2]
        found.setdefault(text, {})[name] = value.to(unet.conv_in.weight.device, copy=True)
    shapes = {name: tuple(w.shape) for name, w in matrices(unet)}
    for text, parts in found.items():
        width, rank = next(iter(shapes.values()))[1], parts.get("right", torch.empty(0, 0)).shape[-1]
        wanted = {name: (rows, rank) for name, (rows, _) in shapes.items()} | {"right": (width, rank)}
        if {name: tuple(part.shape) for name, part in parts.items()} != wanted:
            raise UserError(f"{path}: the increment of {text!r} is not one of this model's keys and values")
    return found
