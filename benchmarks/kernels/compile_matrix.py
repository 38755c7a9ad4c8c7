"""Every kernel, as its launcher ships it, compiled for every card: what ptxas made of it. Needs no GPU.

    python -m benchmarks.kernels.compile_matrix            compile and print
    python -m benchmarks.kernels.compile_matrix --check    fails on a row worse than the committed table, or not in it
    python -m benchmarks.kernels.compile_matrix --write    replaces this triton's rows in the table, or those of --op
    python -m benchmarks.kernels.compile_matrix --check --one-card    what CI has time for

The launches are those of the benchmark cases at batch 2: SD 2.1 at 512 px, dense and at 0.55 of its units, heads of SD
1.x, and in bf16 what SDXL at 1024 px adds to them. A few in fp16, with TF32 and at batch 16 as well, each launch for
one card.
A row is worse if it spills, needs more shared memory than the card has, computes in fp64, holds fewer warps on an SM
than the committed row, or lost its tensor-core instructions or 16-byte copies.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from typing import Any, Literal
from zlib import crc32

import torch
import triton

from benchmarks import RESULTS
from benchmarks.kernels.aot import CARDS, compile_op
from benchmarks.kernels.cases import OPS
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import write_atomic

TABLE = RESULTS / "compile_matrix.jsonl"
LINEAR = ("linear_geglu", "linear_add", "linear_norm", "feed_forward")
PRODUCTS = ("structured_conv2d", "pruned_attention", *LINEAR)  # what has tf32


@dataclass(frozen=True)
class Variant:
    """Cases of one kind.

    Attributes:
        dtype: Of the tensors.
        skip: Words of cases that are left out: between dense and 0.55, 0.80 shows nothing new.
        few: Only so many cases, spread over all, and of each launch one card, which its name decides.
        tf32: Whether fp32 products may take it.
        ops: Only these; all if None.
    """

    dtype: str
    skip: tuple[str, ...]
    batch: int = 2
    few: int | None = None
    tf32: bool = False
    ops: tuple[str, ...] | None = None


# What a row says under `dtype` -> what that is.
VARIANTS = {
    "bfloat16": Variant("bfloat16", ("0.80",)),
    "float32": Variant("float32", ("0.80", "0.55", "xl")),
    "float16": Variant("float16", ("0.80", "0.55", "xl"), few=4),
    "float32 as tf32": Variant("float32", ("0.80", "0.55", "xl"), few=4, tf32=True, ops=PRODUCTS),
    "bfloat16 b16": Variant("bfloat16", ("0.80", "0.55", "xl"), batch=16, few=4),
}
VERSION = triton.__version__  # other compilers make other code: each has rows of its own
KEY = ("op", "dtype", "sm", "kernel", "case", "config")

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    op: str | None = None
    """Only this one."""
    check: bool = False
    """Compare with the committed table; exit with 1 if a row is worse."""
    one_card: bool = False
    """Compile each launch for one card only, which its name decides, so that all cards are seen; no variant of a few
    cases. Count the instructions of every fourth: to disassemble a kernel takes as long as to compile it."""
    write: bool = False
    """Replace the rows of this triton in the committed table, or those of `op` among them."""
    json: bool = False
    """One JSON object per row instead of text."""


def card_of(kernel: str, config: str) -> int:
    """The card that stands for all where a launch is compiled for one only; the same on every machine."""
    return list(CARDS)[_number(kernel, config) % len(CARDS)]


def _number(kernel: str, config: str) -> int:
    return crc32(f"{kernel} {config}".encode())


def wanted(op: str, name: str, one_card: bool = False) -> bool:
    """Whether an op is compiled in that variant: where each launch is for one card only, not if it has few cases."""
    variant = VARIANTS[name]
    return (variant.ops is None or op in variant.ops) and not (one_card and variant.few)


def compile_one(op: str, name: str, sm: int, one_card: bool = False) -> list[Row]:
    """The rows of one op and variant for one card. Runs in a process of its own."""
    variant = VARIANTS[name]

    def asked(kernel: str, config: str) -> Literal["nothing", "resources", "instructions"]:
        if (one_card or variant.few) and card_of(kernel, config) != sm:
            return "nothing"
        return "resources" if one_card and _number(kernel, config) // len(CARDS) % 4 else "instructions"

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = variant.tf32
    rows = []
    for case, kernel in compile_op(op, variant.dtype, sm, variant.skip, asked, variant.batch, variant.few):
        row = {"suite": "compile_matrix", "triton": VERSION, "op": op, "dtype": name, "case": case, **asdict(kernel)}
        del row["sass"]
        rows.append({**row, "occupancy": round(kernel.occupancy, 3), "fits": kernel.fits})
    return rows


def compile_all(ops: Iterable[str], one_card: bool = False) -> list[Row]:
    """All rows, in a fixed order, compiled by as many processes as there are cores."""
    os.environ.pop("TRITON_INTERPRET", None)  # the processes inherit the environment
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        jobs = [
            pool.submit(compile_one, op, name, sm, one_card)
            for op, name, sm in product(ops, VARIANTS, CARDS)
            if wanted(op, name, one_card)
        ]
        return [row for job in jobs for row in job.result()]


def complaints(row: Row, committed: Row | None) -> list[str]:
    """What is wrong with a row, by itself and against the committed one."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} bytes spilled")
    if not row["fits"]:
        found.append(f"{row['shared']} bytes of shared memory do not fit")
    if row["double"]:
        found.append(f"{row['double']} fp64 instructions")
    if committed is None:
        return [*found, "not in the table; --write adds it"]
    if row["occupancy"] < committed["occupancy"]:
        found.append(f"occupancy {row['occupancy']:.0%}, was {committed['occupancy']:.0%}")
    lost = [what for what in ("tensor_core", "wide_copies") if committed[what] and row[what] == 0]
    return found + [f"no {what} instructions, had {committed[what]}" for what in lost]


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def check(rows: list[Row], table: list[Row]) -> list[str]:
    """One line for every complaint about a row, and for every committed row that is gone."""
    committed = {key(row): row for row in table}
    lines = [f"{' '.join(map(str, key(row)))}: {c}" for row in rows for c in complaints(row, committed.get(key(row)))]
    gone = committed.keys() - {key(row) for row in rows}
    return lines + [f"{' '.join(map(str, k))}: in the table, but no longer compiled" for k in sorted(gone, key=str)]


def version(row: Row) -> str:
    """Of the triton that compiled it; the first rows did not say."""
    return row.get("triton", "3.6.0")


def load() -> list[Row]:
    """The committed rows of the triton that is here.

    Raises:
        UserError: There are none.
    """
    table = load_all()
    rows = [row for row in table if version(row) == VERSION]
    if not rows:
        known = ", ".join(sorted({version(row) for row in table})) or "none"
        raise UserError(f"{TABLE}: no rows of triton {VERSION}, only of {known}; --write adds them")
    return rows


def load_all() -> list[Row]:
    return [json.loads(line) for line in TABLE.read_text().splitlines()] if TABLE.exists() else []


def replaced(table: list[Row], rows: list[Row], ops: Iterable[str]) -> list[Row]:
    """The table with `rows` in place of all that this triton made of `ops`; one triton after the other."""
    others = [row for row in table if version(row) != VERSION or row["op"] not in ops]
    return sorted(others + rows, key=lambda row: (version(row), OPS.index(row["op"])))


def text(row: Row) -> str:
    return (
        f"sm_{row['sm']} {row['dtype']:15} {row['kernel']:36} {row['registers']:3} regs  {row['spills']:3} B spilled  "
        f"{row['shared']:6} B shared  {row['occupancy']:4.0%} occupied  {row['tensor_core']} mma  "
        f"{row['wide_copies']} x 16 B  {row['double']} f64  {row['case']}  {row['config']}"
    )


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.kernels.compile_matrix", __doc__)
    if settings.op is not None and settings.op not in OPS:
        raise UserError(f"--op {settings.op}: no such op{nearest(settings.op, OPS)}")
    if settings.one_card and settings.write:
        raise UserError("--one-card --write: the table holds every launch on every card; leave one of them out")
    ops = OPS if settings.op is None else (settings.op,)
    table = [row for row in load() if row["op"] in ops] if settings.check else []
    if settings.one_card:
        table = [
            row
            for row in table
            if card_of(row["kernel"], row["config"]) == row["sm"] and wanted(row["op"], row["dtype"], one_card=True)
        ]
    rows = compile_all(ops, settings.one_card)
    for row in rows if settings.json or not settings.check else []:
        print(json.dumps(row) if settings.json else text(row))
    if settings.write:
        table = replaced([row for row in load_all() if row["op"] in OPS], rows, ops)
        write_atomic(TABLE, "".join(json.dumps(row) + "\n" for row in table).encode())
    if settings.check:
        lines = check(rows, table)
        if lines:
            raise SystemExit("\n".join([*lines, f"{len(lines)} complaints about {len(rows)} compiled kernels"]))
        print(f"{len(rows)} compiled kernels, none worse than the committed table")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
