"""AdamW of csrc/, with each instruction set and on CUDA: the contract, and what lists of tensors bring with them.

The contract runs for Triton in tests/kernels; providers behind an optimizer in tests/training/test_optim.py.
"""

from dataclasses import replace

import pytest
import torch

from adamw_contract import BF16, F32, WRITTEN, AdamWContract, Rule, call, same_bits, state
from bilevel_fast.ops.native import _C, AdamW, Trained, cuda

SIZES = [1, 7, 8, 33, 2**14 + 1, 100_003, *(1 + 37 * i for i in range(130))]  # three launches, many chunks
LR = 1e-3


def lists(p, m, v, ema, copy):
    as_list = [x if isinstance(x, list) or x is None else [x] for x in (p, m, v, ema, copy)]
    return Trained(*as_list)


def native(p, g, m, v, *, lr, step, clip=None, skip=None, ema=None, copy=None, **settings):
    numbers = (float(lr), int(step), 1.0 if clip is None else float(clip), skip is not None and bool(skip))
    AdamW(**settings).step(lists(p, m, v, ema, copy), g if isinstance(g, list) else [g], *numbers)


def on_cuda(p, g, m, v, *, lr, step, clip=None, skip=None, ema=None, copy=None, **settings):
    trained, gradients = lists(p, m, v, ema, copy), g if isinstance(g, list) else [g]
    cuda.adamw_ema(AdamW(**settings), trained, gradients, lr, step, clip, skip)


@pytest.fixture(params=[*_C.instruction_sets(), "cuda"])
def adamw(request):
    """Each instruction set of this CPU, and the CUDA kernels, on the CPU where there is no GPU."""
    if request.param == "cuda":
        request.getfixturevalue("csrc_kernels")
        yield Rule(on_cuda, [(F32, BF16)], request.getfixturevalue("device"))
    else:
        _C.use_instruction_set(request.param)
        yield Rule(native, [(F32, BF16)])
        _C.use_instruction_set(_C.instruction_sets()[0])


class TestContract(AdamWContract):
    pass


def test_many_tensors_are_one_flat_buffer(adamw):
    """Bits do not depend on where in a tensor an element is, nor on the launch that it is in."""
    flat = state(adamw, sum(SIZES))
    many = flat | {name: [x.clone() for x in flat[name].split(SIZES)] for name in (*WRITTEN, "g")}
    call(adamw.step, many)
    call(adamw.step, flat)
    assert same_bits(many | {name: torch.cat(many[name]) for name in WRITTEN}, flat)


def test_copy_rounds_as_torch(adamw):
    """Ties both ways, subnormals, the largest float, infinities, NaN: parameters that a step leaves alone."""
    of_ties = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 1, 0x8000, 0x807FFFFF, 0x7F7FFFFF, 0x7F7F7FFF]
    p = torch.tensor(of_ties).to(torch.int32).view(F32)
    p = torch.cat([p, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")]), 1e3 * torch.randn(1000)])
    s = state(adamw, len(p))
    s["p"], before = p.to(adamw.device), p.to(adamw.device, copy=True)
    for name in ("g", "m", "v", "lr"):
        s[name].zero_()
    call(adamw.step, s)
    finite = before.isfinite()
    assert torch.equal(s["p"][finite], before[finite])
    assert torch.equal(s["copy"].view(torch.int16)[finite], s["p"].bfloat16().view(torch.int16)[finite])
    assert not s["copy"][~finite].isfinite().any()


def test_channels_last(adamw):
    """Weights of a convolution; of a 1x1 one the gradient's strides may differ where they mean nothing."""
    last = torch.channels_last
    for kernel in (3, 1):
        shape = (6, 5, kernel, kernel)
        flat = state(adamw, 30 * kernel**2)
        convolution = {name: flat[name].view(shape).to(memory_format=last, copy=True) for name in (*WRITTEN, "g")}
        if kernel == 1:
            convolution["g"] = convolution["g"].as_strided(shape, (5, 1, 1, 1))
            assert convolution["g"].stride() != convolution["p"].stride()
        call(adamw.step, flat | convolution)
        call(adamw.step, flat)
        for name in WRITTEN:
            assert torch.equal(convolution[name], flat[name].view(shape)), name


def test_any_number_of_threads(instruction_set, at_threads):
    start = state(Rule(native, [(F32, BF16)]), 100_003)
    several = [{name: x.clone() for name, x in start.items()} for _ in range(3)]
    for threads, s in enumerate(several, start=1):
        at_threads(threads, lambda s=s: call(native, s))
        assert same_bits(s, several[0])


X = torch.zeros(6, 5, 3, 3)


def problem(**change):
    made = {name: [X.clone()] for name in ("parameters", "exp_avgs", "exp_avg_sqs", "emas")}
    return replace(Trained(**made, copies=[X.bfloat16()]), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": []}, "parameter: no tensors"),
        ({"exp_avgs": []}, "0 tensors of exp_avg, 1 of parameter"),
        ({"gradients": [X.mT[:5]]}, r"gradient 0 \(5, 5, 3, 3\) and parameter 0 \(6, 5, 3, 3\) differ"),
        (
            {"exp_avg_sqs": [X.to(memory_format=torch.channels_last)]},
            "exp_avg_sq 0 and parameter 0 differ in memory order",
        ),
        ({"emas": [X.double()]}, "ema 0: torch.float64 on cpu, expected torch.float32"),
        ({"copies": [X.half()]}, "copy 0: torch.float16 on cpu, expected torch.bfloat16"),
        ({"gradients": [X.to("meta")]}, "gradient 0: torch.float32 on meta"),
        ({"parameters": [torch.zeros(6, 5, 3, 6)[..., ::2]]}, "parameter 0: strides .* are not dense"),
        ({"parameters": [torch.zeros(0)]}, r"parameter 0: no elements in \(0,\)"),
    ],
    ids=["none", "numbers", "shape", "order", "dtype", "dtype of the copy", "device", "holes", "empty"],
)
def test_refuses(change, message):
    gradients, written = change.get("gradients", [X]), {name: x for name, x in change.items() if name != "gradients"}
    with pytest.raises(ValueError, match=message):
        AdamW().step(problem(**written), gradients, LR, 1)


def test_refuses_to_write_one_memory_twice():
    written = problem()
    with pytest.raises(ValueError, match="two of the tensors to be written are the same memory"):
        AdamW().step(replace(written, emas=written.parameters), [X], LR, 1)


def test_refuses_a_step_before_the_first():
    with pytest.raises(ValueError, match="step number 0: the first is 1"):
        AdamW().step(problem(), [X], LR, 0)


def test_a_changed_tensor_is_looked_at_again():
    """`model.to(...)` puts other memory behind the same parameters."""
    parameter = torch.nn.Parameter(torch.zeros(6, 5, 3, 3))
    written = Trained([parameter], *([torch.zeros_like(parameter)] for _ in range(2)))
    gradient = torch.ones_like(parameter)
    AdamW().step(written, [gradient], LR, 1)
    parameter.data = parameter.data.clone()
    AdamW().step(written, [gradient], LR, 2)
    assert (parameter < -1.5 * LR).all()
    with pytest.raises(ValueError, match=r"parameter 0: torch\.float32 on cpu, expected torch.float32 on cuda"):
        written.pointers(torch.device("cuda"))
    parameter.data = parameter.data.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="exp_avg 0 and parameter 0 differ in memory order"):
        AdamW().step(written, [gradient], LR, 3)
