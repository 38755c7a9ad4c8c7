import pytest
import torch

from bilevel_kernels import scale_unless_one as scaling
from bilevel_kernels.scale_unless_one import scale_unless_one, scale_unless_one_, scale_unless_one_ref
from mutants import mutated
from numerics import assert_no_worse_than_eager

SIZES = [(1,), (17,), (3, 5, 7, 11), (2, 4, 32, 32)]  # one element, ragged, several blocks
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def many(dtypes, device):
    return [torch.randn(size, device=device, dtype=dtype) for size in SIZES for dtype in dtypes]


@pytest.mark.parametrize(("factor", "by"), [(0.3, 1.0), (0.3, 2.0), (2.0, 2.0**-3), (-1.0, 1.0), (0.0, 1.0)])
def test_scales_every_element_of_every_tensor(factor, by, device):
    tensors, scalar = many(DTYPES, device), torch.tensor(factor, device=device)
    gold = scale_unless_one_ref([x.double() for x in tensors], scalar.double(), by)
    eager = scale_unless_one_ref(tensors, scalar, by)
    scale_unless_one_(tensors, scalar, by)
    for i, (k, e, g) in enumerate(zip(tensors, eager, gold, strict=True)):
        assert_no_worse_than_eager(f"tensors[{i}]", k, e, g)


def test_a_program_takes_several_blocks(device, monkeypatch):
    monkeypatch.setattr(scaling, "PROGRAMS", 2)
    tensors = [torch.randn(n, device=device) for n in (5 * scaling.BLOCK + 1, scaling.BLOCK, 2 * scaling.BLOCK + 3)]
    expected = [x * 0.5 for x in tensors]
    scale_unless_one_(tensors, torch.tensor(0.5, device=device))
    for x, e in zip(tensors, expected, strict=True):
        assert torch.equal(x, e)


@pytest.mark.parametrize(("factor", "by"), [(1.0, 1.0), (4.0, 0.25)])
def test_one_leaves_every_bit(factor, by, device):
    tensors = [x.fill_(float("nan")) for x in many(DTYPES, device)]
    for x in tensors:
        x.view(torch.int32 if x.element_size() == 4 else torch.int16).random_()  # NaNs with payload among them
    before = [x.view(torch.int32 if x.element_size() == 4 else torch.int16).clone() for x in tensors]
    scale_unless_one_(tensors, torch.tensor(factor, device=device), by)
    for x, b in zip(tensors, before, strict=True):
        assert torch.equal(x.view(b.dtype), b)


def test_factor_may_be_16_bit(device):
    x = torch.ones(8, device=device)
    scale_unless_one_([x], torch.tensor(0.5, device=device, dtype=torch.bfloat16))
    assert torch.equal(x, torch.full_like(x, 0.5))


def test_nan_is_not_one(device):
    x = torch.ones(8, device=device)
    scale_unless_one_([x], torch.tensor(float("nan"), device=device))
    assert x.isnan().all()


def test_versions_go_up_even_where_nothing_is_scaled(device):
    tensors = [torch.ones(3, device=device), torch.ones(4, device=device)]
    scale_unless_one_(tensors, torch.ones((), device=device))
    assert [x._version for x in tensors] == [1, 1]


def test_channels_last(device):
    x = torch.randn(2, 3, 5, 7, device=device).to(memory_format=torch.channels_last)
    expected = x * 0.5
    scale_unless_one_([x], torch.tensor(0.5, device=device))
    assert torch.equal(x, expected)


def test_is_a_well_formed_custom_op(device):
    tensors = [torch.randn(17, device=device), torch.randn(2, 3, device=device, dtype=torch.bfloat16)]
    torch.library.opcheck(scale_unless_one, (tensors, torch.tensor(0.5, device=device), 1.0))


@pytest.mark.parametrize(
    ("tensors", "factor", "message"),
    [
        ([], torch.ones(()), "tensors: none"),
        ([torch.ones(3)], torch.ones(2), r"factor: shape \(2,\) is not that of a scalar"),
        ([torch.ones(3), torch.ones(0)], torch.ones(()), r"tensors\[1\]: shape \(0,\) has no elements"),
        ([torch.ones(3, dtype=torch.float64)], torch.ones(()), r"tensors\[0\]: torch.float64 is none of"),
        ([torch.ones(3, device="meta")], torch.ones(()), r"tensors\[0\]: on meta, factor on cpu"),
        ([torch.ones(4, 4)[:, ::2]], torch.ones(()), r"tensors\[0\]: strides \(4, 2\) of shape \(4, 2\) have gaps"),
    ],
    ids=["none", "factor", "empty", "dtype", "device", "gaps"],
)
def test_refuses(tensors, factor, message):
    with pytest.raises(ValueError, match=message):
        scale_unless_one_(tensors, factor)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".to(tl.float32) * by", ".to(tl.float32)"),
        ("if factor != 1.0", "if factor > 1.0"),
        ("tl.static_range(len(x_ptrs))", "tl.static_range(1)"),
        ("(x * factor)", "(x * factor * factor)"),
        ("start += tl.num_programs(0) * BLOCK", "start += 2 * tl.num_programs(0) * BLOCK"),
    ],
    ids=["by", "shrinks", "first-only", "twice", "skips"],
)
def test_notices(old, new, tmp_path, device, monkeypatch):
    bug = mutated(scaling.__file__, old, new, tmp_path)
    monkeypatch.setattr(bug, "BLOCK", 16)
    monkeypatch.setattr(bug, "PROGRAMS", 2)
    tensors = [torch.ones(n, device=device) for n in (17, 100)]
    bug.scale_unless_one_(tensors, torch.tensor(0.25, device=device), 2.0)
    assert not all(torch.equal(x, torch.full_like(x, 0.5)) for x in tensors)
