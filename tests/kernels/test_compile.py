"""What no interpreter shows: every shipped kernel compiles for every card we name, and compiles well."""

import re
from dataclasses import replace

import pytest

from aot import Launch, compile_all
from bilevel_kernels.steered_mse import BLOCK

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # most that one block may have

DATA = {"s_ptr": "*bf16", "a_ptr": "*bf16", "c_ptr": "*bf16"}
SCALARS = {"eta": "fp32", "M": "i32", "BLOCK": "constexpr"}
LAUNCHES = [
    Launch(
        "steered_mse",
        "_steered_mse_fwd_kernel",
        {**DATA, "partial_ptr": "*fp32", **SCALARS},
        {"BLOCK": BLOCK},
        (*DATA, "partial_ptr", "M"),
    ),
    Launch(
        "steered_mse",
        "_steered_mse_bwd_kernel",
        {"dloss_ptr": "*fp32", **DATA, "ds_ptr": "*bf16", **SCALARS},
        {"BLOCK": BLOCK},
        (*DATA, "ds_ptr", "M"),
    ),
]


@pytest.fixture(scope="module")
def reports():
    launches = [replace(launch, sm=sm) for launch in LAUNCHES for sm in SHARED_BYTES]
    return dict(zip(((x.kernel, x.sm) for x in launches), compile_all(launches), strict=True))


@pytest.mark.parametrize("sm", SHARED_BYTES)
@pytest.mark.parametrize("kernel", [launch.kernel for launch in LAUNCHES])
def test_compiles_well(reports, kernel, sm):
    report = reports[kernel, sm]
    assert report.local_bytes == 0, f"{report.local_bytes} bytes of spills"
    assert report.registers <= 128
    assert report.shared_bytes <= SHARED_BYTES[sm]
    loads = re.findall(r"\bLDG\.E\S*", report.sass)
    assert sum("128" in load for load in loads) == 3, f"s, a and c in 16-byte loads; found {loads}"
    assert not re.search(r"\bD(ADD|MUL|FMA|SETP)\b|\.F64\b", report.sass), "double precision arithmetic"
