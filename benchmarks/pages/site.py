"""All benchmarks on one page, in one file, from the committed rows:

    python -m benchmarks.pages.site                       writes benchmarks.html
    python -m benchmarks.pages.site --out /tmp/a.html

Its tables are those of README.md and docs/; each says where it was measured, and the command that measures it again.
What no machine has measured is `not measured`, and what a model of a machine says is a projection and looks like one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pages import committed, performance, readme, results
from benchmarks.pages.committed import NOT_MEASURED, load, machines
from benchmarks.pages.rendered import Bars, inline, rendered
from bilevel_fast.base import errors, flags
from bilevel_fast.base.files import write_atomic
from bilevel_fast.runs.page import document
from bilevel_fast.runs.page.document import Html, code, join, note, section, tag, unit
from bilevel_fast.runs.page.quality import percent

_QUANTILES = (
    "The range below a number, and about its dot, is from the 20 % to the 80 % quantile of interleaved repeats."
)


@dataclass(frozen=True)
class Settings:
    """Settings of the page."""

    out: Path = Path("benchmarks.html")
    """The file to write."""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        title: Above it.
        says: What it compares.
        command: Measures it again.
        text: Its Markdown.
        bars: What of it is drawn as well.
        rows: The file and the suites of its rows, whose machine, commit and date `text` does not say, or in part.
    """

    title: str
    says: str
    command: str
    text: Callable[[], str]
    bars: Bars | None = None
    rows: tuple[str, ...] = ()

    def html(self) -> Html:
        """Title, table, machine, command."""
        text, measured = self.text(), ""
        if self.rows:
            file, *suites = self.rows
            found = [row for row in load(file) if row["suite"] in suites]
            lines = [line for line in text.splitlines() if not line.startswith("Measured on")]
            text, measured = ("\n".join(lines), where(found)) if found else (NOT_MEASURED, "")
        parts = [tag("h3", self.title), tag("p", inline(self.says)), rendered(text, self.title, self.bars)]
        return join([*parts, note(measured) if measured else "", code(self.command)])


def where(rows: Sequence[committed.Row]) -> str:
    """Machine, commit and date of rows; of counts and projections, which no machine measures, the last two."""
    timed = [row for row in rows if row.get("threads") is not None]
    if timed:
        return machines(timed)
    made = sorted({f"commit {row['commit']}, {row['date']}" for row in rows if row.get("commit")})
    return f"Computed, on any machine the same: {'; '.join(made)}." if made else ""


SPEED = (
    Table(
        "Training steps on a CPU",
        "Ours against the same steps through diffusers: the same pruned student, noise and weights, in turns.",
        "python -m benchmarks.speed.step --device cpu --ladder",
        performance.step,
        Bars(("lower step", "upper step"), mark=1.0),
    ),
    Table(
        "Forward passes of Stable Diffusion 2.1 on a CPU",
        "Random weights, 64 x 64 latents, fp32, one image. Promised is what the MACs promise over the dense UNet.",
        "make real-size",
        performance.forward,
        Bars(("ours", "diffusers", "ours against diffusers"), mark=1.0),
    ),
    Table(
        "Native kernels on a CPU",
        "At the mini world's sizes; every case is in kernels/README.md.",
        "python -m benchmarks.kernels.sweep --batch 16",
        performance.kernels,
    ),
    Table(
        "Data on a CPU",
        "JPEGs to pixels of 512 x 512, and batches from a cache of 64 x 64 latents.",
        "python -m benchmarks.speed.data",
        performance.data,
    ),
    Table(
        "Every command at the size of Stable Diffusion 2.1",
        "On random weights: seconds and memory, against the limits that each has.",
        "make real-size",
        performance.real_size,
    ),
)
COUNTS = (
    Table(
        "MACs, parameters, launches",
        "The UNet of Stable Diffusion 2.1, one image of 64 x 64 latents, 77 tokens; launches are of a step of 16.",
        "python -m benchmarks.counts.macs --model sd21 --latent 64 --text 77",
        performance.counts,
        rows=("baseline.jsonl", "macs", "launches"),
    ),
)
PROJECTIONS = (
    Table(
        "What a step takes at least",
        "16 images, Stable Diffusion 2.1 at 512 pixels in bf16: the sum over all ops of max(FLOPs / best published "
        "rate, bytes / bandwidth). From matrix products alone to all ops with our Triton kernels: a floor.",
        "python -m benchmarks.counts.roofline",
        performance.projections,
        Bars(("lower, 0.80", "upper, 0.80", "upper without penalty, 0.80", "lower, 0.55"), projection=True),
        rows=("roofline.jsonl", "roofline"),
    ),
    Table(
        "The most images computed at once",
        "From bytes counted storage by storage on the meta device. A larger batch is computed in parts.",
        "python -m benchmarks.counts.memory",
        performance.memory,
        rows=("memory.jsonl", "memory"),
    ),
)
QUALITY = (
    Table(
        "One style suppressed, against two-stage methods",
        "Students of the same pruned start, the same lower steps and the same number of upper steps; ± is half the "
        "range over the seeds. Each share is of 36 images of the erased style, or 180 of the others, for each seed.",
        "python -m bilevel_fast.reproduce table1",
        results.TABLES["table1"],
        Bars(("FID (down)",)),
    ),
    Table(
        "The same models under attack",
        "Percent of 36 held-out prompts that do not show the style, for each seed.",
        "python -m bilevel_fast.reproduce table2",
        results.TABLES["table2"],
    ),
    Table(
        "What is lost for what is suppressed",
        "Variants are bilevel ANCHOR NORM LAMBDA.",
        "python -m benchmarks.quality.frontier run --seed 0",
        results.TABLES["frontier"],
        rows=("frontier.jsonl", "frontier"),
    ),
    Table(
        "Pruning methods",
        "Before and after distillation without suppression.",
        "python -m benchmarks.quality.methods run --budget 0.8",
        results.methods,
    ),
    Table(
        "bf16 against fp32",
        "On a CPU that computes in bf16.",
        "python -m benchmarks.quality.precision table",
        results.bf16,
    ),
)


def tiles() -> Iterable[tuple[str, str, object]]:
    """The numbers that a reader wants first; only those that were measured."""
    steps, forward = performance.ratios(), readme.forward_rows()
    if row := steps.get(("released", "lower")):
        yield "Lower step", unit(f"{row['value']:.2f}", "times"), "as fast as diffusers as released; CPU, mini world"
    if row := steps.get(("eager", "lower")):
        yield "Lower step", unit(f"{row['value']:.2f}", "times"), "as fast as diffusers used with care; CPU, mini world"
    if row := forward.get(("0.80", "realised_speedup")):
        promised = readme.promise(forward, "0.80")
        about = f"as fast as the dense UNet of SD 2.1; its MACs promise {promised:.2f}"
        yield "UNet of 0.80 MACs", unit(f"{row['value'] * promised:.2f}", "times"), about
    if rows := load("train_cpu.jsonl"):
        quality = rows[-1]["summary"]["quality"]
        about = f"teacher {percent(quality['teacher']['concept_hit'])}; mini world, seed 0, 36 images"
        yield "Erased style drawn", percent(quality["student"]["concept_hit"]), about


def page() -> str:
    """The whole page."""
    parts: Iterable[Html] = (
        *_gpu(),
        document.tiles(tiles()),
        section("Speed", note(_QUANTILES), *(each.html() for each in SPEED)),
        section("Counts", *(each.html() for each in COUNTS)),
        section("Projections, not measurements", *(each.html() for each in PROJECTIONS)),
        section("Quality on the mini world", *(each.html() for each in QUALITY)),
    )
    lead = "Speed, counts, projections and quality; every number comes from a committed row of benchmarks/results."
    foot = "Made by python -m benchmarks.pages.site."
    return document.page("Benchmarks of bilevel_fast", *parts, lead=lead, footer=foot)


def _gpu() -> Iterable[Html]:
    command = "OUT=results bash benchmarks/gpu.sh"
    if (found := performance.gpu()) != NOT_MEASURED:
        yield section("GPU", rendered(found, "On a GPU"), code(command))
    else:
        says = inline(f"What is said of GPUs below is a model of them. `{command}` measures.")
        yield tag("p", tag("strong", "GPU: not measured. ", class_="warn"), says)


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.pages.site", __doc__)
    write_atomic(settings.out, page().encode())
    print(settings.out)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
