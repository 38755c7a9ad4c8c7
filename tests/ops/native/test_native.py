import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bilevel_fast.ops.native import _C, AdamW, Trained, pointer


def test_pointer_is_the_first_element():
    storage = torch.arange(8.0)
    assert pointer(storage[2:], torch.float32, 6) == storage.data_ptr() + 8


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(4, dtype=torch.float64), "torch.float64 tensor where native code takes torch.float32"),
        (torch.zeros(4, 2)[:, 0], r"shape \(4,\) with strides \(2,\) is not contiguous"),
        (torch.zeros(5), "5 elements where native code takes 4"),
        (torch.zeros(4, device="meta"), "meta tensor handed to native code"),
    ],
    ids=["dtype", "strides", "size", "device"],
)
def test_pointer_refuses(tensor, message):
    with pytest.raises(AssertionError, match=message):
        pointer(tensor, torch.float32, 4)


def test_a_missing_build_names_the_command():
    code = "import sys; sys.modules['bilevel_fast.ops.native._C'] = None; import bilevel_fast.ops.native"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith("ImportError: bilevel_fast.ops.native._C is not built; run: pip install -e .\n")


def test_instruction_sets():
    *_, least = names = _C.instruction_sets()
    assert least == "baseline"
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="this CPU has no instruction set x87"):
        _C.use_instruction_set("x87")


def test_an_instruction_set_is_used():
    """Those with fused multiplication and addition round once where the baseline rounds twice."""
    p, g, m, v = (torch.rand(1000) for _ in range(4))
    results = {}
    for name in _C.instruction_sets():
        _C.use_instruction_set(name)
        results[name] = p.clone()
        AdamW().step(Trained([results[name]], [m.clone()], [v.clone()]), [g], 1e-3, 1)
    _C.use_instruction_set(_C.instruction_sets()[0])
    fused = [result for name, result in results.items() if name != "baseline"]
    if not fused:
        pytest.skip("this CPU has one instruction set")
    assert all(not torch.equal(result, results["baseline"]) for result in fused)


@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_the_stub_is_what_is_built(name):
    module = pytest.importorskip(f"bilevel_fast.ops.native.{name}", reason="built where there is nvcc")
    stub = Path(module.__file__).with_name(f"{name}.pyi")
    functions = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.FunctionDef)]
    promised = {f.name: [argument.arg for argument in f.args.args] for f in functions}
    built = {name: re.findall(r"(\w+): ", getattr(module, name).__doc__) for name in dir(module) if name[0] != "_"}
    assert promised == built
