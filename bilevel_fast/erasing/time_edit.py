"""TIME (arXiv:2303.08084): keys and values of a text become those of its guide, in closed form; nothing is preserved.

For the keys' or values' matrix W of a cross-attention, with text states k of width D (its equations 2 and 3),

    min_W'  lambda |W' - W|^2 + sum_E |W' k_e - W k_g|^2
    W' = W (lambda I + sum_E k_g k_e^T) (lambda I + sum_E k_e k_e^T)^-1

That is `erasing.uce` without a single preserved text, not even the empty one, and with TIME's lambda of 0.1. Matched
tokens are UCE's: from the last word of both texts to the end of the padding; the paper takes the source's tokens. What
holds other texts in place is lambda alone. Edits before this one are not held either: the next one starts from the
weights as they are.
"""

from dataclasses import dataclass

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.edit import Job, Outcome, Record, transformers
from bilevel_fast.erasing.uce import apply, gram, match, matrices, measure, solve, states_of, texts
from bilevel_fast.models.unet import UNet


@dataclass(frozen=True)
class Time:
    """Closed-form edit of the keys and values of all cross-attentions that preserves no text."""

    ridge: float = 0.1
    """Lambda: how much the weights hold on to what they are."""

    def __post_init__(self) -> None:
        if not 0 < self.ridge < float("inf"):
            raise UserError(f"--ridge is {self.ridge}; wanted a positive number")

    def edit(self, unet: UNet, job: Job) -> Outcome:
        """Change the weights of a UNet in place.

        Raises:
            UserError: The UNet has no cross-attention left, or texts to preserve came.
        """
        if job.preserve:
            raise UserError(f"time preserves no text, and {len(job.preserve)} came to be preserved; uce does")
        encoder, device = job.folder.text_encoder, unet.conv_in.weight.device
        _, skipped = transformers(unet.structure)
        new = match(encoder, texts(job.pairs, job), device)
        delta = solve(new, gram(encoder, {}, device), self.ridge)
        nobody = match(encoder, (), device)
        # how far the empty text is moved, which nothing holds
        table = measure(dict(matrices(unet)), delta, new, nobody, states_of(encoder, ("",), device))
        apply(unet, delta)
        record = Record("time", job.pairs, job.frames, (), {"ridge": self.ridge}, skipped)
        notes = ["nothing is preserved: what is measured as preserved is the empty text"]
        notes += [f"not held: {len(job.earlier)} earlier edits"] if job.earlier else []
        return Outcome(record, table, tuple(notes))
