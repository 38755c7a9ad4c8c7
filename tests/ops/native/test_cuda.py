"""Kernels of csrc/*.cu: what they compile to, and how a GPU runs them."""

import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
import triton

from bilevel_fast.ops.native import AdamW, Trained, cuda

CARDS = ("sm_80", "sm_86", "sm_89", "sm_90")
SOURCES = ["adamw_ema"]
SETTINGS = AdamW(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, ema_decay=0.95)
LR = 1e-3


# --- what they compile to ---------------------------------------------------------------------------------------------


def _nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return shutil.which("nvcc", path=os.pathsep.join([f"{home}/bin" for home in (*homes, "/usr/local/cuda")])) or (
        shutil.which("nvcc")
    )


needs_nvcc = pytest.mark.skipif(_nvcc() is None, reason="no nvcc: nothing to build with")


@cache
def _dump(*flags):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    spec = importlib.util.find_spec("bilevel_fast.ops.native._cuda")
    assert spec is not None, "nvcc is here, but the module was not built: run pip install -e ."
    return subprocess.run([tool, *flags, spec.origin], check=True, capture_output=True, text=True).stdout


@needs_nvcc
def test_built_for_every_card():
    assert cuda.is_built()
    assert set(re.findall(r"(\w+)\.(sm_\d+)\.cubin", _dump("-lelf"))) == {(k, sm) for k in SOURCES for sm in CARDS}
    assert set(re.findall(r"(\w+)\.(sm_\d+)\.ptx", _dump("-lptx"))) == {(k, CARDS[-1]) for k in SOURCES}


@needs_nvcc
def test_nothing_is_spilled():
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _dump("-res-usage"))
    assert len(usage) == len(CARDS) * 4  # with and without average and copy
    for registers, stack, local in usage:
        assert int(stack) == int(local) == 0
        assert int(registers) <= 64  # 1024 threads of an SM


@needs_nvcc
@pytest.mark.parametrize("sm", CARDS)
def test_tensors_are_loaded_and_stored_16_bytes_at_a_time(sm):
    functions = re.split(r"\n\s*Function : ", _dump("-sass", "-arch", sm))[1:]
    assert len(functions) == 4
    for code in functions:
        assert "step_kernel" in code.split("\n", 1)[0]
        loads, stores = (len(re.findall(rf"\b{op}\.E\S*\.128", code)) for op in ("LDG", "STG"))
        assert loads >= 4, code[:200]
        assert stores >= 3, code[:200]
        assert not re.findall(r"\bD(?:ADD|MUL|FMA|SETP)\b|\.F64\b", code), "arithmetic in double"
        assert not re.findall(r"\b(?:LDL|STL|ATOM|RED)\b", code), "local memory or atomics"


@needs_nvcc
def test_the_runtime_is_linked_in():
    """Symbols of torch's own runtime, of whatever version, are not taken for it."""
    names = subprocess.run(
        ["nm", "-D", importlib.util.find_spec("bilevel_fast.ops.native._cuda").origin], capture_output=True
    )
    if names.returncode:
        pytest.skip("no nm")
    assert not re.findall(rb"\bcuda[A-Z]\w+", names.stdout)


def test_a_missing_build_says_what_to_do(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_missing", ImportError(), raising=False)
    assert not cuda.is_built()
    said = "bilevel_fast.ops.native._cuda is not built; with nvcc on the PATH, or CUDA_HOME set, run: pip install -e ."
    with pytest.raises(ImportError, match=re.escape(said)):
        cuda.adamw_ema(SETTINGS, Trained([], [], []), [], None, None)


@needs_nvcc
def test_refuses_tensors_of_the_cpu():
    x = [torch.zeros(8)]
    with pytest.raises(ValueError, match="parameter 0: cpu tensor, expected cuda"):
        cuda.adamw_ema(SETTINGS, Trained(x, x, x), x, x[0], x[0])


def test_the_current_device_is_left_as_it_was(built_for_cpu):
    """Launches go to the queue's, which is another one."""
    number, buffers = torch.ones(1), torch.ones(4, 8)
    tensors = [[x.data_ptr()] for x in buffers]
    scalars = [number.data_ptr(), number.data_ptr(), None, None]
    built_for_cpu.adamw_ema(*tensors, [], [], [8], 0.9, 0.99, 1e-8, 0.0, 0.0, *scalars)
    assert built_for_cpu.library.device_of_launches() == 1
    assert built_for_cpu.library.device_of_thread() == 0


# --- what a GPU does with them: values are held in tests/ops/test_adamw_ema.py ----------------------------------------


def training():
    """Tensors as in the middle of a training, in three launches, and gradients."""
    sizes = [1 + 37 * i for i in range(130)]
    p, m, v, g = ([torch.rand(size, device="cuda") for size in sizes] for _ in range(4))
    return Trained(p, m, v), g


def scalar(value):
    return torch.tensor(value, device="cuda")


@pytest.mark.gpu
def test_steps_of_a_graph():
    """What changes from step to step is read on the device, by a replay as well."""
    trained, gradients = training()
    expected = Trained(*([t.clone() for t in x] for x in (trained.parameters, trained.exp_avgs, trained.exp_avg_sqs)))
    for number in (1.0, 2.0):
        cuda.adamw_ema(SETTINGS, expected, gradients, scalar(LR * number), scalar(number))
    lr, number = scalar(0.0), scalar(0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        number.add_(1.0)
        lr.copy_(LR * number)
        cuda.adamw_ema(SETTINGS, trained, gradients, lr, number)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in ((trained.parameters, expected.parameters), (trained.exp_avg_sqs, expected.exp_avg_sqs)):
        assert all(map(torch.equal, a, b))


@pytest.mark.gpu
def test_the_stream_is_torchs_current_one():
    trained, gradients = training()
    late = Trained(*([t.clone() for t in x] for x in (trained.parameters, trained.exp_avgs, trained.exp_avg_sqs)))
    cuda.adamw_ema(SETTINGS, trained, gradients, scalar(LR), scalar(1.0))
    lr, number = scalar(LR), scalar(1.0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        zeros = [torch.zeros_like(g) for g in gradients]
        torch.cuda._sleep(10_000_000)
        torch._foreach_copy_(zeros, gradients)
        cuda.adamw_ema(SETTINGS, late, zeros, lr, number)
    stream.synchronize()
    assert all(map(torch.equal, late.parameters, trained.parameters))
