"""The kernel of csrc/adamw_ema.cu: what it compiles to, and what it computes on a GPU, or on the CPU without one."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import triton

import numerics
from bilevel_fast.ops.native import AdamW, Trained, cuda
from cuda_on_cpu import OnCpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CARDS = ("sm_80", "sm_86", "sm_89", "sm_90")
SIZES = [1, 7, 8, 33, 4096, 4097, 8192, 8193, 100_003]  # chunks are of 4096
MANY = [1 + 37 * i for i in range(130)]  # three launches
SETTINGS = AdamW(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, ema_decay=0.95)
LR, NUMBER, CLIP = 1e-3, 3, 0.7


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
    assert set(re.findall(r"(\w+)\.(sm_\d+)\.cubin", _dump("-lelf"))) == {("adamw_ema", sm) for sm in CARDS}
    assert set(re.findall(r"(\w+)\.(sm_\d+)\.ptx", _dump("-lptx"))) == {("adamw_ema", CARDS[-1])}


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
    for code in functions:
        assert "step_kernel" in code.split("\n", 1)[0]
        loads, stores = (len(re.findall(rf"\b{op}\.E\S*\.128", code)) for op in ("LDG", "STG"))
        assert loads >= 4, code[:200]
        assert stores >= 3, code[:200]
        assert not re.findall(r"\bD(?:ADD|MUL|FMA|SETP)\b|\.F64\b", code), "arithmetic in double"
        assert not re.findall(r"\b(?:LDL|STL|ATOM|RED)\b", code), "local memory or atomics"
    assert len(functions) == 4


@needs_nvcc
def test_the_runtime_is_linked_in():
    """Symbols of torch's own runtime, of whatever version, are not taken for it."""
    names = subprocess.run(
        ["nm", "-D", importlib.util.find_spec("bilevel_fast.ops.native._cuda").origin], capture_output=True
    )
    if names.returncode:
        pytest.skip("no nm")
    assert not re.findall(rb"\bcuda[A-Z]\w+", names.stdout)


def test_a_missing_build_says_what_to_do():
    code = (
        "import sys; sys.modules['bilevel_fast.ops.native._cuda'] = None; from bilevel_fast.ops.native import cuda; "
        "assert not cuda.is_built(); cuda.adamw_ema(None, None, [], None, None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith(
        "ImportError: bilevel_fast.ops.native._cuda is not built; "
        "with nvcc on the PATH, or CUDA_HOME set, run: pip install -e .\n"
    )


@needs_nvcc
def test_refuses_tensors_of_the_cpu():
    x = [torch.zeros(8)]
    with pytest.raises(ValueError, match="parameter 0: cpu tensor, expected cuda"):
        cuda.adamw_ema(SETTINGS, Trained(x, x, x), x, x[0], x[0])


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built_for_cpu(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no GPU, and no C++ compiler to run the kernels on the CPU with")
    return OnCpu(tmp_path_factory.mktemp("cuda_on_cpu"), compiler)


@pytest.fixture
def kernels(request, monkeypatch):
    """The kernels, on a GPU or as compiled for the CPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(cuda, "_cuda", request.getfixturevalue("built_for_cpu"))
        monkeypatch.setattr(cuda, "_queue", lambda device: (0, 0))
        monkeypatch.setattr(cuda, "_device", lambda name, tensor: tensor.device)


def steps(sizes, shift=0):
    """Lists of tensors of the device as in the middle of a training: written ones, and gradients."""

    def like(scale, fill=torch.randn):
        return [scale * fill(size + shift, device=DEVICE)[shift:] for size in sizes]

    copies = [torch.zeros(size + shift, device=DEVICE, dtype=torch.bfloat16)[shift:] for size in sizes]
    return Trained(like(1.0), like(0.1), like(0.01, torch.rand), like(1.0), copies), like(0.1)


def cloned(trained):
    lists = (trained.parameters, trained.exp_avgs, trained.exp_avg_sqs, trained.emas, trained.copies)
    return Trained(*([t.clone() for t in tensors] for tensors in lists))


def flat(trained):
    lists = (trained.parameters, trained.exp_avgs, trained.exp_avg_sqs, trained.emas, trained.copies)
    return [t for tensors in lists for t in tensors]


def scalar(value):
    return torch.tensor(value, device=DEVICE)


def step(trained, gradients, skip=0.0):
    cuda.adamw_ema(SETTINGS, trained, gradients, scalar(LR), scalar(float(NUMBER)), scalar(CLIP), scalar(skip))


def formula(p, m, v, ema, g):
    g = g * CLIP
    m = m.lerp(g, 1 - SETTINGS.beta1)
    v = v * SETTINGS.beta2 + (1 - SETTINGS.beta2) * g * g
    root = v.sqrt() / (1 - SETTINGS.beta2**NUMBER) ** 0.5 + SETTINGS.eps
    p = p * (1 - LR * SETTINGS.weight_decay) - LR / (1 - SETTINGS.beta1**NUMBER) * m / root
    return p, m, v, ema.lerp(p, 1 - SETTINGS.ema_decay)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("sizes", "shift"), [(SIZES, 0), (SIZES, 1), (MANY, 0)], ids=["sizes", "off by one", "many"])
def test_adamw_ema(sizes, shift):
    trained, gradients = steps(sizes, shift)
    before = cloned(trained)
    step(trained, gradients)
    for i in range(len(sizes)):
        inputs = (before.parameters[i], before.exp_avgs[i], before.exp_avg_sqs[i], before.emas[i], gradients[i])
        eager, gold = formula(*inputs), formula(*(t.double() for t in inputs))
        ours = (trained.parameters[i], trained.exp_avgs[i], trained.exp_avg_sqs[i], trained.emas[i])
        for name, *values in zip(("p", "m", "v", "ema"), ours, eager, gold, strict=True):
            numerics.assert_no_worse_than_eager(f"{name} {i}", *values)
        assert torch.equal(trained.copies[i], trained.parameters[i].bfloat16())


@pytest.mark.usefixtures("kernels")
def test_ten_steps_of_torch():
    start = [torch.randn(size, device=DEVICE) for size in SIZES]
    ours, fused = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    trained = Trained([p.detach() for p in ours], *([torch.zeros_like(p) for p in start] for _ in range(2)))
    theirs = torch.optim.AdamW(fused, lr=LR, weight_decay=SETTINGS.weight_decay, fused=True)
    for number in range(1, 11):
        gradients = [0.1 * torch.randn_like(p) for p in start]
        cuda.adamw_ema(SETTINGS, trained, gradients, scalar(LR), scalar(float(number)))
        for p, g in zip(fused, gradients, strict=True):
            p.grad = g
        theirs.step()
    for p, other in zip(ours, fused, strict=True):
        torch.testing.assert_close(p.detach(), other.detach(), rtol=20 * 2**-24, atol=1e-8)


@pytest.mark.usefixtures("kernels")
def test_adamw_ema_does_not_depend_on_alignment():
    trained, gradients = steps(SIZES, shift=1)
    aligned = cloned(trained)
    step(trained, gradients)
    step(aligned, [g.clone() for g in gradients])
    assert all(torch.equal(a, b) for a, b in zip(flat(trained), flat(aligned), strict=True))


@pytest.mark.usefixtures("kernels")
def test_skip_leaves_every_bit():
    trained, gradients = steps(MANY)
    before = cloned(trained)
    gradients[0][0] = float("nan")
    step(trained, gradients, skip=1.0)
    assert all(torch.equal(a, b) for a, b in zip(flat(trained), flat(before), strict=True))


@pytest.mark.usefixtures("kernels")
def test_same_bits_twice():
    trained, gradients = steps(SIZES)
    other = cloned(trained)
    step(trained, gradients)
    step(other, gradients)
    assert all(torch.equal(a, b) for a, b in zip(flat(trained), flat(other), strict=True))


@pytest.mark.gpu
def test_steps_of_a_graph():
    """What changes from step to step is read on the device, by a replay as well."""
    trained, gradients = steps(MANY)
    expected = cloned(trained)
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
    assert all(torch.equal(a, b) for a, b in zip(flat(trained), flat(expected), strict=True))


@pytest.mark.gpu
def test_the_stream_is_torchs_current_one():
    trained, gradients = steps(SIZES[-1:])
    expected = cloned(trained)
    step(expected, gradients)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(g) for g in gradients]
        torch.cuda._sleep(10_000_000)
        late[0].copy_(gradients[0])
        step(trained, late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(flat(trained), flat(expected), strict=True))
