import pytest
import torch

from bilevel_kernels.steered_mse import steered_mse, steered_mse_bwd, steered_mse_fwd, steered_mse_ref
from numerics import assert_no_worse_than_eager

SHAPES = [(1, 1), (2, 4, 8, 8), (3, 4, 17, 5), (2, 4, 64, 64)]  # scalar, small, ragged, SD 2.1 at 512 px
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(fn, s, a, c, eta):
    s = s.detach().requires_grad_()
    loss = fn(s, a, c, eta)
    loss.backward(torch.full_like(loss, 0.3))  # not 1: catches a backward that ignores dloss
    return loss.detach(), s.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steered_mse(shape, dtype, eta, device):
    s, a, c = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    gold = run(steered_mse_ref, *(x.double() for x in (s, a, c)), eta)
    eager = run(steered_mse_ref, s, a, c, eta)
    kernel = run(steered_mse, s, a, c, eta)
    for name, k, e, g in zip(("loss", "ds"), kernel, eager, gold, strict=True):
        assert_no_worse_than_eager(name, k, e, g)


def test_channels_last_is_the_same_loss(device):
    nchw = [torch.randn(3, 4, 17, 5, device=device) for _ in range(3)]
    nhwc = [x.to(memory_format=torch.channels_last) for x in nchw]
    gold = run(steered_mse_ref, *(x.double() for x in nchw), 1.0)
    eager = run(steered_mse_ref, *nchw, 1.0)
    loss, ds = run(steered_mse, *nhwc, 1.0)
    assert_no_worse_than_eager("loss", loss, eager[0], gold[0])
    assert_no_worse_than_eager("ds", ds, eager[1], gold[1])


def test_same_bits_twice(device):
    s, a, c = (torch.randn(2, 4, 64, 64, device=device) for _ in range(3))
    (loss_0, ds_0), (loss_1, ds_1) = run(steered_mse, s, a, c, 1.0), run(steered_mse, s, a, c, 1.0)
    assert torch.equal(loss_0, loss_1)
    assert torch.equal(ds_0, ds_1)


def test_is_a_well_formed_custom_op(device):
    s, a, c = (torch.randn(2, 4, 8, 8, device=device) for _ in range(3))
    torch.library.opcheck(steered_mse_fwd, (s.requires_grad_(), a, c, 1.0))
    torch.library.opcheck(steered_mse_bwd, (torch.ones((), device=device), s.detach(), a, c, 1.0))


def test_refuses_mixed_layouts(device):
    x = torch.randn(2, 4, 8, 8, device=device)
    with pytest.raises(ValueError, match="layouts differ"):
        steered_mse(x, x, x.to(memory_format=torch.channels_last))


def test_refuses_mixed_shapes(device):
    x = torch.randn(2, 4, 8, 8, device=device)
    with pytest.raises(ValueError, match=r"shapes differ: s \(2, 4, 8, 8\), a \(1, 4, 8, 8\)"):
        steered_mse(x, x[:1], x)


def test_refuses_gaps(device):
    x = torch.randn(2, 4, 8, 8, device=device)[:, ::2]
    with pytest.raises(ValueError, match="neither contiguous nor channels_last"):
        steered_mse(x, x, x)
