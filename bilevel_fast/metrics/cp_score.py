"""CP score: the share of prompts whose image names the erased artist less than the reference's image does.

    CP = 100 mean_i 1[cos(E_T(prompt_i), E_I(image_i)) < cos(E_T(prompt_i), E_I(reference_i))]

The reference is the distilled model before erasure, on the same prompts and seeds: against itself the score is 0.
Higher is better. The style table averages it over artists.

Source: ConceptPrune, arXiv:2405.19237, section 4; table 1 of arXiv:2412.15341.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bilevel_fast.metrics.clip_score import clip_scores


def cp_scores(texts: Tensor, images: Tensor, references: Tensor) -> NDArray[np.float64]:
    """0 or 100 of each triple of unit vectors (N, D): (N,). A tie is no loss of the artist and counts 0."""
    return np.where(clip_scores(texts, images) < clip_scores(texts, references), 100.0, 0.0)
