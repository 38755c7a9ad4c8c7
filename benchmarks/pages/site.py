"""All benchmarks on one page, in one file, from the committed rows:

    python -m benchmarks.pages.site                       writes benchmarks.html
    python -m benchmarks.pages.site --out /tmp/a.html

Its tables are those of README.md and docs/; each says where it was measured, and the command that measures it again.
What no machine has measured is `not measured`, and what a model of a machine says is a projection and looks like one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pages import bars, committed, performance, results
from benchmarks.pages.committed import NOT_MEASURED, load, machines
from benchmarks.pages.rendered import inline, rendered
from bilevel_fast.base import errors, flags
from bilevel_fast.base.files import write_atomic
from bilevel_fast.runs.page import document
from bilevel_fast.runs.page.document import Html, code, join, note, section, tag

_QUANTILES = "Brackets, and the bars about a dot, are 20 % and 80 % quantiles over interleaved repeats."


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
        chart: Of the same rows, if one helps.
        rows: The file of rows, whose machine, commit and date are named where `text` does not say them.
    """

    title: str
    says: str
    command: str
    text: Callable[[], str]
    chart: Callable[[], Html] | None = None
    rows: str = ""

    def html(self) -> Html:
        """Title, chart, table, machine, command."""
        text = self.text()
        parts = [tag("h3", self.title), tag("p", inline(self.says))]
        if self.chart is not None:
            parts.append(self.chart())
        parts.append(rendered(text, self.title))
        if self.rows:
            parts.append(note(where(load(self.rows))))
        return join([*parts, code(self.command)])


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
        bars.steps,
    ),
    Table(
        "Forward passes of Stable Diffusion 2.1 on a CPU",
        "Random weights, 64 x 64 latents, fp32, one image. Promised is what the MACs promise over the dense UNet.",
        "make real-size",
        performance.forward,
        bars.forward,
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
        rows="baseline.jsonl",
    ),
)
PROJECTIONS = (
    Table(
        "What a step takes at least",
        "16 images, Stable Diffusion 2.1 at 512 pixels in bf16: the sum over all ops of max(FLOPs / best published "
        "rate, bytes / bandwidth). From matrix products alone to all ops with our Triton kernels: a floor.",
        "python -m benchmarks.counts.roofline",
        performance.projections,
        bars.projected,
        rows="roofline.jsonl",
    ),
    Table(
        "The most images computed at once",
        "From bytes counted storage by storage on the meta device. A larger batch is computed in parts.",
        "python -m benchmarks.counts.memory",
        performance.memory,
        rows="memory.jsonl",
    ),
)
QUALITY = (
    Table(
        "One style suppressed, against two-stage methods",
        "Students of the same pruned start, the same lower steps and the same number of upper steps; ± is half the "
        "range over the seeds. Each share is of 36 images of the erased style, or 180 of the others, for each seed.",
        "python -m bilevel_fast.reproduce table1",
        results.TABLES["table1"],
        bars.suppressed,
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
        rows="frontier.jsonl",
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


def page() -> str:
    """The whole page."""
    on_gpu = performance.gpu()
    measured = on_gpu != NOT_MEASURED
    gpu = rendered(on_gpu, "On a GPU") if measured else tag("p", tag("strong", "GPU: not measured."), class_="warn")
    more = "" if measured else note("The projections below are models of a GPU, not measurements of one.")
    parts: Iterable[Html] = (
        document.tiles(bars.tiles()),
        section("GPU", gpu, more, code("OUT=results bash benchmarks/gpu.sh")),
        section("Speed", note(_QUANTILES), *(each.html() for each in SPEED)),
        section("Counts", *(each.html() for each in COUNTS)),
        section("Projections, not measurements", *(each.html() for each in PROJECTIONS)),
        section("Quality on the mini world", *(each.html() for each in QUALITY)),
    )
    lead = (
        "Speed, counts, projections and quality of bilevel_fast; every number is a committed row of benchmarks/results."
    )
    return document.page(
        "Benchmarks of bilevel_fast", *parts, lead=lead, footer="Made by python -m benchmarks.pages.site."
    )


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.pages.site", __doc__)
    write_atomic(settings.out, page().encode())
    print(settings.out)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
