import pytest
import torch
import torch.nn.functional as F

import numerics
from bilevel_fast.ops.native import feature_kd

# 64 sums side by side, 8 rows of them added up in float, chunks of 2^14
SIZES = [1, 7, 63, 64, 65, 511, 512, 513, 2**14, 2**14 + 1, 3 * 2**14 + 700]
BLOCKS = [(2, 48, 8, 8), (2, 96, 4, 4), (2, 96, 1, 1), (3, 5, 7, 3)]
WEIGHT = 0.1


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Memory that torch hands out uninitialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pairs(shapes, **kwargs):
    """Student and teacher, away from zero by many of their deviations and not far from each other."""
    student = [-2.3 + 0.5 * torch.randn(s) for s in shapes]
    teacher = [t + 0.3 * torch.randn_like(t) + 0.1 for t in student]
    return [t.to(**kwargs) for t in student], [t.to(**kwargs) for t in teacher]


def eager(student, teacher, weight=WEIGHT):
    """Losses and gradients as `bilevel_fast.training.losses` computes them."""
    student = [s.detach().requires_grad_() for s in student]
    losses = torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)])
    return losses.detach(), list(torch.autograd.grad(weight * losses.mean(), student))


def assert_as_good_as_eager(student, teacher):
    losses, gradients = feature_kd(student, teacher, WEIGHT)
    other_losses, other_gradients = eager(student, teacher)
    gold_losses, gold_gradients = eager([s.double() for s in student], [t.double() for t in teacher])
    for k, *values in zip(range(len(student)), losses, other_losses, gold_losses, strict=True):
        numerics.assert_no_worse_than_eager(f"loss {k}", *values)
    for k, *values in zip(range(len(student)), gradients, other_gradients, gold_gradients, strict=True):
        numerics.assert_no_worse_than_eager(f"gradient {k}", *values)
    return gradients


@pytest.mark.parametrize("size", SIZES)
def test_one_pair(size, instruction_set):
    assert_as_good_as_eager(*pairs([(size,)]))


def test_pairs_of_many_sizes(instruction_set):
    assert_as_good_as_eager(*pairs([(size,) for size in SIZES]))


def test_channels_last(instruction_set):
    student, teacher = pairs(BLOCKS, memory_format=torch.channels_last)
    for s, g in zip(student, assert_as_good_as_eager(student, teacher), strict=True):
        assert g.stride() == s.stride()


def test_any_dense_order():
    student, teacher = (
        [t.permute(2, 0, 3, 1) for t in tensors] for tensors in pairs(BLOCKS, memory_format=torch.channels_last)
    )
    assert_as_good_as_eager(student, teacher)


def test_memory_off_by_one_float(instruction_set):
    """Bits do not depend on alignment, and what lies around the tensors is neither read nor written."""
    student, teacher = pairs([(size,) for size in SIZES])

    def shifted(tensors):
        padded = [F.pad(t, (1, 1), value=float("nan")) for t in tensors]
        return [p[1:-1] for p in padded]

    for a, b in zip(
        _flat(feature_kd(student, teacher, WEIGHT)),
        _flat(feature_kd(shifted(student), shifted(teacher), WEIGHT)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_large_mean_of_squares_is_exact():
    """2^24 ones and more: a float sum would stand still there."""
    student, teacher = [torch.ones(2**24 + 2**10)], [torch.zeros(2**24 + 2**10)]
    losses, _ = feature_kd(student, teacher, WEIGHT)
    assert losses.item() == 1.0


@pytest.mark.parametrize("difference", [0.3, 0.7, 1.1, 1.3, 1.7, 1.9])
def test_equal_terms(difference, instruction_set):
    """Roundings of equal terms do not cancel: the squares, seven additions of eight of them, and the result."""
    student = torch.full((2**16,), difference)
    losses, _ = feature_kd([student], [torch.zeros_like(student)], WEIGHT)
    gold = student[0].double().square()
    assert abs(losses.double() - gold) <= 9 * 2**-24 * gold


def test_same_bits_twice_and_on_any_number_of_threads(instruction_set, at_threads):
    student, teacher = pairs([(size,) for size in SIZES])
    first, *others = (_flat(at_threads(n, lambda: feature_kd(student, teacher, WEIGHT))) for n in (1, 1, 2, 3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_pair_does_not_depend_on_the_others():
    student, teacher = pairs([(size,) for size in SIZES])
    together, _ = feature_kd(student, teacher, WEIGHT)
    alone = [feature_kd([s], [t], WEIGHT)[0] for s, t in zip(student, teacher, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_non_finite_values_stay_where_they_are():
    student, teacher = pairs([(700,), (700,)])
    student[0][3], teacher[0][600] = float("nan"), float("inf")
    losses, (first, second) = feature_kd(student, teacher, WEIGHT)
    assert losses.isfinite().tolist() == [False, True]
    assert first.isfinite().sum() == 698
    assert second.isfinite().all()


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
        feature_kd(*change(*pairs(BLOCKS)), WEIGHT)


def _flat(result):
    losses, gradients = result
    return [losses, *gradients]
