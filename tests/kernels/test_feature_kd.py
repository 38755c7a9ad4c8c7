from importlib import import_module
from pathlib import Path

import pytest
import torch

from bilevel_kernels.feature_kd import BLOCK, feature_kd, feature_kd_bytes, feature_kd_fwd, feature_kd_ref
from mutants import mutated
from numerics import assert_no_worse_than_eager

module = import_module("bilevel_kernels.feature_kd")  # the package's attribute of that name may be the function

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# one element; ragged; a block exactly; a block and one; several blocks and a rest
SHAPES = [(1, 1), (3, 5, 7, 11), (BLOCK,), (1, BLOCK + 1), (2, 20, 24, 24)]


def pairs(device, shapes=SHAPES, student=F32, teacher=F32):
    return [[torch.randn(s, device=device, dtype=dtype) for s in shapes] for dtype in (student, teacher)]


def run(fn, student, teacher, weight=1.0, upstream=0.3):
    student = [s.detach().requires_grad_() for s in student]
    total, terms = fn(student, teacher, weight)
    total.backward(torch.full_like(total, upstream))  # not 1: catches a backward that ignores it
    return [total.detach(), terms, *(s.grad for s in student)]


def compare(fn, student, teacher, weight=1.0, upstream=0.3):
    gold = run(feature_kd_ref, [s.double() for s in student], [t.double() for t in teacher], weight, upstream)
    eager = run(feature_kd_ref, student, teacher, weight, upstream)
    kernel = run(fn, student, teacher, weight, upstream)
    names = ["total", "terms", *(f"ds[{k}]" for k in range(len(student)))]
    for name, k, e, g in zip(names, kernel, eager, gold, strict=True):
        assert_no_worse_than_eager(name, k, e, g)
    for ds, s in zip(kernel[2:], student, strict=True):
        assert ds.dtype == s.dtype
        assert ds.stride() == s.stride()


@pytest.mark.parametrize("teacher", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("student", [F32, F16, BF16], ids=str)
def test_feature_kd(student, teacher, device):
    compare(feature_kd, *pairs(device, student=student, teacher=teacher), weight=0.7)


def test_each_term_is_its_own(device):
    """Pairs of very different error: a term that holds a block of another's shows."""
    student, teacher = pairs(device)
    compare(feature_kd, [s * 10.0**k for k, s in enumerate(student)], teacher)


def test_one_pair_and_sixteen_of_all_dtypes(device):
    compare(feature_kd, *pairs(device, [(3, 5)]))
    student, teacher = pairs(device, [(k + 1, 3) for k in range(16)])
    compare(feature_kd, [s.to((F32, F16, BF16)[k % 3]) for k, s in enumerate(student)], teacher)


def test_more_partial_sums_than_the_second_pass_adds_at_a_time(device, monkeypatch):
    monkeypatch.setattr(module, "PARTIALS", 2)
    compare(feature_kd, *pairs(device))


@pytest.mark.parametrize("upstream", [1.0, 2.0**16])
def test_fp16_gradients_do_not_underflow(upstream, device):
    """0.1 / (K n) is 1e-9 for a block of SD 2.1 at batch 16; a loss scale brings the gradient back into range."""
    student, teacher = pairs(device, [(5,), (2, 20, 24, 24)], F16, F16)
    compare(feature_kd, student, teacher, 1e-4, upstream)


def test_fp16_gradients_do_not_overflow(device):
    student, teacher = (
        [torch.full((1,), 65504.0, device=device, dtype=F16)],
        [torch.full((1,), -65504.0, device=device)],
    )
    compare(feature_kd, student, teacher, upstream=0.25)


def test_channels_last(device):
    shapes = [(2, 3, 5, 7), (2, 1, 5, 7), (1, 3, 1, 1)]  # of the last two, both layouts are the same memory
    student, teacher = ([x.to(memory_format=torch.channels_last) for x in xs] for xs in pairs(device, shapes))
    compare(feature_kd, student, teacher)
    compare(feature_kd, student, [teacher[0], *(t.clone(memory_format=torch.contiguous_format) for t in teacher[1:])])


def test_views_that_are_not_aligned(device):
    compare(feature_kd, *([x[1:] for x in xs] for xs in pairs(device, [(18,), (BLOCK + 3,)])))


def test_same_bits_twice(device):
    student, teacher = pairs(device)
    for one, two in zip(run(feature_kd, student, teacher), run(feature_kd, student, teacher), strict=True):
        assert torch.equal(one, two)


def test_a_tensor_may_stand_twice(device):
    """As the outputs of two blocks do where the second one is dropped whole."""
    s, t = torch.randn(17, device=device), torch.randn(17, device=device)
    expected, got = s.clone().requires_grad_(), s.clone().requires_grad_()
    feature_kd_ref([expected, expected], [t, 2 * t])[0].backward()
    feature_kd([got, got], [t, 2 * t])[0].backward()
    torch.testing.assert_close(got.grad, expected.grad)


def test_gradients_of_those_that_need_one(device):
    student, teacher = pairs(device)
    student[1].requires_grad_()
    feature_kd(student, teacher)[0].backward()
    expected = 2 * (student[1] - teacher[1]) / (len(student) * student[1].numel())
    torch.testing.assert_close(student[1].grad, expected.detach())
    assert all(s.grad is None for s in (student[0], *student[2:]))


def test_no_buffers_without_gradients(device):
    student, teacher = pairs(device)
    assert feature_kd_fwd(student, teacher, 1.0, False)[2] == []
    assert not feature_kd(student, teacher)[0].requires_grad
    with torch.no_grad():
        assert not feature_kd([s.requires_grad_() for s in student], teacher)[0].requires_grad


def test_terms_carry_no_gradient(device):
    student, teacher = pairs(device)
    assert not feature_kd([s.requires_grad_() for s in student], teacher, 0.5)[1].requires_grad


@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_a_second_backward_is_refused(upstream, device):
    """The stored gradient was scaled in place; autograd notices."""
    student, teacher = pairs(device)
    total, _ = feature_kd([s.requires_grad_() for s in student], teacher)
    total.backward(torch.full_like(total, upstream), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_gradients_add_up_in_the_graph(device):
    """A student tensor is used further on, as block outputs are: the stored gradient stays what it is."""
    student, teacher = pairs(device, [(17,)])
    s = student[0].requires_grad_()
    x = s * 1.0
    (3 * feature_kd([x], teacher)[0] + (5 * x).sum()).backward()
    torch.testing.assert_close(s.grad, (6 / 17 * (s - teacher[0]) + 5).detach())


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_whole(dynamic, device):
    student, teacher = pairs(device, [(3, 5), (7,)])
    compare(torch.compile(feature_kd, backend="aot_eager", fullgraph=True, dynamic=dynamic), student, teacher)


@pytest.mark.parametrize("grad", [True, False])
def test_is_a_well_formed_custom_op(grad, device):
    student, teacher = pairs(device, [(3, 5), (2, 3, 4, 4)], BF16)
    student[1], teacher[1] = (x.to(memory_format=torch.channels_last) for x in (student[1], teacher[1]))
    # With gradients, tracing is tested above: ds may not be an output of what is traced, as it is mutated in backward.
    aot = () if grad else ("test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        feature_kd_fwd,
        ([s.requires_grad_(grad) for s in student], teacher, 0.5, grad),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", *aot),
    )


def x(*shape, **kwargs):
    return torch.ones(shape, **kwargs)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([x(3)], [x(3), x(3)], "student has 1 tensors, teacher 2"),
        ([], [], "student: 0 tensors, expected 1 to 16"),
        ([x(3)] * 17, [x(3)] * 17, "student: 17 tensors, expected 1 to 16"),
        ([x(3), x(3)], [x(3), x(4)], r"student\[1\]: shape \(3,\), teacher\[1\] has \(4,\)"),
        ([x(3), x(0)], [x(3), x(0)], r"student\[1\]: shape \(0,\) has no elements"),
        ([x(3, dtype=torch.float64)], [x(3)], r"student\[0\]: torch.float64, expected"),
        ([x(3)], [x(3, dtype=torch.int32)], r"teacher\[0\]: torch.int32, expected"),
        ([x(3)], [x(3, device="meta")], r"teacher\[0\]: on meta, student\[0\] is on cpu"),
        ([x(3)] * 3 + [x(4, 4).mT[:2]], [x(3)] * 3 + [x(4, 4)[:2]], r"student\[3\]: strides \(1, 4\), teacher\[3\]"),
        ([x(4, 4)[:, ::2]], [x(4, 4)[:, ::2]], r"student\[0\]: strides \(4, 2\)"),
        ([x(2, 3, 4, 4)], [x(2, 3, 4, 4).to(memory_format=torch.channels_last)], r"neither both contiguous nor both"),
    ],
    ids=["count", "none", "many", "shape", "empty", "dtype", "teacher", "device", "strides", "gaps", "layouts"],
)
def test_refuses(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        feature_kd(student, teacher)


def test_bytes():
    student, teacher = [x(2, 3), x(5, dtype=BF16)], [x(2, 3, dtype=BF16), x(5)]
    assert feature_kd_bytes(student, teacher, grad=False) == 24 + 10 + 12 + 20
    assert feature_kd_bytes(student, teacher, grad=True) == 2 * (24 + 10) + 12 + 20


BUGS = {
    "a pair's last program is the next one's": ("(pid < ends[k])", "(pid < ends[k] - 1)"),
    "masked lanes hold something": ("s_ptrs[k] + offs, mask=mask, other=0.0", "s_ptrs[k] + offs, mask=mask, other=1.0"),
    "offset not from the pair's start": ("(pid - firsts[k]).to", "pid.to"),
    "terms are sums": ("/ sizes[k])", "/ 1.0)"),
    "total is not weighted": ("tl.sum(acc, axis=0) * scale", "tl.sum(acc, axis=0)"),
    "gradient of another pair's size": ("r * scales[k]", "r * scales[0]"),
    "upstream gradient ignored": ("    scale_unless_one_(ds, dtotal, ctx.by)\n", ""),
    "power of two not taken back": ("(ds, dtotal, ctx.by)", "(ds, dtotal, 1.0)"),
    "a term starts at the first block": ("start += tl.where(pid == k, firsts[k], 0)", "start += 0 * firsts[k]"),
    "the second pass stops after one load": ("start += PARTIALS", "start = end"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, device, tmp_path, monkeypatch):
    mutant = mutated(Path(module.__file__), *BUGS[bug], tmp_path)
    monkeypatch.setattr(mutant, "PARTIALS", 2)
    student, teacher = pairs(device)
    student[0] = student[0].half()
    with pytest.raises(AssertionError):
        compare(mutant.feature_kd, student, teacher, weight=0.07)
