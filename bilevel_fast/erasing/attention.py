"""Forget-Me-Not (arXiv:2303.17591): attention re-steering. No pixel of a picture should look at the concept's words.

    L = sqrt(sum_l sum_h sum_q sum_k in concept  A_l[h, q, k]^2)

over cross-attentions l, heads h, image tokens q and the words of the concept's phrase, with A_l the student's attention
probabilities at x_t of concept images and their prompts. It is the norm that the released script takes; the squares,
which the paper sums up, have the same direction of steepest descent. There is no target, and no anchor's answer.

The words are those that a caption has and its anchor has not. The script's first stage, textual inversion, is left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.erasing.phrases import span
from bilevel_fast.models.layers import Attention
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.training.losses import Loss
from bilevel_fast.training.lower import Answers
from bilevel_fast.training.phases import phase
from bilevel_fast.training.upper import Eraser


class ForgetMeNot(Eraser):
    """The norm of the attention to the concept. Blocks are not recomputed in its steps, whatever the settings say.

    Args:
        words: Of captions: which of their text tokens name the concept, (B, L) bool; see `Words`.
    """

    eager = "which words name the concept is read from the captions"

    def __init__(self, words: Callable[[Sequence[str]], Tensor]):
        self.words = words

    def loss(self, student: UNet, answers: Answers, batch: Batch) -> Loss:
        noised, concept = answers.noise(batch), self.words(batch.captions).to(batch.text.device)
        squares: list[Tensor] = []
        with phase("student"), attended(student, concept, squares):
            student(noised.x, noised.t, batch.text)
        if not squares:
            raise UserError("eraser 'forget-me-not': this student has no cross-attention left")
        with phase("losses"):
            total = torch.stack(squares).sum().sqrt()
        return Loss(total, {"suppression": total.detach()})


@contextmanager
def attended(student: UNet, concept: Tensor, squares: list[Tensor]) -> Iterator[None]:
    """Within, every cross-attention appends the sum of squares, () fp32, of its probabilities for `concept` (B, L).

    Probabilities are computed beside the attention itself, which keeps none.
    """

    def look(module: Attention, inputs: tuple[Tensor, Tensor]) -> None:
        q, k = (
            project(x).unflatten(-1, (module.heads, -1)).transpose(1, 2).float()
            for project, x in zip((module.to_q, module.to_k), inputs, strict=True)
        )
        probabilities = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        squares.append((probabilities * concept[:, None, None]).square().sum())

    crossing = [module for name, module in student.named_modules() if name.endswith(".attn2")]
    handles = [module.register_forward_pre_hook(look) for module in crossing]
    recompute, student.recompute = student.recompute, False
    try:
        yield
    finally:
        student.recompute = recompute
        for handle in handles:
            handle.remove()


class Words:
    """Which text tokens of a caption name the concept: the words between what it and its anchor begin and end with.

    Args:
        encoder: Says how many tokens a text takes.
        source: A bank: captions and their anchors.

    Raises:
        UserError: A sample has no anchor, or a caption says no more than its anchor.
    """

    def __init__(self, encoder: TextEncoder, source: LatentSource):
        spans: dict[str, tuple[str, str]] = {}
        for index in range(len(source)):
            anchor = source.anchor(index)
            if anchor is None:
                raise UserError("eraser 'forget-me-not' wants a bank of concepts; the source has captions only")
            spans |= {caption: _span(caption, anchor) for caption in source.captions(index)}
        texts = list(dict.fromkeys(text for span in spans.values() for text in span))
        # the last token of a text is the one that ends it
        ends = dict(zip(texts, (encoder.mask(texts).sum(1) - 1).tolist(), strict=True))
        self._spans = {caption: (ends[before], ends[through]) for caption, (before, through) in spans.items()}
        self._length = encoder.length

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, L) bool on the CPU."""
        places = torch.arange(self._length)
        first, last = torch.tensor([self._spans[caption] for caption in captions])[:, :, None].unbind(1)
        return (places >= first) & (places < last)


def _span(caption: str, anchor: str) -> tuple[str, str]:
    """What stands before the concept's words, and the same with them."""
    words = caption.split()
    first, last = span(caption, anchor)
    if first == last:
        raise UserError(f"eraser 'forget-me-not': caption {caption!r} has no word that its anchor {anchor!r} lacks")
    return " ".join(words[:first]), " ".join(words[:last])
