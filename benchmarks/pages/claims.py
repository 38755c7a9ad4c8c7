"""What docs/results.md claims, each claim with what its rows say of it: a claim without a row is `not measured`.

holds            the numbers are as the sentence says
does not hold    they say the opposite
cannot be seen   they differ by less than such samples can tell, or not the same way on every seed; of what should cost
                 nothing that is enough, and it holds
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.pages import committed
from benchmarks.pages.committed import NOT_MEASURED, Row, load
from bilevel_fast.base.tables import markdown

HOLDS, FAILS, UNSEEN = "holds", "does not hold", "cannot be seen"
TELLS = 0.7
"""Two FIDs of 180 samples that differ by less are alike: what the frontier's equal students spread over a seed."""

Values = Sequence[Sequence[float]]
"""Of each number of a claim, its values, seed by seed."""
Verdict = Callable[[Values], str]


def near(wanted: float, off: float = 0.05) -> Verdict:
    """The mean of the last number is what is claimed."""
    return lambda values: HOLDS if abs(mean(values[-1]) - wanted) <= off else FAILS


def at_least(wanted: float) -> Verdict:
    """The mean of the last number reaches what is claimed."""
    return lambda values: HOLDS if mean(values[-1]) >= wanted else FAILS


def less(values: Values) -> str:
    """The last number lies below the first on all of several seeds, by more than FIDs tell; or above."""
    first, last = values[0], values[-1]
    gaps = [a - b for a, b in zip(first, last, strict=False)]
    if len(gaps) < 2 or abs(mean(gaps)) <= TELLS or not (min(gaps) > 0 or max(gaps) < 0):
        return UNSEEN
    return HOLDS if min(gaps) > 0 else FAILS


def above(values: Values) -> str:
    """The last share lies above the first on all of several seeds; or below."""
    gaps = [b - a for a, b in zip(values[0], values[-1], strict=True)]
    return UNSEEN if len(gaps) < 2 or min(gaps) <= 0 <= max(gaps) else HOLDS if min(gaps) > 0 else FAILS


def below(values: Values) -> str:
    """The last share lies below the first on all of several seeds; or above."""
    return above(values[::-1])


def no_more(values: Values) -> str:
    """The last number does not lie above the first on all of several seeds by more than FIDs tell."""
    found = less(values[::-1])
    return {HOLDS: FAILS}.get(found, HOLDS) if len(values[0]) > 1 else UNSEEN


def keeps(values: Values) -> str:
    """The mean of the last share is at most 0.03 below that of the first."""
    return HOLDS if mean(values[-1]) >= mean(values[0]) - 0.03 else FAILS


@dataclass(frozen=True)
class Claim:
    """A sentence, and what holds it.

    Attributes:
        text: The sentence.
        verdict: What the numbers say of it.
        rows: Reads the rows: a flat object each, seed by seed.
        file: Below benchmarks/results.
        command: Makes the rows.
        shown: (field that names the row, its value, field of the number, decimals), in the order of the sentence.
    """

    text: str
    verdict: Verdict
    rows: Callable[[str], list[Row]]
    file: str
    command: str
    shown: Sequence[tuple[str, str, str, int]]

    def line(self) -> tuple[str, str, str, str]:
        """Claim, verdict, numbers and rows: the mean over the seeds that all numbers have."""
        rows = self.rows(self.file)
        found = [
            {row.get("seed"): row[number] for row in rows if row.get(field) == name and row.get(number) is not None}
            for field, name, number, _ in self.shown
        ]
        seeds = set.intersection(*map(set, filter(None, found))) if any(found) else set()
        found = [[values[seed] for seed in values if seed in seeds] for values in found]
        digits = [digits for *_, digits in self.shown]
        cells = [f"{mean(some):.{n}f}" if some else NOT_MEASURED for some, n in zip(found, digits, strict=True)]
        where = dict.fromkeys(f"`{field}` {name}" for field, name, _, _ in self.shown)
        fields = ", ".join(dict.fromkeys(f"`{number}`" for _, _, number, _ in self.shown))
        verdict = self.verdict(found) if all(found) else NOT_MEASURED
        source = f"{self.file}: {'; '.join(where)}; {fields}; `{self.command}`"
        return self.text, verdict, ", ".join(cells), source


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
    return [{"label": row["label"], "seed": row["seed"], **row["numbers"]} for row in found["rows"]]


def rivals(*plans: str) -> Callable[[str], list[Row]]:
    """Rows of some plans of the rivals, in the order of their seeds, with the mean cosine of both gradients."""

    def read(file: str) -> list[Row]:
        rows = sorted((row for row in load(file) if row["plan"] in plans), key=lambda row: row["seed"])
        return [{**row, "cosine": mean(row["cosines"]) if row.get("cosines") else None} for row in rows]

    return read


def attacked(file: str) -> list[Row]:
    """What attacks got back: a row for each student, seed and strength."""
    rows = rivals("attack")(file)
    return [
        {"case": f"{row['case']} {_named(found)}", "seed": row["seed"], **found}
        for row in rows
        for found in row["got_back"]
    ]


def _named(found: Row) -> str:
    return f"{found['attack']} {found['steps']}" if "steps" in found else f"vector {found['strength']:g}"


def fid(*cases: str) -> tuple[tuple[str, str, str, int], ...]:
    """FID of some students, in this order."""
    return tuple(("case", case, "fid", 2) for case in cases)


TABLE1, TABLE2, RIVALS = "reproduce/table1/results.json", "reproduce/table2/results.json", "rivals.jsonl"
REPRODUCE, FRONTIER = "python -m bilevel_fast.reproduce table1", "python -m benchmarks.quality.frontier run"
RUN, ATTACK = "python -m benchmarks.quality.rivals run", "python -m benchmarks.quality.rivals attack"


def _figure(name: str) -> tuple[str, str]:
    """Where an experiment of the paper on the emoji world is kept, and what makes it."""
    return f"reproduce-emoji/{name}/results.json", f"python -m bilevel_fast.reproduce {name} --world emoji --seeds 0"


def _of_the_emoji_world() -> tuple[Claim, ...]:
    """Where three of the styles draw alike, and one of them is erased."""
    make, rows = f"{RUN} 'emoji tuning' emoji 'emoji solvers'", rivals("emoji", "emoji solvers")

    def claim(text: str, verdict: Verdict, *shown: tuple[str, str, str, int]) -> Claim:
        return Claim(text, verdict, rows, RIVALS, make, shown)

    def other(text: str, verdict: Verdict, *shown: tuple[str, str, str, int]) -> Claim:
        return Claim(text, verdict, rivals("emoji other"), RIVALS, f"{RUN} 'emoji other'", shown)

    def share(case: str, key: str) -> tuple[str, str, str, int]:
        return "case", case, key, 2

    return (
        claim(
            "On the emoji world, too, the loop's student draws the erased studio on none of its prompts.",
            near(0.0), share("distilled", "concept_hit"), share("bilevel", "concept_hit"),
        ),
        claim(
            "There it leaves the relatives as they were (share of their prompts drawn so).",
            keeps, share("distilled", "relative_hit"), share("bilevel", "relative_hit"),
        ),
        claim("There, too, it costs no FID against distillation alone.", no_more, *fid("distilled", "bilevel")),
        claim(
            "There it leaves less of the studio than two stages with replay, each at its rate of least miss.",
            below, share("two-stage, replay", "concept_hit"), share("bilevel", "concept_hit"),
        ),
        claim(
            "There it leaves less of the studio than one level, which sees as many concept images.",
            below, share("one level", "concept_hit"), share("bilevel", "concept_hit"),
        ),
        claim(
            "There it keeps more of the relatives than two stages with replay.",
            above, share("two-stage, replay", "relative_hit"), share("bilevel", "relative_hit"),
        ),
        claim("There its FID is below that of two stages with replay.", less, *fid("two-stage, replay", "bilevel")),
        claim("There its FID is below that of one level.", less, *fid("one level", "bilevel")),
        claim("There BOME costs no FID against the tuned lambda.", no_more, *fid("bilevel", "bome")),
        claim("There a lambda that moves has a lower FID than a constant one.", less, *fid("bilevel", "schedule")),
        claim(
            "There MEHA, the solver that costs most, leaves less of the studio than BOME.",
            below, share("bome", "concept_hit"), share("meha", "concept_hit"),
        ),
        claim("There its FID is below BOME's.", less, *fid("bome", "meha")),
        claim("There the controller, with more upper steps, has a lower FID.", less, *fid("bilevel", "controller")),
        claim(
            "There the controller leaves no more of the studio.",
            lambda values: keeps(values[::-1]), share("bilevel", "concept_hit"), share("controller", "concept_hit"),
        ),
        claim(
            "There the controller has a lower FID than a constant lambda with K 3, which is as many upper steps.",
            less, *fid("bilevel, K 3", "controller"),
        ),
        claim(
            "There the gradients of both levels have a cosine below 0.",
            lambda values: HOLDS if mean(values[-1]) < -0.05 else FAILS, share("bilevel", "cosine"),
        ),
        other(
            "With twemoji erased in place of noto, the loop leaves less of it than two stages with replay.",
            below, share("two-stage, replay", "concept_hit"), share("bilevel", "concept_hit"),
        ),
        other(
            "It leaves less of it than one level.",
            below, share("one level", "concept_hit"), share("bilevel", "concept_hit"),
        ),
        other(
            "It leaves twemoji's relatives as they were.",
            keeps, share("distilled", "relative_hit"), share("bilevel", "relative_hit"),
        ),
        other("It costs no FID against distillation alone.", no_more, *fid("distilled", "bilevel")),
        Claim(
            "Pruned weights matter: from random ones of that shape FID is above 100 after as many steps (one seed).",
            at_least(100.0), reproduced, *_figure("fig5"),
            (("label", "pruned weights", "fid", 1), ("label", "random weights", "fid", 1)),
        ),
        Claim(
            "Diffusion loss and distillation together have a lower FID than the diffusion loss alone (one seed).",
            less, reproduced, *_figure("fig4"),
            (("label", "the diffusion loss alone", "fid", 1), ("label", "both", "fid", 1)),
        ),
    )  # fmt: skip


def _elsewhere(plan: str, gone: str) -> tuple[Claim, ...]:
    """What is claimed of the mini world, where one thing is another; `gone` says which."""

    def claim(text: str, verdict: Verdict, *shown: tuple[str, str, str, int]) -> Claim:
        return Claim(text, verdict, rivals(plan), RIVALS, f"{RUN} {plan}", shown)

    hits = ("case", "distilled", "concept_hit", 2), ("case", "bilevel", "concept_hit", 2)
    return (
        claim(gone, near(0.0), *hits),
        claim("There it costs no FID against distillation alone.", no_more, *fid("distilled", "bilevel")),
        claim("There its FID is below that of two stages with replay.", less, *fid("two-stage, replay", "bilevel")),
    )


CLAIMS = (
    Claim(
        "The teacher draws the style on all of its prompts, the student on none.",
        near(0.0), judged, "train_cpu.jsonl", "make train",
        (("model", "teacher", "concept_hit", 2), ("model", "student", "concept_hit", 2)),
    ),
    Claim(
        "Suppression inside the loop costs no FID against distillation alone.",
        no_more, rivals("main"), RIVALS, f"{RUN} main", fid("distilled", "bilevel"),
    ),
    Claim(
        "Suppression and recovery undo each other, as the paper argues: their gradients have a cosine below 0.",
        lambda values: HOLDS if mean(values[-1]) < -0.05 else FAILS, rivals("main"), RIVALS, f"{RUN} main",
        (("case", "bilevel", "cosine", 2),),
    ),
    Claim(
        "The loop's FID is below that of two stages with the same budget, the second with replay and at its best rate.",
        less, rivals("main"), RIVALS, f"{RUN} main", fid("two-stage, replay", "bilevel"),
    ),
    Claim(
        "It brings more of the erased prompts to their anchor (share drawn plain) than those two stages.",
        above, rivals("main"), RIVALS, f"{RUN} main",
        (("case", "two-stage, replay", "plain", 2), ("case", "bilevel", "plain", 2)),
    ),
    Claim(
        "Its FID is below that of two stages that are repaired by as many lower steps.",
        less, rivals("main"), RIVALS, f"{RUN} main", fid("two-stage, repair", "bilevel"),
    ),
    Claim(
        "Its FID is below that of one level: one AdamW on the sum of both losses.",
        less, rivals("main"), RIVALS, f"{RUN} main", fid("one level", "bilevel"),
    ),
    Claim(
        "BOME, which has no lambda, costs no FID against the tuned lambda.",
        no_more, rivals("main"), RIVALS, f"{RUN} main", fid("bilevel", "bome"),
    ),
    Claim(
        "A lambda that rises, the best schedule of three, has a lower FID than a constant one.",
        less, rivals("main", "solvers"), RIVALS, f"{RUN} main tuning-2 solvers", fid("bilevel", "schedule"),
    ),
    Claim(
        "MEHA, which descends the lower loss's Moreau envelope, costs no FID against the tuned lambda.",
        no_more, rivals("main", "solvers"), RIVALS, f"{RUN} main tuning-4 solvers", fid("bilevel", "meha"),
    ),
    *_of_the_emoji_world(),
    Claim(
        "With 0.55 of the MACs the loop's FID is below that of two stages with replay.",
        less, rivals("tight"), RIVALS, f"{RUN} tight", fid("two-stage, replay", "bilevel"),
    ),
    *_elsewhere("other", "With another style erased, waves, the loop leaves none of it."),
    *_elsewhere("expert", "From an APTP expert, which is what the paper prunes to, it leaves none of the style."),
    Claim(
        "ESD as the upper step has a lower FID than ESD in a second stage with replay, at its best rate.",
        less, rivals("esd"), RIVALS, f"{RUN} tuning-3 esd", fid("two-stage ESD, replay", "bilevel, ESD inside"),
    ),
    Claim(
        "The controller, which chooses lambda and K, has a lower FID than both as they are set.",
        less, load, "controller.jsonl", "python -m benchmarks.quality.controller run",
        fid("lambda 1 K 4", "controller from lambda 1 K 4"),
    ),
    Claim(
        "Without penalty, replay or repair the second stage loses half of the other styles.",
        near(0.5), load, "frontier.jsonl", FRONTIER,
        (("case", "two-stage phrase", "concept_hit", 2), ("case", "two-stage phrase", "other_style_hit", 2)),
    ),
    Claim(
        "ESD after distillation, without replay, costs FID.",
        less, reproduced, TABLE1, REPRODUCE,
        (("label", "distilled + ESD", "fid", 2), ("label", "distilled", "fid", 2)),
    ),
    Claim(
        "UCE suppresses by drawing another style, the loop draws the prompts plain, in percent, as its anchor asks.",
        at_least(80.0), reproduced, TABLE1, REPRODUCE,
        (("label", "distilled + UCE", "plain", 1), ("label", "bilevel", "plain", 1)),
    ),
    Claim(
        "That is the method's doing: UCE over all tokens that differ from the anchor's does not draw them plain.",
        near(0.0), rivals("closed"), RIVALS, f"{RUN} closed",
        (("case", "uce, all tokens", "plain", 2),),
    ),
    Claim(
        "But it costs FID.",
        less, rivals("main", "closed"), RIVALS, f"{RUN} closed", fid("uce, all tokens", "distilled"),
    ),
    Claim(
        "ConceptPrune at the paper's 1 % does not suppress on the mini world.",
        at_least(0.95), reproduced, TABLE1, REPRODUCE,
        (("label", "distilled + ConceptPrune", "concept_hit", 2),),
    ),
    Claim(
        "An attacker who has the weights gets the style back from students of ESD and UCE within 60 steps of search; "
        "the loop keeps back a part (percent removed).",
        at_least(10.0), reproduced, TABLE2, "python -m bilevel_fast.reproduce table2",
        (
            ("label", "distilled + ESD", "inversion", 1), ("label", "distilled + UCE", "inversion", 1),
            ("label", "bilevel", "inversion", 1),
        ),
    ),
    Claim(
        "That is the loop's doing: two stages of its eraser, with replay, show the style on more of the prompts then.",
        below, attacked, RIVALS, ATTACK,
        (("case", "two-stage, replay inversion 60", "hit", 2), ("case", "bilevel inversion 60", "hit", 2)),
    ),
    Claim(
        "It still keeps back a part after 240 steps (share of the prompts that show the style, by steps).",
        lambda values: HOLDS if mean(values[-1]) < 0.9 else FAILS, attacked, RIVALS, ATTACK,
        tuple(("case", f"bilevel inversion {steps}", "hit", 2) for steps in (60, 120, 240)),
    ),
    Claim(
        "A gradient-normalised lambda of 1 suppresses; lambda 10 leaves a part of the style; the paper's raw lambda of "
        "100 leaves all of it.",
        at_least(0.95), load, "frontier.jsonl", FRONTIER,
        (
            ("case", "bilevel phrase grad 1", "concept_hit", 2), ("case", "bilevel phrase grad 10", "concept_hit", 2),
            ("case", "bilevel phrase raw 100", "concept_hit", 2),
        ),
    ),
    Claim(
        "The null anchor of the authors' code does not suppress within these 30 upper steps.",
        at_least(0.95), load, "frontier.jsonl", FRONTIER,
        (("case", "bilevel null grad 1", "concept_hit", 2),),
    ),
    Claim(
        "Nor does it at 10 times the upper learning rate, 5 times the lower one, as in the paper.",
        at_least(0.95), rivals("null"), RIVALS, f"{RUN} null",
        (("case", "null anchor, lr x 10", "concept_hit", 2),),
    ),
)  # fmt: skip


def claims() -> str:
    """A line for each claim."""
    head = ("claim", "", "numbers", "row in benchmarks/results, and what makes it")
    return markdown(head, [claim.line() for claim in CLAIMS])
