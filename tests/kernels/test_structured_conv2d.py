import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F

from bilevel_kernels.kept import Kept
from mutants import mutated
from numerics import assert_no_worse_than_eager

op = importlib.import_module("bilevel_kernels.structured_conv2d")
wgrad = importlib.import_module("bilevel_kernels.structured_conv2d_wgrad")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BATCH, C_IN, C_OUT = 3, 40, 60
SHAPES = {"3x3": (3, 5, 7), "1x1": (1, 5, 7), "one pixel": (3, 1, 1), "two tiles of pixels": (3, 13, 11)}
LISTS = {
    "dense": (None, None),
    "everything": (Kept.same(4, range(4)), Kept.same(6, range(6))),
    "in": (Kept.same(4, [0, 2]), None),
    "out": (None, Kept.same(6, [1, 2, 5])),
    "both": (Kept.same(4, [3]), Kept.same(6, [0, 5])),
    "two alike": (Kept.per_sample(4, [[0], [0, 1, 3], [0, 1, 3]]), Kept.per_sample(6, [[0, 5], [0, 2], [0, 2]])),
    "mixed": (Kept.per_sample(4, [[0], [1, 3], [0, 1, 2, 3]]), Kept.per_sample(6, [[0, 5], [2], [0, 5]])),
}
ALL_LISTS = pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS.keys())
NAMES = ("out", "dx", "dweight", "dbias", "dtime", "dresidual")


def problem(device, dtype=torch.float32, size=3, height=5, width=7, batch=BATCH):
    """x, weight, bias, time, residual, and an upstream gradient that is 1 nowhere."""
    shapes = [(batch, C_IN, height, width), (C_OUT, C_IN, size, size), (C_OUT,), (batch, C_OUT)]
    shapes += [(batch, C_OUT, height, width)] * 2
    tensors = [torch.randn(shape).to(device, dtype) for shape in shapes]
    return [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]


def run(fn, tensors, kept_in, kept_out):
    *inputs, dout = tensors
    x, weight, bias, time, residual = leaves = [t.detach().requires_grad_() for t in inputs]
    out = fn(x, weight, bias, kept_in=kept_in, kept_out=kept_out, time=time, residual=residual)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_all_no_worse(fn, tensors, kept_in, kept_out):
    gold = run(op.structured_conv2d_ref, [t.double() for t in tensors], kept_in, kept_out)
    eager = run(op.structured_conv2d_ref, tensors, kept_in, kept_out)
    for values in zip(NAMES, run(fn, tensors, kept_in, kept_out), eager, gold, strict=True):
        assert_no_worse_than_eager(*values)


@ALL_LISTS
def test_no_worse_than_eager(lists, device):
    """In 16 bits the lists are read as in fp32: on a CPU, two of them do."""
    few = device == "cpu" and not any(lists is LISTS[name] for name in ("dense", "mixed"))
    for dtype in DTYPES[:1] if few else DTYPES:
        assert_all_no_worse(op.structured_conv2d, problem(device, dtype), *lists)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("lists", [LISTS["dense"], LISTS["mixed"]], ids=["dense", "mixed"])
def test_shapes(shape, lists, device):
    assert_all_no_worse(op.structured_conv2d, problem(device, torch.float32, *shape), *lists)


def test_more_channels_than_a_tile(device):
    """160 and 150 channels, units of 10: two tiles of results and five of operands, the last ones ragged."""
    x, weight = torch.randn(1, 160, 2, 3, device=device), torch.randn(150, 160, 3, 3, device=device)
    kept_in, kept_out = Kept.same(16, [0, 3, 4, 5, 8, 9, 15]), Kept.same(15, [*range(1, 8), *range(9, 15)])
    bias, time = torch.randn(150, device=device), torch.randn(1, 150, device=device)
    residual, dout = torch.randn(2, 1, 150, 2, 3, device=device)
    tensors = [x, weight, bias, time, residual, dout]
    tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    assert_all_no_worse(op.structured_conv2d, tensors, kept_in, kept_out)


@pytest.mark.parametrize("lists", [LISTS["in"], LISTS["out"], LISTS["both"]], ids=["in", "out", "both"])
def test_gradients_are_those_of_the_sliced_model(lists, device):
    """Kept weights: as a convolution of sliced tensors. Dropped ones, and dropped inputs: exactly 0."""
    x, weight, bias, _, _, dout = tensors = problem(device)
    masks = [
        torch.ones(c, dtype=torch.bool, device=device) if kept is None else kept.mask(10, 1, x.device)[0]
        for kept, c in zip(lists, (C_IN, C_OUT), strict=True)
    ]
    (i, o) = (m.nonzero()[:, 0] for m in masks)
    sliced = [t.double().requires_grad_() for t in (x[:, i], weight[o][:, i], bias[o])]
    gold = torch.autograd.grad(F.conv2d(*sliced, padding=1), sliced, dout[:, o].double())
    _, dx, dweight, dbias, *_ = run(op.structured_conv2d, tensors, *lists)
    for mine, theirs in zip((dx[:, i], dweight[o][:, i], dbias[o]), gold, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    assert not dx[:, ~masks[0]].any()
    assert not dweight[~masks[1]].any()
    assert not dweight[:, ~masks[0]].any()
    assert not dbias[~masks[1]].any()


def test_a_mixed_batch_is_each_sample_alone(device):
    kept_in, kept_out = LISTS["mixed"]
    tensors = problem(device)
    mixed = run(op.structured_conv2d, tensors, kept_in, kept_out)
    summed = [torch.zeros_like(t) for t in mixed[2:4]]
    for b in range(BATCH):
        alone = [t[b : b + 1].clone(memory_format=torch.channels_last) if t.dim() == 4 and t.shape[0] == BATCH else t
                 for t in tensors]  # fmt: skip
        alone[3] = tensors[3][b : b + 1]
        lists = (Kept.same(kept.units, kept.lists[kept.rows[b]]) for kept in (kept_in, kept_out))
        out, dx, dweight, dbias, dtime, _ = run(op.structured_conv2d, alone, *lists)
        for mine, of_mixed in ((out, mixed[0]), (dx, mixed[1]), (dtime, mixed[4])):
            assert torch.equal(mine[0], of_mixed[b])
        summed = [s + g for s, g in zip(summed, (dweight, dbias), strict=True)]
    torch.testing.assert_close(summed, mixed[2:4])


def test_same_bits_twice(device):
    tensors = problem(device)
    for one, two in zip(*(run(op.structured_conv2d, tensors, *LISTS["mixed"]) for _ in range(2)), strict=True):
        assert torch.equal(one, two)


def test_lists_are_copied_to_the_device_once(device, monkeypatch):
    """A copy from the host would stall the stream, and cannot be in a CUDA graph."""
    tensors = problem(device, height=2, width=2)
    run(op.structured_conv2d, tensors, *LISTS["mixed"])
    monkeypatch.setattr(torch, "tensor", None)
    monkeypatch.setattr(Kept, "mask", None)
    run(op.structured_conv2d, tensors, *LISTS["mixed"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="tiles are counted in the interpreter")
@pytest.mark.parametrize("kept", [8, 6, 4, 2])
def test_masked_channels_cost_nothing(kept, monkeypatch):
    """Matrix products that were executed: those of the kept channels' tiles and no more, sample by sample."""
    done = []
    real = op.dot
    monkeypatch.setattr(op, "dot", lambda *args: done.append(1) or real(*args))
    monkeypatch.setattr(op, "config", lambda *_: {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16})
    x = torch.randn(2, 128, 4, 4).to(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3).to(memory_format=torch.channels_last)
    kept_in = Kept.per_sample(8, [range(kept), [7]])
    kept_out = Kept.per_sample(8, [[0], range(8 - kept, 8)])
    op.structured_conv2d(x, weight, kept_in=kept_in, kept_out=kept_out)
    assert len(done) == 9 * (kept * 1 + 1 * kept)


def test_well_formed_custom_ops(device):
    x, weight, bias, time, residual, dout = (t.requires_grad_() for t in problem(device, height=2, width=3))
    kept_in, kept_out = (kept.encoded() for kept in LISTS["mixed"])
    torch.library.opcheck(op.structured_conv2d_fwd, (x, weight, bias, time, residual, kept_in, kept_out))
    torch.library.opcheck(op.structured_conv2d_fwd, (x, weight, None, None, None, [], []))
    with torch.no_grad():
        plain = [t.detach() for t in (dout, weight, x)]
        torch.library.opcheck(op.structured_conv2d_dgrad, (*plain[:2], kept_in, kept_out))
        torch.library.opcheck(op.structured_conv2d_sums, (plain[0], kept_out))
        torch.library.opcheck(wgrad.structured_conv2d_wgrad, (plain[0], plain[2], 3, kept_in, kept_out))


# what the planted bug replaces, by what
DGRAD = {
    "taps not mirrored": ("down, right = -down, -right", "down, right = down, right"),
    "one axis not mirrored": ("down, right = -down, -right", "down, right = -down, right"),
    "weights not transposed": ("**(backward if mirror else forward)", "**forward"),
    "lists exchanged": ("dout, weight, dx, outputs, inputs, True", "dout, weight, dx, inputs, outputs, True"),
    "the row of another sample": ("row = tl.load(c_row_ptr + b)", "row = tl.load(c_row_ptr)"),
    "the block before": ("(step + 1) // TAPS * BLOCK_K", "step // TAPS * BLOCK_K"),
    "tail of the list unmasked": ("tl.arange(0, BLOCK_K) < c_count", "tl.arange(0, BLOCK_K) < c_count + 1"),
}  # fmt: skip
WGRAD = {
    "taps mirrored": ("yy, xx = p // W + down, p % W + right", "yy, xx = p // W - down, p % W - right"),
    "a row wraps around": ("(xx >= 0) & (xx < W)", "(yy * W + xx < H * W) & (yy * W + xx >= 0)"),
    "last samples left out": ("there = place < samples", "there = place < samples - 1"),
    "the second pair overwrites the first": ("ADD=add, **sizes", "ADD=False, **sizes"),
    "one split only": ("sums_ptr += C_OUT * TAPS * C_IN", "sums_ptr += 0"),
    "the samples' numbers ignored": ("sample = tl.load(samples_ptr + place, mask=there, other=0)", "sample = place"),
    "the first list for all": ("_list(outputs, row_out, dout)", "_list(outputs, 0, dout)"),
}  # fmt: skip


def assert_noticed(fn):
    """On a mixed batch; the oracle must fail."""
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match=r"d[a-z]+: (error|\d+ non-finite)"):
        assert_all_no_worse(fn, problem("cpu"), *LISTS["two alike"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="bugs are planted in the interpreter")
@pytest.mark.parametrize("bug", DGRAD.values(), ids=DGRAD.keys())
def test_notices_a_bug_in_dgrad(bug, tmp_path, monkeypatch):
    mutant = mutated(inspect.getfile(op), *bug, tmp_path)
    monkeypatch.setattr(op, "structured_conv2d_dgrad", mutant.structured_conv2d_dgrad)
    assert_noticed(op.structured_conv2d)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bugs are planted in the interpreter")
@pytest.mark.parametrize("bug", WGRAD.values(), ids=WGRAD.keys())
def test_notices_a_bug_in_wgrad(bug, tmp_path, monkeypatch):
    mutant = mutated(inspect.getfile(wgrad), *bug, tmp_path)
    monkeypatch.setattr(op, "structured_conv2d_wgrad", mutant.structured_conv2d_wgrad)
    assert_noticed(op.structured_conv2d)


def nhwc(x):
    return x.clone(memory_format=torch.channels_last)


def bad(**changes):
    """Good inputs, of which some are changed; kept lists are given as they are."""
    inputs = dict(zip(("x", "weight", "bias", "time", "residual"), problem("cpu")[:5], strict=True))
    return inputs | {name: change(inputs[name]) if callable(change) else change for name, change in changes.items()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": lambda x: x.contiguous()}, r"x: strides \(.*\) are not channels_last"),
        ({"x": lambda x: x[0]}, r"x: shape \(40, 5, 7\), expected four dimensions"),
        ({"x": lambda x: x.double()}, "x: torch.float64 is none of"),
        ({"x": lambda x: nhwc(x[:, :20])}, r"weight: shape .* expected \(C_out, 20, k, k\)"),
        ({"weight": lambda w: nhwc(w[:, :, :, :2])}, "weight: shape"),
        ({"weight": lambda w: w.half()}, "weight: torch.float16 on cpu, x is torch.float32"),
        ({"weight": lambda w: w.to("meta")}, "weight: torch.float32 on meta, x is"),
        ({"bias": lambda b: b[1:]}, r"bias: shape \(59,\), expected \(60,\)"),
        ({"time": lambda t: t.repeat(1, 2)[:, ::2]}, r"time: strides \(120, 2\) .* are not contiguous"),
        ({"residual": lambda r: r.contiguous()}, "residual: strides"),
        ({"residual": lambda r: r[:, :, 1:]}, "residual: shape"),
        ({"kept_in": Kept.same(3, [0])}, "kept_in: 3 units do not divide 40 channels"),
        ({"kept_out": Kept.per_sample(6, [[0], [1]])}, "kept_out: lists for 2 samples, the batch has 3"),
    ],
)  # fmt: skip
def test_refuses(changes, said):
    inputs = bad(**changes)
    with pytest.raises(ValueError, match=f"^{said}"):
        op.structured_conv2d(inputs.pop("x"), inputs.pop("weight"), inputs.pop("bias"), **inputs)
