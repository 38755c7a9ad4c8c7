"""The tables of docs/results.md and docs/emoji.md: what students are worth, on each built-in world."""

from collections.abc import Callable

from benchmarks.pages import committed, reproduced
from benchmarks.pages.claims import claims
from benchmarks.pages.committed import NOT_MEASURED, load, machines
from benchmarks.quality import precision, rival_tables, sequence, tables


def quality() -> str:
    """What the run came to."""
    rows = load("train_cpu.jsonl")
    if not rows:
        return NOT_MEASURED
    found = rows[-1]["summary"]["quality"]
    lines = ["| | " + " | ".join(tables.QUALITY) + " |", "|---|" + "--:|" * len(tables.QUALITY)]
    for name, values in found.items():
        lines.append(f"| {name} | " + " | ".join(f"{values[m]:.3f}" for m in tables.QUALITY) + " |")
    return "\n".join(lines)


def methods() -> str:
    """Pruning methods, before and after distillation."""
    rows = load("methods.jsonl")
    return tables.methods(rows) if rows else NOT_MEASURED


def aptp() -> str:
    """Mixtures of experts: what they cost, where prompts go, what they are worth untuned."""
    rows = load("aptp.jsonl")
    if not rows:
        return NOT_MEASURED
    methods = list(rows[-1]["errors"])
    heads = ("budget", "training", "experts' MACs", "prompts", "style / object / color", *methods)
    lines = ["| " + " | ".join(heads) + " |", "|---|--:|---|---|---|" + "--:|" * len(methods)]
    for row in rows:
        experts, told = (
            row["experts"],
            " / ".join(f"{row['told_by'][name]:.2f}" for name in ("style", "object", "color")),
        )
        macs = ", ".join(f"{expert['macs']:.4f}" for expert in experts)
        prompts = ", ".join(str(expert["prompts"]) for expert in experts)
        cells = [row["case"], f"{row['seconds']:.0f} s", macs, prompts, told]
        lines.append("| " + " | ".join([*cells, *(f"{row['errors'][m]:.3f}" for m in methods)]) + " |")
    return "\n".join([*lines, "", machines(rows)])


def rivals(world: str) -> Callable[[], str]:
    """The loop against rivals, tuned and with the same budget."""
    return lambda: rival_tables.report(load("rivals.jsonl"), world)


def sequenced() -> str:
    """Studios erased one after the other."""
    rows = load("sequence.jsonl")
    return f"{sequence.table(rows)}\n\n{machines(rows)}" if rows else NOT_MEASURED


def controller() -> str:
    """The controller against a sweep: the cases that were run on every seed; `controller report` shows the rest."""
    rows = load("controller.jsonl")
    seeds = {row["seed"] for row in rows}
    cases = {row["case"]: {other["seed"] for other in rows if other["case"] == row["case"]} for row in rows}
    return tables.controller([row for row in rows if cases[row["case"]] == seeds])


def bf16() -> str:
    """bf16 against fp32, in a sentence or two."""
    rows = load("precision.jsonl")
    cosines = [row for row in rows if row["metric"] == "cosine"]
    if not cosines:
        return NOT_MEASURED
    least = min(cosines, key=lambda row: row["value"])
    text = (
        f"The least cosine between a gradient in bf16 and in fp32, over both levels and all classes of parameters, is "
        f"{least['value']:.5f} (`{least['case'].removeprefix('gradient ')}`; wanted {precision.COSINE})."
    )
    judged = [row for row in rows if row["case"].startswith("quality")]
    if not judged:
        return f"{text} What {precision.STEPS} steps lead to: not measured.\n{machines(cosines)}"
    seeds = sorted({row["case"].split()[-1] for row in judged})
    lines = [text, "", f"| {judged[0]['steps']} lower steps | seed | " + " | ".join(tables.QUALITY) + " |"]
    lines.append("|---|--:|" + "--:|" * len(tables.QUALITY))
    found = {(row["case"], row["metric"]): row["value"] for row in judged}
    for seed in seeds:
        for name in precision.PRECISIONS:
            cells = [f"{found[f'quality {name} seed {seed}', metric]:.3f}" for metric in tables.QUALITY]
            lines.append(f"| {name} | {seed} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", machines(rows)])


def kept(name: str, world: str = "mini") -> Callable[[], str]:
    """An experiment of the paper on a built-in world."""
    return lambda: reproduced.markdown(name, reproduced.place_of(world, committed.RESULTS))


TABLES: dict[str, Callable[[], str]] = {
    "claims": claims,
    "quality": quality,
    "table1": kept("table1"),
    "table2": kept("table2"),
    "fig6": kept("fig6"),
    "frontier": lambda: tables.frontier(load("frontier.jsonl")),
    "rivals": rivals("mini"),
    "controller": controller,
    "methods": methods,
    "aptp": aptp,
    "bf16": bf16,
}

EMOJI: dict[str, Callable[[], str]] = {
    **{f"emoji-{name}": kept(name, "emoji") for name in ("table1", "table2", "table3", "fig4", "fig5", "fig6", "fig7")},
    "emoji-rivals": rivals("emoji"),
    "emoji-sequence": sequenced,
}
