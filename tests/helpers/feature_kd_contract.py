"""What every feature distillation keeps to; a file of tests has the fixture `kd` and a subclass of the contract."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from bilevel_kernels.feature_kd import feature_kd_ref
from numerics import assert_no_worse_than_eager

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# one element; ragged; a block of Triton exactly, and one more; several blocks and a rest;
# around 64 sums side by side, 8 rows of them added up in float, chunks of 2^14
SHAPES = [
    *((1, 1), (3, 5, 7, 11), (4096,), (1, 4097), (2, 20, 24, 24)),
    *((63,), (64,), (65,), (511,), (512,), (513,), (2**14,), (2**14 + 1,)),
]


@dataclass(frozen=True)
class Distillation:
    """An implementation with the signature of `feature_kd_ref`, and what it takes."""

    fn: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]] = ((F32, F32),)  # of student and teacher
    device: str = "cpu"


def pairs(kd, shapes=SHAPES, dtypes=None):
    """Student and teacher, away from zero by many of their deviations."""
    student = [-2.3 + 0.5 * torch.randn(s) for s in shapes]
    teacher = [s + 0.3 * torch.randn_like(s) + 0.1 for s in student]
    both = zip((student, teacher), dtypes or kd.dtypes[0], strict=True)
    return [[x.to(kd.device, dtype) for x in xs] for xs, dtype in both]


def run(fn, student, teacher, weight=1.0, upstream=0.3):
    """Total, terms and gradients."""
    student = [s.detach().requires_grad_() for s in student]
    total, terms = fn(student, teacher, weight)
    total.backward(torch.full_like(total, upstream))  # not 1: catches a backward that ignores it
    return [total.detach(), terms, *(s.grad for s in student)]


def compare(fn, student, teacher, weight=1.0, upstream=0.3):
    gold = run(feature_kd_ref, [s.double() for s in student], [t.double() for t in teacher], weight, upstream)
    eager = run(feature_kd_ref, student, teacher, weight, upstream)
    found = run(fn, student, teacher, weight, upstream)
    names = ["total", *(f"ds[{k}]" for k in range(len(student)))]
    parts = ([x[0], *x[2:]] for x in (found, eager, gold))
    for name, f, e, g in zip(names, *parts, strict=True):
        assert_no_worse_than_eager(name, f, e, g)
    for k, (f, e, g) in enumerate(zip(found[1], eager[1], gold[1], strict=True)):
        assert_no_worse_than_eager(f"term {k}", f, e, g)
    for ds, s in zip(found[2:], student, strict=True):
        assert ds.dtype == s.dtype
        strides = [(mine, wanted) for mine, wanted, n in zip(ds.stride(), s.stride(), s.shape, strict=True) if n > 1]
        assert all(mine == wanted for mine, wanted in strides), strides


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class FeatureKDContract:
    def test_as_good_as_eager(self, kd):
        compare(kd.fn, *pairs(kd), weight=0.7)
        for dtypes in kd.dtypes[1:]:
            compare(kd.fn, *pairs(kd, SHAPES[:4], dtypes), weight=0.7)

    @pytest.mark.parametrize("upstream", [1.0, 0.3])
    def test_one_pair(self, upstream, kd):
        compare(kd.fn, *pairs(kd, [(3, 5)]), upstream=upstream)

    def test_each_term_is_its_own(self, kd):
        """Pairs of very different error: a term that holds a block of another's shows; alone it has the same bits."""
        student, teacher = pairs(kd)
        student = [s * 10.0 ** (k % 5) for k, s in enumerate(student)]
        compare(kd.fn, student, teacher)
        alone = [kd.fn([s], [t], 1.0)[1] for s, t in zip(student, teacher, strict=True)]
        assert torch.equal(kd.fn(student, teacher, 1.0)[1], torch.cat(alone))

    def test_channels_last(self, kd):
        shapes = [(2, 48, 8, 8), (2, 3, 5, 7), (2, 1, 5, 7), (1, 3, 1, 1)]  # the last two: the same memory either way
        student, teacher = ([x.to(memory_format=torch.channels_last) for x in xs] for xs in pairs(kd, shapes))
        compare(kd.fn, student, teacher)
        plain = [t.clone(memory_format=torch.contiguous_format) for t in teacher[2:]]
        compare(kd.fn, student, [*teacher[:2], *plain])

    def test_views_at_any_address(self, kd):
        """Bits do not depend on alignment, and what lies around the tensors is not read."""
        student, teacher = pairs(kd, [(size,) for size in (1, 17, 64, 513, 4099, 2**14 + 1)])

        def shifted(tensors):
            around = [torch.nn.functional.pad(x, (1, 1), value=float("nan")) for x in tensors]
            return [x[1:-1] for x in around]

        assert same(run(kd.fn, student, teacher), run(kd.fn, shifted(student), shifted(teacher)))

    def test_same_bits_twice(self, kd):
        student, teacher = pairs(kd)
        assert same(run(kd.fn, student, teacher), run(kd.fn, student, teacher))

    def test_a_tensor_may_stand_twice(self, kd):
        """As the outputs of two blocks do where the second one is dropped whole."""
        s, t = torch.randn(2, 17, device=kd.device)
        expected, got = s.clone().requires_grad_(), s.clone().requires_grad_()
        feature_kd_ref([expected, expected], [t, 2 * t])[0].backward()
        kd.fn([got, got], [t, 2 * t], 1.0)[0].backward()
        torch.testing.assert_close(got.grad, expected.grad)

    def test_gradients_of_those_that_need_one(self, kd):
        student, teacher = pairs(kd)
        student[1].requires_grad_()
        total, terms = kd.fn(student, teacher, 1.0)
        assert not terms.requires_grad
        total.backward()
        expected = 2 * (student[1] - teacher[1]) / (len(student) * student[1].numel())
        torch.testing.assert_close(student[1].grad, expected.detach())
        assert all(s.grad is None for s in (student[0], *student[2:]))

    def test_without_gradients(self, kd):
        student, teacher = pairs(kd)
        assert not kd.fn(student, teacher, 1.0)[0].requires_grad
        with torch.no_grad():
            assert not kd.fn([s.requires_grad_() for s in student], teacher, 1.0)[0].requires_grad

    def test_gradients_add_up_in_the_graph(self, kd):
        """A student tensor is used further on, as block outputs are: the stored gradient stays what it is."""
        student, teacher = pairs(kd, [(17,)])
        s = student[0].requires_grad_()
        x = s * 1.0
        (3 * kd.fn([x], teacher, 1.0)[0] + (5 * x).sum()).backward()
        torch.testing.assert_close(s.grad, (6 / 17 * (s - teacher[0]) + 5).detach())

    def test_non_finite_values_stay_where_they_are(self, kd):
        student, teacher = pairs(kd, [(700,), (700,)])
        student[0][3], teacher[0][600] = float("nan"), float("inf")
        _, terms, first, second = run(kd.fn, student, teacher)
        assert terms.isfinite().tolist() == [False, True]
        assert first.isfinite().sum() == 698
        assert second.isfinite().all()

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_traced_whole(self, dynamic, kd):
        student, teacher = pairs(kd, [(3, 5), (7,)])
        torch._dynamo.reset()
        compare(torch.compile(kd.fn, backend="aot_eager", fullgraph=True, dynamic=dynamic), student, teacher)


class RefusesASecondBackward:
    """Of those that store the gradient in the forward pass and scale it in place; autograd notices."""

    @pytest.mark.parametrize("upstream", [1.0, 0.3])
    def test_a_second_backward_is_refused(self, upstream, kd):
        student, teacher = pairs(kd, [(3, 5), (7,)])
        total, _ = kd.fn([s.requires_grad_() for s in student], teacher, 1.0)
        total.backward(torch.full_like(total, upstream), retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
