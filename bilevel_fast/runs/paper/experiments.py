"""What each table and figure compares; numbers are the paper's (arXiv:2412.15341) as far as its text was at hand.

table1  suppression of one style, against two-stage ESD, UCE and ConceptPrune; of several, a model for each
table2  what prompts that were searched for bring back
table3  what suppression costs elsewhere: quality on all other prompts
fig4    which losses: diffusion, distillation, both
fig5    which start: pruned or random weights
fig6    one, two and three styles suppressed by one model; all three by its rivals as well
fig7    detections, label by label, and how many fewer they are than the dense teacher's

What table3 and fig6 hold is our reading of the released evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bilevel_fast.runs.paper.students import LABELS
from bilevel_fast.training.losses import LossWeights


@dataclass(frozen=True)
class TableRow:
    """One model of an experiment.

    Attributes:
        name: Of the row, in rows.jsonl.
        label: In tables.
        member: What the workshop makes: a name of `students.LABELS`.
        concepts: How many of the concepts are erased; 0 is all of them.
        weights: Of the lower losses, where they differ from the run's.
        random: Start from random weights in the pruned shape.
        steps: Lower steps at which it is measured as well, as shares of all.
    """

    name: str
    label: str
    member: str
    concepts: int = 0
    weights: LossWeights | None = None
    random: bool = False
    steps: Sequence[float] = ()


@dataclass(frozen=True)
class Experiment:
    """A table or figure.

    Attributes:
        title: Heads its page.
        measure: What the judge is asked for.
        rows: Its models.
        against: The row that the others are compared with, in percent of it; none if empty.
        apart: Each concept is erased from models of its own, whose numbers are averaged.
    """

    title: str
    measure: str
    rows: tuple[TableRow, ...]
    against: str = ""
    apart: bool = False

    def models(self, concepts: Sequence[str]) -> list[tuple[TableRow, tuple[str, ...]]]:
        """Every row with what its model lacks, in the order in which they are made."""
        if self.apart:
            return [(row, (name,)) for name in concepts for row in self.rows]
        return [(row, tuple(concepts[: row.concepts or None])) for row in self.rows]

    @property
    def concepts(self) -> int:
        """How many concepts it erases."""
        return max(1, *(row.concepts for row in self.rows))

    @property
    def is_curve(self) -> bool:
        """Measured on the way as well: drawn over steps."""
        return any(row.steps for row in self.rows)


ERASE = {"mini": ("pointillism", "waves", "mosaic"), "emoji": ("noto", "contrast", "twemoji")}
"""Styles of each world to erase, the first ones first, unless the user says which."""
_ON_THE_WAY = (0.0, 0.1, 0.25, 0.5, 0.75)
_MODELS = tuple(TableRow(name, label, name) for name, label in LABELS.items())
_SEVERAL = tuple(
    TableRow(f"{name}-{count}", f"{LABELS[name]}, {count} erased", name, concepts=count)
    for count in (1, 2, 3)
    for name in ("distilled", *(("esd", "uce", "concept-prune") if count == 3 else ()), "bilevel")
)

EXPERIMENTS = {
    "table1": Experiment("One style suppressed", "style", _MODELS, apart=True),
    "table2": Experiment("Prompts that were searched for", "attacked", _MODELS),
    "table3": Experiment("Quality on all other prompts", "kept", _MODELS),
    "fig4": Experiment(
        "Which losses",
        "kept",
        (
            TableRow(
                "diffusion", "the diffusion loss alone", "distilled",
                weights=LossWeights(output=0.0, feature=0.0), steps=_ON_THE_WAY,
            ),
            TableRow(
                "distillation", "distillation alone", "distilled",
                weights=LossWeights(diffusion=0.0), steps=_ON_THE_WAY,
            ),
            TableRow("both", "both", "distilled", steps=_ON_THE_WAY),
        ),
    ),
    "fig5": Experiment(
        "Which start",
        "kept",
        (
            TableRow("random", "random weights", "distilled", random=True, steps=_ON_THE_WAY),
            TableRow("pruned", "pruned weights", "distilled", steps=_ON_THE_WAY),
        ),
    ),
    "fig6": Experiment(
        "One, two and three styles suppressed", "removed", _SEVERAL
    ),
    "fig7": Experiment("Detections by label", "labels", _MODELS, against="teacher"),
}  # fmt: skip
