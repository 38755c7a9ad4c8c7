"""What docs/results.md claims, each claim with the numbers of its rows: a claim without a row is `not measured`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.pages import committed
from benchmarks.pages.committed import NOT_MEASURED, Row, load
from bilevel_fast.base.tables import markdown


@dataclass(frozen=True)
class Claim:
    """A sentence, and what holds it.

    Attributes:
        text: The sentence.
        rows: Reads the rows: a flat object each.
        file: Below benchmarks/results.
        shown: (field that names the row, its value, field of the number, decimals), in the order of the sentence.
    """

    text: str
    rows: Callable[[str], list[Row]]
    file: str
    shown: Sequence[tuple[str, str, str, int]]

    def line(self) -> tuple[str, str, str]:
        """Claim, numbers and rows: the mean over seeds where there are several."""
        rows, cells = self.rows(self.file), []
        for field, name, number, digits in self.shown:
            values = [row[number] for row in rows if row.get(field) == name and row.get(number) is not None]
            cells.append(f"{mean(values):.{digits}f}" if values else NOT_MEASURED)
        where = dict.fromkeys(f"`{field}` {name}" for field, name, _, _ in self.shown)
        fields = ", ".join(dict.fromkeys(f"`{number}`" for _, _, number, _ in self.shown))
        return self.text, ", ".join(cells), f"{self.file}: {'; '.join(where)}; {fields}"


def judged(file: str) -> list[Row]:
    """What the last run of `make train` came to, a row for each model."""
    rows = load(file)
    return [{"model": name, **found} for name, found in rows[-1]["summary"]["quality"].items()] if rows else []


def reproduced(file: str) -> list[Row]:
    """Rows of a kept experiment of the paper."""
    path = committed.RESULTS / file
    if not path.exists():
        return []
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return [{"label": row["label"], **row["numbers"]} for row in found["rows"]]


TABLE1, TABLE2 = "reproduce/table1/results.json", "reproduce/table2/results.json"

CLAIMS = (
    Claim(
        "The teacher draws the style on all of its prompts, the student on none.",
        judged, "train_cpu.jsonl",
        (("model", "teacher", "concept_hit", 2), ("model", "student", "concept_hit", 2)),
    ),
    Claim(
        "Suppression inside the loop costs no FID against distillation alone; ESD after distillation does.",
        reproduced, TABLE1,
        (("label", "distilled", "fid", 2), ("label", "bilevel", "fid", 2), ("label", "distilled + ESD", "fid", 2)),
    ),
    Claim(
        "UCE suppresses by drawing another style; the loop draws the prompts plain, in percent, as its anchor asks.",
        reproduced, TABLE1,
        (("label", "distilled + UCE", "plain", 1), ("label", "bilevel", "plain", 1)),
    ),
    Claim(
        "ConceptPrune at the paper's 1 % does not suppress on the mini world.",
        reproduced, TABLE1,
        (("label", "distilled + ConceptPrune", "concept_hit", 2),),
    ),
    Claim(
        "An attacker who has the weights gets the style back from every two-stage student; the loop keeps back a part.",
        reproduced, TABLE2,
        (
            ("label", "distilled + ESD", "inversion", 1), ("label", "distilled + UCE", "inversion", 1),
            ("label", "bilevel", "inversion", 1),
        ),
    ),
    Claim(
        "The phrase anchor with a gradient-normalised lambda of 1 suppresses; lambda 10 leaves a part of the style; "
        "the paper's raw lambda of 100 leaves all of it.",
        load, "frontier.jsonl",
        (
            ("case", "bilevel phrase grad 1", "concept_hit", 2), ("case", "bilevel phrase grad 10", "concept_hit", 2),
            ("case", "bilevel phrase raw 100", "concept_hit", 2),
        ),
    ),
    Claim(
        "The null anchor of the authors' code does not suppress within these 30 upper steps.",
        load, "frontier.jsonl",
        (("case", "bilevel null grad 1", "concept_hit", 2),),
    ),
    Claim(
        "Two-stage suppression loses half of the other styles.",
        load, "frontier.jsonl",
        (("case", "two-stage phrase", "concept_hit", 2), ("case", "two-stage phrase", "other_style_hit", 2)),
    ),
)  # fmt: skip


def claims() -> str:
    """A line for each claim."""
    head = ("claim", "numbers", "row in benchmarks/results")
    return markdown(head, [claim.line() for claim in CLAIMS])
