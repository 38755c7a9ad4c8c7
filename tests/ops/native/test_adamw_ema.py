import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import numerics
from bilevel_fast.ops.native import AdamW, Trained

SIZES = [1, 7, 8, 33, 2**14 + 1, 1_000_003]  # odd, a whole vector, past a chunk, past many
SETTINGS = AdamW(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, ema_decay=0.95)
LR = 1e-3
FIELDS = ("parameters", "gradients", "exp_avgs", "exp_avg_sqs", "emas", "copies")


@dataclass(eq=False)
class Problem:
    """What a step reads and writes."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    emas: list[Tensor] | None = None
    copies: list[Tensor] | None = None

    def step(self, settings, lr, number, **kwargs):
        written = Trained(self.parameters, self.exp_avgs, self.exp_avg_sqs, self.emas, self.copies)
        settings.step(written, self.gradients, lr, number, **kwargs)


def problem(shapes, **kwargs):
    """As in the middle of a training: nothing is zero, averages and copies are not the parameters."""

    def like(fill):
        return [fill(torch.empty(s)).to(**kwargs) for s in shapes]

    return Problem(
        parameters=like(torch.randn_like),
        gradients=like(lambda t: 0.1 * torch.randn_like(t)),
        exp_avgs=like(lambda t: 0.1 * torch.randn_like(t)),
        exp_avg_sqs=like(lambda t: 0.01 * torch.rand_like(t)),
        emas=like(torch.randn_like),
        copies=[t.bfloat16() for t in like(torch.randn_like)],
    )


def formula(t, settings, lr, number, clip=1.0):
    """One step, in the dtype of the tensors, on a copy of them."""
    t = copy.deepcopy(t)
    for p, g, m, v, ema in zip(t.parameters, t.gradients, t.exp_avgs, t.exp_avg_sqs, t.emas, strict=True):
        g = g * clip
        m.lerp_(g, 1 - settings.beta1)
        v.mul_(settings.beta2).addcmul_(g, g, value=1 - settings.beta2)
        p.mul_(1 - lr * settings.weight_decay)
        corrected = v.sqrt() / (1 - settings.beta2**number) ** 0.5
        p.addcdiv_(m, corrected.add_(settings.eps), value=-lr / (1 - settings.beta1**number))
        ema.lerp_(p, 1 - settings.ema_decay)
    return replace(t, copies=[p.bfloat16() for p in t.parameters])


def double(t):
    return Problem(*([x.double() for x in getattr(t, name)] for name in FIELDS))


def tensors(t):
    return [x for name in FIELDS for x in getattr(t, name) or ()]


def assert_same_bits(a, b):
    for x, y in zip(tensors(a), tensors(b), strict=True):
        assert torch.equal(_bits(x), _bits(y))


def _bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def stepped(t, settings=SETTINGS, number=3, **kwargs):
    t = copy.deepcopy(t)
    t.step(settings, LR, number, **kwargs)
    return t


@pytest.mark.parametrize("size", SIZES)
def test_no_worse_than_eager(size, instruction_set):
    t = problem([(size,)])
    ours, eager = stepped(t, clip=0.7), formula(t, SETTINGS, LR, 3, clip=0.7)
    gold = formula(double(t), SETTINGS, LR, 3, clip=0.7)
    for name in FIELDS[:-1]:
        values = (getattr(x, name)[0] for x in (ours, eager, gold))
        numerics.assert_no_worse_than_eager(name, *values)
    assert torch.equal(ours.gradients[0], t.gradients[0])


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_ten_steps_of_torch(weight_decay, instruction_set):
    """From zero moments, with a gradient and a learning rate of its own in every step."""
    settings = AdamW(weight_decay=weight_decay)
    start = [torch.randn(size) for size in (1, 7, 8, 5000)]
    results = {}
    for name, dtype in {"ours": torch.float32, "fused": torch.float32, "gold": torch.float64}.items():
        parameters = [p.to(dtype, copy=True).requires_grad_() for p in start]
        zeros = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
        theirs = torch.optim.AdamW(parameters, weight_decay=weight_decay, fused=name == "fused")
        generator = torch.Generator().manual_seed(1)
        for number in range(1, 11):
            lr = LR * min(1.0, number / 4)
            for p in parameters:
                p.grad = (0.1 * torch.randn(p.shape, generator=generator)).to(dtype)
            if name == "ours":
                detached = [p.detach() for p in parameters]
                Problem(detached, [p.grad for p in parameters], *zeros).step(settings, lr, number)
            else:
                theirs.param_groups[0]["lr"] = lr
                theirs.step()
        moments = [theirs.state[p][key] for key in ("exp_avg", "exp_avg_sq") for p in parameters if name != "ours"]
        results[name] = [p.detach() for p in parameters] + (moments or [x for z in zeros for x in z])
    for i, values in enumerate(zip(results["ours"], results["fused"], results["gold"], strict=True)):
        numerics.assert_no_worse_than_eager(f"result {i}", *values)
        # Different order of the same roundings: ten steps, each of which may move a last bit.
        torch.testing.assert_close(*values[:2], rtol=20 * 2**-24, atol=1e-8)


def test_average_and_copy_are_of_the_new_parameters(instruction_set):
    t = problem([(5000,)])
    ours = stepped(t)
    (p,), (ema,), (before,) = ours.parameters, ours.emas, t.emas
    torch.testing.assert_close(ema.double(), 0.95 * before.double() + 0.05 * p.double(), rtol=0, atol=2**-21)
    assert torch.equal(ours.copies[0], p.bfloat16())


def test_copy_rounds_as_torch(instruction_set):
    """Ties both ways, subnormals, the largest float, infinities, NaN: parameters that a step leaves alone."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 1, 0x8000, 0x807FFFFF, 0x7F7FFFFF, 0x7F7F7FFF])
    p = torch.cat([bits.to(torch.int32).view(torch.float32), torch.tensor([0.0, -0.0, float("inf"), float("-inf")])])
    p = torch.cat([p, torch.full((1,), float("nan")), 1e3 * torch.randn(1000)])
    zeros = [torch.zeros_like(p) for _ in range(3)]
    t = Problem([p.clone()], *([z] for z in zeros), copies=[torch.empty_like(p, dtype=torch.bfloat16)])
    t.step(AdamW(), 0.0, 1)
    (found,), (after,), finite = t.copies, t.parameters, p.isfinite()
    assert torch.equal(after[finite], p[finite])
    assert torch.equal(_bits(found)[finite], _bits(after.bfloat16())[finite])
    assert not found[~finite].isfinite().any()


@pytest.mark.parametrize("without", [("emas",), ("copies",), ("emas", "copies")], ids=" ".join)
def test_average_and_copy_change_nothing_else(without, instruction_set):
    t = problem([(33,), (70,)])
    all_of_them, fewer = stepped(t), stepped(replace(t, **dict.fromkeys(without)))
    for name in set(FIELDS) - set(without):
        for x, y in zip(getattr(all_of_them, name), getattr(fewer, name), strict=True):
            assert torch.equal(x, y)


def test_skip_leaves_every_bit(instruction_set):
    t = problem([(size,) for size in SIZES[:-1]])
    t.gradients[0][0] = float("nan")
    assert_same_bits(stepped(t, skip=True), t)
    assert not stepped(t).parameters[0].isfinite().all()


def test_same_bits_twice_and_on_any_number_of_threads(instruction_set, at_threads):
    t = problem([(size,) for size in SIZES[:-1]])
    first, *others = (at_threads(n, lambda: stepped(t)) for n in (1, 1, 2, 3))
    for other in others:
        assert_same_bits(first, other)


def test_one_flat_buffer_is_many_tensors(instruction_set):
    """Bits do not depend on where in a tensor an element is."""
    t = problem([(size,) for size in SIZES[:-1]])
    flat = Problem(*([torch.cat(getattr(t, name))] for name in FIELDS))
    many, one = stepped(t), stepped(flat)
    assert_same_bits(Problem(*([torch.cat(getattr(many, name))] for name in FIELDS)), one)


def test_memory_off_by_one_element(instruction_set):
    """Bits do not depend on alignment, and what lies around the tensors is neither read nor written."""
    t = problem([(size,) for size in SIZES[:-1]])
    padded = Problem(*([F.pad(x, (1, 1), value=float("nan")) for x in getattr(t, name)] for name in FIELDS))
    Problem(*([x[1:-1] for x in getattr(padded, name)] for name in FIELDS)).step(SETTINGS, LR, 3)
    assert_same_bits(Problem(*([x[1:-1] for x in getattr(padded, name)] for name in FIELDS)), stepped(t))
    assert all(x[0].isnan() and x[-1].isnan() for x in tensors(padded))


def test_channels_last():
    """Weights of a convolution; of a 1x1 one the gradient's strides may differ where they mean nothing."""
    shapes = [(6, 5, 3, 3), (6, 5, 1, 1)]
    t = problem(shapes)
    last = Problem(*([x.to(memory_format=torch.channels_last) for x in getattr(t, name)] for name in FIELDS))
    last.gradients[1] = last.gradients[1].as_strided((6, 5, 1, 1), (5, 1, 1, 1))
    assert last.gradients[1].stride() != last.parameters[1].stride()
    last.step(SETTINGS, LR, 3)
    for x, y in zip(tensors(last), tensors(stepped(t)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": []}, "parameter: no tensors"),
        ({"exp_avgs": []}, "0 tensors of exp_avg, 1 of parameter"),
        ({"gradients": [torch.zeros(5, 6, 3, 3)]}, r"gradient 0 \(5, 6, 3, 3\) and parameter 0 \(6, 5, 3, 3\) differ"),
        (
            {"exp_avg_sqs": [torch.zeros(6, 5, 3, 3).to(memory_format=torch.channels_last)]},
            "exp_avg_sq 0 and parameter 0 differ in memory order",
        ),
        ({"emas": [torch.zeros(6, 5, 3, 3).double()]}, "ema 0: torch.float64 on cpu, expected torch.float32"),
        ({"copies": [torch.zeros(6, 5, 3, 3).half()]}, "copy 0: torch.float16 on cpu, expected torch.bfloat16"),
        ({"gradients": [torch.zeros(6, 5, 3, 3, device="meta")]}, "gradient 0: torch.float32 on meta"),
        ({"parameters": [torch.zeros(6, 5, 3, 6)[..., ::2]]}, "parameter 0: strides .* are not dense"),
        ({"parameters": [torch.zeros(0)]}, r"parameter 0: no elements in \(0,\)"),
    ],
    ids=["none", "numbers", "shape", "order", "dtype", "dtype of the copy", "device", "holes", "empty"],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        replace(problem([(6, 5, 3, 3)]), **change).step(SETTINGS, LR, 1)


def test_refuses_to_write_one_memory_twice():
    t = problem([(8,)])
    with pytest.raises(ValueError, match="two of the tensors to be written are the same memory"):
        replace(t, emas=t.parameters).step(SETTINGS, LR, 1)


def test_refuses_a_step_before_the_first():
    with pytest.raises(ValueError, match="step number 0: the first is 1"):
        problem([(8,)]).step(SETTINGS, LR, 0)


def test_a_changed_tensor_is_looked_at_again():
    """`model.to(...)` puts other memory behind the same parameters."""
    parameter = torch.nn.Parameter(torch.zeros(6, 5, 3, 3))
    written = Trained([parameter], *([torch.zeros_like(parameter)] for _ in range(2)))
    gradient = torch.ones_like(parameter)
    SETTINGS.step(written, [gradient], LR, 1)
    parameter.data = parameter.data.clone()
    SETTINGS.step(written, [gradient], LR, 2)
    assert (parameter < -1.5 * LR).all()
    with pytest.raises(ValueError, match=r"parameter 0: torch\.float32 on cpu, expected torch.float32 on cuda"):
        written.pointers(torch.device("cuda"))
    parameter.data = parameter.data.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="exp_avg 0 and parameter 0 differ in memory order"):
        SETTINGS.step(written, [gradient], LR, 3)
