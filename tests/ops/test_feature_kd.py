"""Feature distillation by torch and by csrc/ with each instruction set: the contract, and what only those have.

The contract runs for Triton in tests/kernels.
"""

import pytest
import torch

from bilevel_fast.ops import dispatch
from bilevel_fast.ops.native import feature_kd, operators
from feature_kd_contract import Distillation, FeatureKDContract, RefusesASecondBackward, compare, pairs, same

SHAPES = [(2, 48, 8, 8), (2, 96, 4, 4), (2, 96, 1, 1), (3, 5, 7, 3)]
SIZES = [(1,), (7,), (513,), (2**14 + 1,), (3 * 2**14 + 700,)]
CPU = Distillation(lambda *args: operators.feature_kd(*args)[:2])


class TestNative(FeatureKDContract, RefusesASecondBackward):
    @pytest.fixture
    def kd(self, instruction_set):
        return CPU


class TestTorch(FeatureKDContract):
    @pytest.fixture
    def kd(self, monkeypatch):
        """Its second result is the mean of the terms: that of each pair by itself is its term."""
        monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")

        def fn(student, teacher, weight):
            terms = [dispatch.feature_kd([s], [t], 1.0)[1] for s, t in zip(student, teacher, strict=True)]
            return dispatch.feature_kd(student, teacher, weight)[0], torch.stack(terms)

        return Distillation(fn)


def test_any_dense_order():
    student, teacher = (
        [t.to(memory_format=torch.channels_last).permute(2, 0, 3, 1) for t in tensors] for tensors in pairs(CPU, SHAPES)
    )
    compare(CPU.fn, student, teacher)


def test_a_large_mean_of_squares_is_exact():
    """2^24 ones and more: a float sum would stand still there."""
    student, teacher = [torch.ones(2**24 + 2**10)], [torch.zeros(2**24 + 2**10)]
    losses, _ = feature_kd(student, teacher, 0.1)
    assert losses.item() == 1.0


@pytest.mark.parametrize("difference", [0.3, 0.7, 1.1, 1.3, 1.7, 1.9])
def test_equal_terms(difference, instruction_set):
    """Roundings of equal terms do not cancel: the squares, seven additions of eight of them, and the result."""
    student = torch.full((2**16,), difference)
    losses, _ = feature_kd([student], [torch.zeros_like(student)], 0.1)
    gold = student[0].double().square()
    assert abs(losses.double() - gold) <= 9 * 2**-24 * gold


def test_any_number_of_threads(instruction_set, at_threads):
    student, teacher = pairs(CPU, SIZES)
    (one, first), *others = (at_threads(n, lambda: feature_kd(student, teacher, 0.1)) for n in (1, 2, 3))
    assert all(torch.equal(one, losses) and same(first, gradients) for losses, gradients in others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: ([], []), "student: no tensors"),
        (lambda s, t: ([s[0][:0]], [t[0][:0]]), r"student 0: no elements in \(0, 48, 8, 8\)"),
        (lambda s, t: (s, t[:1]), "1 tensors of teacher, 4 of student"),
        (lambda s, t: (s[:1], t[1:2]), r"teacher 0 \(2, 96, 4, 4\) and student 0 \(2, 48, 8, 8\) differ in shape"),
        (
            lambda s, t: (s, [t[0], t[1].to(memory_format=torch.channels_last), *t[2:]]),
            r"teacher 1 and student 1 differ in memory order: strides \(1536, 1, 384, 96\) and \(1536, 16, 4, 1\)",
        ),
        (lambda s, t: ([s[0][:, 1:]], [t[0][:, 1:]]), r"student 0: strides .* of shape \(2, 47, 8, 8\) are not dense"),
        (lambda s, t: ([s[0][:, :1].expand(2, 48, 8, 8)], t[:1]), "student 0: strides .* are not dense"),
        (lambda s, t: ([s[0].double()], t[:1]), "student 0: torch.float64 on cpu, expected torch.float32 on cpu"),
        (lambda s, t: (s[:1], [t[0].to("meta")]), "teacher 0: torch.float32 on meta, expected torch.float32 on cpu"),
    ],
    ids=["none", "empty", "numbers", "shapes", "orders", "holes", "overlap", "dtype", "device"],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        feature_kd(*change(*pairs(CPU, SHAPES)), 0.1)
