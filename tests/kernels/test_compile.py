"""What no interpreter shows: every shipped kernel compiles for every card we name, and compiles well."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import aot
from benchmarks.kernels.cases import OPS
from benchmarks.kernels.compile_matrix import (
    KEY,
    VARIANTS,
    VERSION,
    card_of,
    check,
    complaints,
    load_all,
    replaced,
    version,
    wanted,
)

ROOT = Path(__file__).parents[2]
GOOD: dict[str, Any] = {
    "op": "o", "dtype": "bfloat16", "sm": 80, "kernel": "k", "case": "c", "config": "", "spills": 0, "fits": True,
    "shared": 16, "double": 0, "occupancy": 0.5, "tensor_core": 8, "wide_copies": 4,
}  # fmt: skip


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: one whose Triton interprets cannot compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_nothing_is_worse_than_the_committed_table():
    """Each launch for one card: all of them take minutes, and `make bench-check` compares those."""
    compared = sorted({version(row) for row in load_all()})
    if VERSION not in compared:
        pytest.skip(f"the committed table has rows of triton {', '.join(compared)}, and this is {VERSION}")
    done = compiling("-m", "benchmarks.kernels.compile_matrix", "--check", "--one-card")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_one_card_each_covers_all_cards():
    """Every launch is compiled for one card, on every card of every op there is something to compile."""
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/compile_matrix.jsonl").read_text().splitlines()]
    launches = {(row["kernel"], row["config"]) for row in rows}
    chosen = {(row["kernel"], row["config"]) for row in rows if card_of(row["kernel"], row["config"]) == row["sm"]}
    assert chosen == launches
    share = Counter(card_of(*launch) for launch in launches)
    assert share.keys() == set(aot.CARDS)
    assert max(share.values()) < 2 * min(share.values())


def test_a_few_cases_are_far_apart_and_of_both_directions():
    cases = [f"{level} {way}" for level in range(4) for way in ("fwd", "bwd")]
    assert aot.spread(cases, 4) == ["0 fwd", "1 bwd", "2 fwd", "3 bwd"]
    assert aot.spread(cases[:5], 4) == ["0 fwd", "0 bwd", "1 fwd", "1 bwd"]
    assert aot.spread(cases[:3], 4) == aot.spread(cases[:3], None) == cases[:3]


def test_variants_of_a_few_cases_are_left_to_the_full_table():
    """CI compiles no more for them. Only ops with matrix products have TF32."""
    names = [name for name in VARIANTS if wanted("pruned_attention", name, one_card=True)]
    assert names == ["bfloat16", "float32"]
    assert [name for name in VARIANTS if not wanted("geglu", name)] == ["float32 as tf32"]
    assert all(wanted(op, name) for op in OPS for name in ("float16", "bfloat16 b16"))


BAD = """
import torch, triton
import triton.language as tl
from benchmarks.kernels.aot import CARDS, offline

@triton.jit
def many_registers(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x_ptr + i[:, None] * N + i[None, :])
    row, column = tl.sum(a, 0), tl.sum(a, 1)
    tl.store(y_ptr + i[:, None] * N + i[None, :], a * row[None, :] + column[:, None])

@triton.jit
def double(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x_ptr + i).to(tl.float64)
    tl.store(y_ptr + i, a * a + 3.0)

@triton.jit
def narrow(x_ptr, y_ptr, step, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i * step))

x, y = torch.empty(2**14), torch.empty(2**14)
for sm in CARDS:
    with offline(sm, lambda _, config: "nothing" if "warps=16" in config else "instructions") as rows:
        many_registers[(1,)](x, y, N=128, num_warps=2)
        double[(1,)](x, y, N=1024)
        narrow[(1,)](x, y, 7, N=1024)
        narrow[(1,)](x, y, 7, N=1024)
        narrow[(1,)](x, y, 7, N=1024, num_warps=16)
    print(sm, *((r.kernel, r.spills > 0, r.double > 0, r.wide_copies > 0) for r in rows))
    with offline(sm, lambda *_: "nothing") as rows:
        double[(1,)](x, y, N=1024)
    assert not rows, rows
"""


def test_what_is_bad_is_seen(tmp_path):
    """Kernels made to spill, to compute in fp64 and to load element by element.

    The second launch is no new row, and one that is not wanted is none, though the process has compiled it before.
    """
    script = tmp_path / "bad.py"
    script.write_text(BAD)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(lines) == [str(sm) for sm in aot.CARDS]
    for line in lines.values():
        assert "('many_registers', True, False" in line
        assert "('double', False, True" in line
        assert line.count("'narrow'") == line.count("('narrow', False, False, False)") == 1


ATTENTION = """
import torch
from benchmarks.kernels.aot import offline
from bilevel_kernels.pruned_attention import pruned_attention

for D in (40, 80, 128, 160, 256):
    with offline(86) as rows:
        leaves = [torch.empty(2, 64, 2 * D, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        out = pruned_attention(*leaves, 2)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    print([(D, r.kernel, r.shared) for r in rows if not r.fits], len(rows))
"""


@pytest.mark.slow
def test_attention_of_every_head_dimension_fits_the_least_shared_memory():
    """SD 1.x has heads of 40, 80 and 160; a block of sm_86 has 99 KiB."""
    done = compiling("-c", ATTENTION)
    assert done.stdout.split("\n")[:-1] == ["[] 3"] * 5, done.stdout + done.stderr[-4000:]


PARTS = """
import torch
from benchmarks.kernels.aot import offline
from bilevel_kernels.kept import Kept
from bilevel_kernels.pruned_attention import pruned_attention

for dtype in (torch.float32, torch.bfloat16):
    for D, T, kept in ((40, 4096, None), (80, 1024, [0, 2, 3, 5]), (160, 256, [0, 2, 3, 5])):
        with offline(80, lambda kernel, _: "nothing" if "fwd" in kernel or "dq" in kernel else "resources") as rows:
            q, k, v = (torch.empty(2, n, 8 * D, dtype=dtype).requires_grad_() for n in (T, 77, 77))
            out = pruned_attention(q, k, v, 8, kept=kept and Kept.same(8, kept))
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        print([(dtype, D, r.kernel, r.spills) for r in rows if r.spills], len(rows))
"""


@pytest.mark.slow
def test_parts_of_older_heads_do_not_spill():
    """SD 1.x over text, in parts. Without a limit of registers ptxas spills in fp32, to fit a third block on an SM."""
    done = compiling("-c", PARTS)
    assert done.stdout.split("\n")[:-1] == ["[] 2"] * 6, done.stdout + done.stderr[-4000:]


def test_offline_needs_the_interpreter_off():
    done = compiling("-c", "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
                     "from benchmarks.kernels.aot import offline\nwith offline(80): pass")  # fmt: skip
    assert "RuntimeError: TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spills": 8}, "8 bytes spilled"),
        ({"fits": False, "shared": 200_000}, "200000 bytes of shared memory do not fit"),
        ({"double": 1}, "1 fp64 instructions"),
        ({"occupancy": 0.25}, "occupancy 25%, was 50%"),
        ({"tensor_core": 0}, "no tensor_core instructions, had 8"),
        ({"wide_copies": 0}, "no wide_copies instructions, had 4"),
    ],
)
def test_a_worse_row_is_a_complaint(change, said):
    assert complaints({**GOOD, **change}, GOOD) == [said]


def test_a_row_as_good_is_none():
    assert complaints(GOOD, GOOD) == []
    assert complaints({**GOOD, "occupancy": 1.0, "tensor_core": 16}, GOOD) == []
    assert complaints({**GOOD, "tensor_core": None, "wide_copies": None, "double": None}, GOOD) == []  # not counted


def test_rows_that_come_and_go():
    other = {**GOOD, "case": "d"}
    assert check([GOOD], [GOOD]) == []
    assert check([GOOD, other], [GOOD]) == ["o bfloat16 80 k d : not in the table; --write adds it"]
    assert check([GOOD], [GOOD, other]) == ["o bfloat16 80 k d : in the table, but no longer compiled"]


def test_occupancy_is_that_of_the_programming_guide():
    """By hand: what limits a block of 4 warps on sm_86 (48 warps, 16 blocks, 100 KiB, 65536 registers)."""
    card = aot.CARDS[86]
    assert aot._occupancy(card, warps=4, registers=32, shared=0) == 1.0  # warps: 12 blocks
    assert aot._occupancy(card, warps=4, registers=128, shared=0) == 16 / 48  # registers: 4 blocks
    assert aot._occupancy(card, warps=4, registers=32, shared=49 << 10) == 8 / 48  # shared memory: 2 blocks
    assert aot._occupancy(card, warps=1, registers=32, shared=0) == 16 / 48  # blocks


def test_the_committed_table_has_each_row_once():
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/compile_matrix.jsonl").read_text().splitlines()]
    assert len({(version(row), *(row[name] for name in KEY)) for row in rows}) == len(rows)
    assert {row["sm"] for row in rows} == set(aot.CARDS)


def test_each_triton_has_rows_of_its_own():
    """Written anew, those of another one stay as they are, and so do those of other ops."""
    first, norm = {**GOOD, "op": "geglu"}, {**GOOD, "op": "group_norm_silu"}
    here = {"triton": VERSION}
    other = {**first, "triton": "0.1.0"}
    table = [other, {**norm, **here}, {**first, **here, "spills": 8}]
    assert replaced(table, [{**first, **here}], ["geglu"]) == [other, {**norm, **here}, {**first, **here}]
    assert version(first) == "3.6.0", "rows that do not say"


def test_tensor_core_instructions_have_other_names_on_each_card():
    """As cuobjdump writes them on sm_80, sm_90 and sm_100."""
    for name in (
        "HMMA.16816.F32.BF16 R4,",
        "HGMMA.64x128x16.F32.BF16 R24,",
        "UTCHMMA gdesc[UR4],",
        "UTCQMMA gdesc[UR4],",
    ):
        assert re.search(aot.TENSOR_CORE, f"        /*0010*/   {name}"), name
    assert not re.search(aot.TENSOR_CORE, "IMAD.MOV.U32 R1, FFMA UTCBAR")
