"""The paper's scores of erased prompts, read by a drawn world's probe instead of CLIP and CSD.

    cp     100 x share of prompts whose image shows what was asked less clearly than the reference's image does: how
           clearly is the sum of the probe's log-probabilities of all labels, where the paper takes CLIP's cosine.
           A model that only draws anew scores about 50, the reference itself 0.
    style  100 x mean cosine of the style embeddings of image and reference: the centred logits of the probe's style
           head, where the paper takes CSD's descriptor. The reference itself scores 100.
    plain  100 x share of prompts whose image is drawn in style 0, which is what the prompt's anchor asks for.
           Neither of the paper's scores tells a style that is gone from one that another has taken the place of.

Image and reference belong to the same prompt and the same noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel_fast.base.errors import UserError
from bilevel_fast.worlds.judge import Samples
from bilevel_fast.worlds.probe import Probe, labels


@dataclass(frozen=True)
class Likeness:
    """In percent."""

    cp: float
    style: float
    plain: float


@torch.no_grad()
def likeness(samples: Samples, reference: Samples, styles: Sequence[int], probe: Probe) -> Likeness:
    """Compare the samples of prompts for `styles` with another model's.

    Raises:
        UserError: The samples are not of the same prompts, or none is of these styles.
    """
    if samples.scenes != reference.scenes:
        raise UserError("two sets of samples are compared that were drawn for different prompts")
    rows = [row for row, scene in enumerate(samples.scenes) if scene.style in styles]
    if not rows:
        raise UserError("none of the samples was drawn for an erased style")
    asked = [samples.scenes[row] for row in rows]
    seen, before = (probe(images[rows]) for images in (samples.images, reference.images))
    wanted = labels(asked).unbind(1)

    def clearly(logits: Sequence[Tensor]) -> Tensor:
        heads = zip(logits, wanted, strict=True)
        return torch.stack([head.double().log_softmax(1).gather(1, label[:, None]) for head, label in heads]).sum(0)

    styled = [head.style_logits.double() - head.style_logits.double().mean(1, keepdim=True) for head in (seen, before)]
    less = clearly(seen.logits) < clearly(before.logits)
    plain = seen.style_logits.argmax(1) == 0
    similar = F.cosine_similarity(*styled)
    return Likeness(*(100 * shares.double().mean().item() for shares in (less, similar, plain)))
