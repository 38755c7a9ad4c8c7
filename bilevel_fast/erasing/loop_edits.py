"""Edits of weights as upper steps: UCE as a projection, ConceptPrune as masks that are put on again.

Between two upper steps the lower level moves what an edit has done, and the next edit does it again. So an edit that is
applied many times must not do more than one that is applied once: both below are idempotent.

**UCE** (arXiv:2308.14761) as published is not. `W' = W + W D` of `erasing.uce` wants W' k_e = W k_g, the guide as it
was *before*. Applied n times it is W (I + D)^n, and I + D has eigenvalues above 1 where texts and guides are alike:
on the mini world it grows without end. What is applied here wants the guide as it is *after* the edit. With H the Gram
matrix of what should stay (preserved texts, guides, lambda I) and columns sqrt(s) (k_e - k_g) of C,

    min_W'  tr (W' - W) H (W' - W)^T + |W' C|^2

shrinks W L along each left singular vector u of L^-1 C, where H = L L^T, by 1 / (1 + sigma^2). Applied again and again,
that shrinks the weakest directions away, too. So directions are taken out where one edit would take out more than half
(sigma > 1), and left alone elsewhere:

    W' = W P,   P = I - L U U^T L^-1,   P P = P

P depends on the text encoder alone: it is found once, in fp64, before the first step.

**TIME** (arXiv:2303.08084) is the same without preserved texts: H is made of the guides and of its own lambda.

**SepME** (arXiv:2402.05947) is a projection as it stands: see `erasing.separable`.

**ConceptPrune** (arXiv:2405.19237): the masks of `erasing.concept_prune`, found from the student as it is at the first
upper step, or anew at every so many. The lower level may move masked weights between two upper steps, and the next
one zeros them again.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.blend import parts_of, weights_of
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.erasing import concept_prune, p_esd
from bilevel_fast.erasing.edit import transformers
from bilevel_fast.erasing.pairs import Pair, check
from bilevel_fast.erasing.phrases import captions_of, held, pairs_of, phrases
from bilevel_fast.erasing.separable import increments
from bilevel_fast.erasing.settings import Upper
from bilevel_fast.erasing.uce import Matched, gram, match, matrices
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.sampling.prompts import read_prompts
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.upper import Edit, Terms

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Ground:
    """What edits are made from.

    Attributes:
        flat: The student's parameters.
        data: What the lower level is trained on.
        concepts: The banks; their captions are what is erased, their anchors what stands in its place.
        guidance: Classifier-free guidance scale of sampling, by default.
    """

    flat: FlatParameters
    data: LatentSource
    concepts: LatentSource
    encoder: TextEncoder
    schedule: Schedule
    seed: int
    guidance: float

    @property
    def student(self) -> UNet:
        assert isinstance(self.flat.module, UNet)
        return self.flat.module


def _pairs(upper: Upper, ground: Ground) -> list[tuple[Pair, ...]]:
    """What is to be erased and what should stand in its place, for each bank.

    Raises:
        UserError: A text cannot be erased.
    """
    banks = [pairs_of(bank, to_null=upper.anchor == "null") for bank in parts_of(ground.concepts)]
    check([pair for pairs in banks for pair in pairs], (), ground.encoder)
    return banks


def _weighed(banks: list[tuple[Pair, ...]], ground: Ground) -> list[Pair]:
    """All pairs: those of a concept weigh 1 together, or as its bank's share asks."""
    weights = weights_of(ground.concepts)
    return [
        replace(pair, weight=weight / (sum(weights) / len(weights)) / len(bank))
        for bank, weight in zip(banks, weights, strict=True)
        for pair in bank
    ]


def uce(upper: Upper, ground: Ground) -> "UceProjection":
    """UCE as the settings name it.

    Raises:
        UserError: The student has no such layer left, or a text cannot be erased, or both erased and preserved.
    """
    settings, banks = upper.uce, _pairs(upper, ground)
    device, erased = ground.flat.master.device, phrases(ground.concepts)
    names = [name for name, _ in matrices(ground.student)]
    if settings.preserve is not None:
        kept = tuple(read_prompts(settings.preserve))
        for text in kept:
            if (phrase := held(text, erased)) is not None:
                raise UserError(f"{settings.preserve} preserves {text!r}, and {phrase!r} is to be erased")
    else:
        kept, clashes = captions_of(ground.data, settings.texts, erased)
        if clashes:
            _log.warning("%d lower captions hold an erased phrase, such as %r: not preserved", clashes, erased[0])
    kept = dict.fromkeys(("", *kept))
    pairs = _weighed(banks, ground)
    new = match(ground.encoder, pairs, device)
    held_by = gram(ground.encoder, {text: settings.hold / len(kept) for text in kept}, device)
    matrix, directions = projection(new, held_by, settings.ridge)
    about = f"keys and values, {len(pairs)} texts, {len(kept)} preserved, {directions} of {len(matrix)} directions"
    if not directions:
        _log.warning(
            "uce: what is preserved holds all that is to be erased; lower --upper.uce.hold or --upper.uce.ridge"
        )
    return UceProjection(ground.flat, names, about, matrix)


def time(upper: Upper, ground: Ground) -> "UceProjection":
    """TIME as the settings name it.

    Raises:
        UserError: The student has no such layer left, or a text cannot be erased.
    """
    pairs, device = _weighed(_pairs(upper, ground), ground), ground.flat.master.device
    names = [name for name, _ in matrices(ground.student)]
    nothing = gram(ground.encoder, {}, device)
    matrix, directions = projection(match(ground.encoder, pairs, device), nothing, upper.time.ridge)
    about = f"keys and values, {len(pairs)} texts, nothing preserved, {directions} of {len(matrix)} directions"
    if not directions:
        _log.warning("time: lambda holds all that is to be erased; lower --upper.time.ridge")
    return UceProjection(ground.flat, names, about, matrix)


def separable(upper: Upper, ground: Ground) -> "UceProjection":
    """SepME as the settings name it: the phrases of each bank are a concept, their guide is the null prompt.

    Raises:
        UserError: The student has no such layer left, a phrase cannot be erased, or nothing is left to it.
    """
    settings, encoder = upper.separable, ground.encoder
    concepts = [tuple(map(Pair, phrases(bank))) for bank in parts_of(ground.concepts)]
    check([pair for pairs in concepts for pair in pairs], (), encoder)
    kept, _ = captions_of(ground.data, settings.texts, phrases(ground.concepts)) if settings.texts else ((), 0)
    names = [name for name, _ in matrices(ground.student)]
    device = ground.flat.master.device
    found, matrix = increments(
        encoder, concepts, ("", *kept), settings.threshold, "--upper.separable.threshold", device
    )
    ranks = " + ".join(str(right.shape[1]) for _, right in found)
    about = f"keys and values, {len(concepts)} concepts, {1 + len(kept)} preserved, {ranks} of {len(matrix)} directions"
    return UceProjection(ground.flat, names, about, matrix)


def prune(upper: Upper, ground: Ground) -> "PruneMasks":
    """ConceptPrune as the settings name it.

    Raises:
        UserError: The student has no such layer left, or a text cannot be erased.
    """
    settings, banks = upper.concept_prune, _pairs(upper, ground)
    layers = concept_prune.second_matrices(ground.student)
    concept_prune.check_ratio(settings.ratio, layers, "--upper.concept-prune.ratio")
    some = [pairs[:: -(-len(pairs) // settings.prompts)] for pairs in banks]
    size = ground.concepts.latent_shape[1]
    guidance = ground.guidance if settings.guidance is None else settings.guidance

    def find() -> dict[str, Tensor]:
        return concept_prune.find_masks(
            ground.student, ground.schedule, ground.encoder, some,
            ratio=settings.ratio, select=settings.select, seed=ground.seed, size=size, guidance=guidance,
            steps=settings.steps, batch=settings.batch,
        )  # fmt: skip

    return PruneMasks(ground.flat, list(layers), "the second of feed-forward layers", find, settings.every)


def p_esd_masks(upper: Upper, ground: Ground) -> "PruneMasks":
    """P-ESD as the settings name it.

    Raises:
        UserError: The student has no such layer left, or a text cannot be erased.
    """
    settings = {name: value for name, value in vars(upper.p_esd).items() if name != "every"}
    pairs = [pair for bank in _pairs(upper, ground) for pair in bank]
    size = ground.concepts.latent_shape[1]

    def find() -> dict[str, Tensor]:
        learning = p_esd.Learning(**settings)
        return p_esd.learn(ground.student, ground.schedule, ground.encoder, pairs, learning, ground.seed, size)[0]

    layers = p_esd.matrices(ground.student)
    return PruneMasks(ground.flat, list(layers), "of cross-attentions", find, upper.p_esd.every)


class _OnMatrices(Edit):
    """An edit of some matrices of the student, wherever their values lie.

    Args:
        flat: The student's parameters.
        names: Of the matrices.
        about: What they are, for the log.
    """

    def __init__(self, flat: FlatParameters, names: list[str], about: str):
        assert isinstance(flat.module, UNet)
        self.flat, self.names = flat, names
        skipped = transformers(flat.module.structure)[1]
        _log.info("upper level: an edit of %d matrices, %s", len(names), about)
        for site in skipped:
            _log.info("upper level: %s is skipped: the student has dropped it", site)

    @abstractmethod
    def change(self, name: str, w: Tensor) -> Tensor:
        """Change a matrix in place; returns the square of how far it moved, ()."""

    @torch.no_grad()
    def apply(self) -> Terms:
        """The edit; says how far the masters moved, as a norm and as a share of what they are now, () fp32."""
        with self.flat.whole() as buffers:
            found = [self.flat.views(buffer, self.names) for buffer in buffers]
            squares = [[self.change(name, w) for name, w in matrices.items()] for matrices in found]
            moved = torch.stack(squares[0]).sum().sqrt().float()
            norm = torch.stack([w.square().sum() for w in found[0].values()]).sum().sqrt()
        return {"edit_moved": moved, "edit_share": moved / norm}


class UceProjection(_OnMatrices):
    """W <- W P for every keys' and values' matrix of a cross-attention.

    Computed in fp64, as TF32 would move what should stay by more than the edit means to.

    Args:
        matrix: (D, D) fp64: P - I.
    """

    def __init__(self, flat: FlatParameters, names: list[str], about: str, matrix: Tensor):
        super().__init__(flat, names, about)
        self.matrix = matrix

    def change(self, name: str, w: Tensor) -> Tensor:
        moved = w.double() @ self.matrix
        w.add_(moved)
        return moved.square().sum()


def projection(new: Matched, held: Tensor, ridge: float) -> tuple[Tensor, int]:
    """P - I, (D, D) fp64, and how many directions P takes out; see above.

    Args:
        new: Tokens to erase and their guides, with their weights s. Guides are held by the same weights.
        held: (D, D) fp64: Gram matrix of preserved texts, weighted.
        ridge: Lambda, > 0.
    """
    h = held + new.guide.T @ (new.weight * new.guide) + ridge * torch.eye(len(held)).to(held)
    lower = torch.linalg.cholesky(h)
    apart = new.erased - new.guide
    half = torch.linalg.solve_triangular(lower, apart.T @ (new.weight * apart), upper=False)
    # L^-1 C C^T L^-T: its eigenvalues are sigma^2
    squares, u = torch.linalg.eigh(torch.linalg.solve_triangular(lower, half.T, upper=False))
    u = u[:, squares > 1]
    return -(lower @ u) @ torch.linalg.solve_triangular(lower.T, u, upper=True).T, u.shape[1]


class PruneMasks(_OnMatrices):
    """Zeros what masks name in some matrices, such as the second ones of the feed-forward layers, and what was zero
    there from the start: that is how a run that goes on from another one's student does not forget what that one has
    erased.

    Args:
        find: Finds the masks of the student as it is: bool by parameter name.
        every: Upper steps between two searches; 0 searches before the first upper step only.
    """

    def __init__(
        self, flat: FlatParameters, names: list[str], about: str, find: Callable[[], dict[str, Tensor]], every: int
    ):
        super().__init__(flat, names, about)
        self.find, self.every = find, every
        # in place from here on: a CUDA graph looks where they lie
        with flat.whole() as (masters, *_):
            self.masks = {name: w == 0 for name, w in flat.views(masters, names).items()}
        self.zero = {name: mask.clone() for name, mask in self.masks.items()}
        self.found = False

    def prepare(self, step: int) -> None:
        if self.found and not (self.every and step % self.every == 0):
            return
        for name, mask in self.find().items():
            self.masks[name].copy_(mask | self.zero[name])
        self.found = True
        gone, every = (sum(map(count, self.masks.values())) for count in (Tensor.count_nonzero, Tensor.numel))
        _log.info("upper step %d: masks found; %d of %d weights go", step, gone, every)

    def change(self, name: str, w: Tensor) -> Tensor:
        moved = (w * self.masks[name]).square().sum()
        w.masked_fill_(self.masks[name], 0.0)
        return moved

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks} if self.found else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["masks"].keys() != self.masks.keys():
            raise UserError("the checkpoint's masks are of other layers than this student's; start a new run")
        for name, mask in state["masks"].items():
            self.masks[name].copy_(mask)
        self.found = True
