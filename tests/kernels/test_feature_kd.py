"""The Triton kernel of feature distillation: the contract, and what only this kernel has."""

from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch

from bilevel_kernels.feature_kd import feature_kd, feature_kd_bytes, feature_kd_fwd
from feature_kd_contract import (
    BF16,
    F16,
    F32,
    SHAPES,
    Distillation,
    FeatureKDContract,
    RefusesASecondBackward,
    compare,
    pairs,
)
from mutants import mutated

module = import_module("bilevel_kernels.feature_kd")  # the package's attribute of that name may be the function


@pytest.fixture
def kd(device):
    return Distillation(feature_kd, [*product((F32, F16, BF16), repeat=2)], device)


class TestContract(FeatureKDContract, RefusesASecondBackward):
    pass


def test_sixteen_pairs_of_all_dtypes(kd):
    student, teacher = pairs(kd, [(k + 1, 3) for k in range(16)])
    compare(feature_kd, [s.to((F32, F16, BF16)[k % 3]) for k, s in enumerate(student)], teacher)


def test_more_partial_sums_than_the_second_pass_adds_at_a_time(kd, monkeypatch):
    monkeypatch.setattr(module, "PARTIALS", 2)
    compare(feature_kd, *pairs(kd))


@pytest.mark.parametrize("upstream", [1.0, 2.0**16])
def test_fp16_gradients_do_not_underflow(upstream, kd):
    """0.1 / (K n) is 1e-9 for a block of SD 2.1 at batch 16; a loss scale brings the gradient back into range."""
    student, teacher = pairs(kd, [(5,), (2, 20, 24, 24)], (F16, F16))
    compare(feature_kd, student, teacher, 1e-4, upstream)


def test_fp16_gradients_do_not_overflow(device):
    student, teacher = (
        [torch.full((1,), 65504.0, device=device, dtype=F16)],
        [torch.full((1,), -65504.0, device=device)],
    )
    compare(feature_kd, student, teacher, upstream=0.25)


def test_no_buffers_without_gradients(kd):
    assert feature_kd_fwd(*pairs(kd), 1.0, False)[2] == []


@pytest.mark.parametrize("grad", [True, False])
def test_is_a_well_formed_custom_op(grad, kd):
    student, teacher = pairs(kd, [(3, 5), (2, 3, 4, 4)], (BF16, F32))
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
def test_a_planted_bug_is_found(bug, kd, tmp_path, monkeypatch):
    mutant = mutated(Path(module.__file__), *BUGS[bug], tmp_path)
    monkeypatch.setattr(mutant, "PARTIALS", 2)
    student, teacher = pairs(kd, SHAPES[:5])
    student[0] = student[0].half()
    with pytest.raises(AssertionError):
        compare(mutant.feature_kd, student, teacher, weight=0.07)
