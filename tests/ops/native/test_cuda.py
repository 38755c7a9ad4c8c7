"""Kernels of csrc/*.cu: what they compile to, and what they compute: on a GPU, or on the CPU where there is none."""

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
import torch.nn.functional as F
import triton

import numerics
from bilevel_fast.ops.native import AdamW, Trained, cuda
from bilevel_fast.ops.native import feature_kd as on_cpu
from cuda_on_cpu import OnCpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CARDS = ("sm_80", "sm_86", "sm_89", "sm_90")
KERNELS = {"adamw_ema": ["step_kernel"], "feature_kd": ["chunk_kernel", "loss_kernel"]}
SIZES = [1, 7, 8, 33, 4096, 4097, 8192, 8193, 100_003]  # chunks are of 4096 and 8192
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
    assert set(re.findall(r"(\w+)\.(sm_\d+)\.cubin", _dump("-lelf"))) == {(k, sm) for k in KERNELS for sm in CARDS}
    assert set(re.findall(r"(\w+)\.(sm_\d+)\.ptx", _dump("-lptx"))) == {(k, CARDS[-1]) for k in KERNELS}


@needs_nvcc
def test_nothing_is_spilled():
    usage = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _dump("-res-usage"))
    assert len(usage) == len(CARDS) * (4 + 3 + 1)  # with and without average and copy; dtypes; the losses
    for registers, stack, local in usage:
        assert int(stack) == int(local) == 0
        assert int(registers) <= 64  # 1024 threads of an SM


@needs_nvcc
@pytest.mark.parametrize("sm", CARDS)
def test_tensors_are_loaded_and_stored_16_bytes_at_a_time(sm):
    functions = re.split(r"\n\s*Function : ", _dump("-sass", "-arch", sm))[1:]
    found = {"step_kernel": 0, "chunk_kernel": 0, "loss_kernel": 0}
    for code in functions:
        (name,) = (name for name in found if name in code.split("\n", 1)[0])
        found[name] += 1
        loads, stores = (len(re.findall(rf"\b{op}\.E\S*\.128", code)) for op in ("LDG", "STG"))
        least = {"step_kernel": (4, 3), "chunk_kernel": (2, 1), "loss_kernel": (0, 0)}[name]
        assert loads >= least[0], code[:200]
        assert stores >= least[1], code[:200]
        assert not re.findall(r"\bD(?:ADD|MUL|FMA|SETP)\b|\.F64\b", code), "arithmetic in double"
        assert not re.findall(r"\b(?:LDL|STL|ATOM|RED)\b", code), "local memory or atomics"
    assert found == {"step_kernel": 4, "chunk_kernel": 3, "loss_kernel": 1}


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
        "assert not cuda.is_built(); cuda.feature_kd([], [], 1.0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith(
        "ImportError: bilevel_fast.ops.native._cuda is not built; "
        "with nvcc on the PATH, or CUDA_HOME set, run: pip install -e .\n"
    )


@needs_nvcc
def test_refuses_tensors_of_the_cpu():
    x = [torch.zeros(8)]
    with pytest.raises(ValueError, match="student 0: cpu tensor, expected cuda"):
        cuda.feature_kd(x, x, 1.0)
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


def pairs(sizes, dtype=torch.float32, shift=0):
    """Student and teacher of the device, `shift` elements after an aligned address."""
    students, teachers = [], []
    for size in sizes:
        teacher = (-2.3 + 0.5 * torch.randn(size + shift, device=DEVICE)).to(dtype)
        students.append((teacher + 0.3 * torch.randn_like(teacher) + 0.1)[shift:])
        teachers.append(teacher[shift:])
    return students, teachers


def eager_kd(student, teacher):
    student = [s.detach().requires_grad_() for s in student]
    wide = torch.float64 if student[0].dtype == torch.float64 else torch.float32
    losses = torch.stack([F.mse_loss(s.to(wide), t.to(wide)) for s, t in zip(student, teacher, strict=True)])
    return losses.detach(), torch.autograd.grad(0.1 * losses.mean(), student)


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
@pytest.mark.parametrize(
    ("sizes", "dtype", "shift"),
    [
        *((SIZES, dtype, shift) for dtype in (torch.float32, torch.float16, torch.bfloat16) for shift in (0, 1)),
        (MANY, torch.float32, 0),
    ],
    ids=["fp32", "fp32 off by one", "fp16", "fp16 off by one", "bf16", "bf16 off by one", "many"],
)
def test_feature_kd(sizes, dtype, shift):
    student, teacher = pairs(sizes, dtype, shift)
    losses, gradients = cuda.feature_kd(student, teacher, 0.1)
    eager = eager_kd(student, teacher)
    gold = eager_kd([s.double() for s in student], [t.double() for t in teacher])
    numerics.assert_no_worse_than_eager("losses", losses, eager[0], gold[0])
    for k in range(len(sizes)):
        numerics.assert_no_worse_than_eager(f"gradient {k}", gradients[k], eager[1][k], gold[1][k])


@pytest.mark.usefixtures("kernels")
def test_feature_kd_is_that_of_the_cpu():
    student, teacher = pairs(SIZES)
    losses, gradients = cuda.feature_kd(student, teacher, 0.1)
    expected, others = on_cpu([s.cpu() for s in student], [t.cpu() for t in teacher], 0.1)
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-6, atol=0)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(gradients, others, strict=True))


@pytest.mark.usefixtures("kernels")
def test_feature_kd_does_not_depend_on_alignment():
    student, teacher = pairs(SIZES, shift=1)
    shifted = cuda.feature_kd(student, teacher, 0.1)
    aligned = cuda.feature_kd([s.clone() for s in student], [t.clone() for t in teacher], 0.1)
    assert all(torch.equal(a, b) for a, b in zip([shifted[0], *shifted[1]], [aligned[0], *aligned[1]], strict=True))


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
    student, teacher = pairs(SIZES)
    first, second = (cuda.feature_kd(student, teacher, 0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip([first[0], *first[1]], [second[0], *second[1]], strict=True))
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
    student, teacher = pairs(SIZES[-1:])
    expected, _ = cuda.feature_kd(student, teacher, 0.1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [s.clone().fill_(0.0) for s in student]
        torch.cuda._sleep(10_000_000)
        late[0].copy_(student[0])
        losses, _ = cuda.feature_kd(late, teacher, 0.1)
    stream.synchronize()
    assert torch.equal(losses, expected)
