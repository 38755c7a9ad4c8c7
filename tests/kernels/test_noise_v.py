from importlib import import_module

import pytest
import torch

from bilevel_fast.models.diffusion import Schedule, noise
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_kernels.noise_v import noise_v, noise_v_fwd, noise_v_ref, normal_ref
from mutants import mutated
from numerics import assert_no_worse_than_eager

MODULE = import_module("bilevel_kernels.noise_v")  # the package's attribute of that name is the function
SHAPES = [(1,), (4, 8, 8), (3, 5, 7), (4, 17, 23), (4, 64, 64)]  # one, small, ragged, ragged blocks, SD 2.1 at 512 px
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INDEX = [0, 5, 2**33 + 7, 2**62 + 12345]  # in no order and with both words in use
SEEDS = [0, 1, 2**31, 2**40 + 5, 2**63, 2**64 - 1]


def noise_of(op, shape, seed, index, stream, device, memory_format=torch.contiguous_format):
    """What `op` adds to zeros."""
    index = torch.tensor(index, device=device)
    x = torch.zeros(len(index), *shape, device=device).contiguous(memory_format=memory_format)
    zeros, ones = torch.zeros(len(index), device=device), torch.ones(len(index), device=device)
    noisy, target = op(x, zeros, ones, seed, index, stream)
    assert not target.any()  # alpha eps - sigma x_0
    return noisy


def assert_native(eps, seed, index, stream):
    native = normal(seed, Stream(stream), index, tuple(eps.shape[1:]))
    torch.testing.assert_close(eps.cpu(), native, rtol=1e-6, atol=0.0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=lambda s: "x".join(map(str, s)))
def test_noise_is_the_engines(shape, seed, device):
    assert_native(noise_of(noise_v, shape, seed, INDEX, Stream.NOISE, device), seed, INDEX, Stream.NOISE)


@pytest.mark.parametrize("stream", list(Stream), ids=lambda s: s.name)
def test_every_stream(stream, device):
    assert_native(noise_of(noise_v, (3, 5, 7), 3, INDEX, stream, device), 3, INDEX, stream)


def test_reference_has_the_engines_words(device):
    for seed in SEEDS:
        eps = normal_ref(seed, torch.tensor(INDEX, device=device), Stream.VIEW, (3, 5, 7))
        native = normal(seed, Stream.VIEW, INDEX, (3, 5, 7))
        torch.testing.assert_close(eps.cpu(), native.double(), rtol=2e-7, atol=0.0)


def test_many_normals(device):
    eps = noise_of(noise_v, (2**17,), 7, [77], Stream.NOISE, device)
    assert_native(eps, 7, [77], Stream.NOISE)
    assert abs(eps.mean()) < 0.01
    assert abs(eps.std() - 1) < 0.01


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7), (1, 4, 3), (4, 1, 1)], ids=lambda s: "x".join(map(str, s)))
def test_noise_does_not_depend_on_the_layout(shape, device):
    nchw, nhwc = (
        noise_of(noise_v, shape, 5, INDEX, 0, device, f) for f in (torch.contiguous_format, torch.channels_last)
    )
    assert nhwc.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(nchw, nhwc)


def test_noise_does_not_depend_on_the_batch(device):
    batch = noise_of(noise_v, (3, 5, 7), 5, [9, 4, 2**40], 0, device)
    alone = noise_of(noise_v, (3, 5, 7), 5, [4], 0, device)
    assert torch.equal(batch[1:2], alone)


def inputs(shape, dtype, device):
    x = torch.randn(4, *shape, device=device).to(dtype)
    alpha, sigma = (t.flatten() for t in Schedule.sd().alpha_sigma(torch.tensor([0, 300, 700, 999])))
    return x, alpha.to(device), sigma.to(device), 11, torch.tensor(INDEX, device=device), int(Stream.NOISE)


def check(op, shape, dtype, device, out=torch.float32):
    args = inputs(shape, dtype, device)
    gold = noise_v_ref(args[0].double(), *args[1:])
    eager = [t.to(out) for t in noise_v_ref(*args)]
    kernel = op(*args, out)
    for name, k, e, g in zip(("noisy", "target"), kernel, eager, gold, strict=True):
        assert k.dtype == out
        assert_no_worse_than_eager(name, k, e, g)


@pytest.mark.parametrize("out", DTYPES, ids=lambda d: f"to-{str(d).removeprefix('torch.')}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_noise_v(dtype, out, device):
    check(noise_v, (3, 5, 7), dtype, device, out)


def test_noise_v_at_sd_size(device):
    check(noise_v, SHAPES[-1], torch.float32, device)


def test_agrees_with_the_forward_process(device):
    schedule, t = Schedule.sd(), torch.tensor([0, 300, 700, 999])
    x, alpha, sigma, seed, index, stream = inputs((4, 8, 8), torch.float32, device)
    noised = noise(schedule, x.cpu(), normal(seed, Stream(stream), INDEX, (4, 8, 8)), t)
    noisy, target = noise_v(x, alpha, sigma, seed, index, stream)
    torch.testing.assert_close(noisy.cpu(), noised.x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(target.cpu(), noised.target, rtol=1e-6, atol=1e-6)


def test_same_bits_twice(device):
    args = inputs((3, 5, 7), torch.bfloat16, device)
    assert all(torch.equal(a, b) for a, b in zip(noise_v(*args), noise_v(*args), strict=True))


def test_is_a_well_formed_custom_op(device):
    args = inputs((4, 8, 8), torch.bfloat16, device)
    torch.library.opcheck(noise_v_fwd, (*args, torch.float32))
    nhwc = args[0].to(memory_format=torch.channels_last)
    torch.library.opcheck(noise_v_fwd, (nhwc, *args[1:], torch.bfloat16))


GOOD = {
    "latents": torch.zeros(2, 4, 6, 6), "t_alpha": torch.ones(2), "t_sigma": torch.ones(2),
    "seed": 0, "index": torch.arange(2), "stream": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("latents", torch.zeros(0, 4), r"latents: shape \(0, 4\) is not \(B, ...\) with elements"),
        ("latents", torch.zeros(()), r"latents: shape \(\) is not"),
        ("latents", torch.zeros(2, 4, 6, 6)[:, ::2], r"latents: strides \(144, 72, 6, 1\) of shape \(2, 2, 6, 6\) are"),
        (
            "latents",
            torch.empty(1, 2**34 + 1, device="meta"),
            r"latents: shape \(1, 17179869185\) has more than 2\*\*34",
        ),
        ("latents", torch.zeros(2, 4, dtype=torch.float64), "latents: torch.float64 is none of"),
        ("dtype", torch.float64, "dtype: torch.float64 is none of"),
        ("t_alpha", torch.ones(3), r"t_alpha: shape \(3,\), strides \(1,\), expected \(2,\), \(1,\)"),
        ("t_sigma", torch.ones(4)[::2], r"t_sigma: shape \(2,\), strides \(2,\), expected"),
        ("t_sigma", torch.ones(2, dtype=torch.float16), "t_sigma: torch.float16, expected torch.float32"),
        ("index", torch.ones(2, dtype=torch.int32), "index: torch.int32, expected torch.int64"),
        ("index", torch.arange(2, device="meta"), "index: on meta, latents on cpu"),
        ("seed", -1, r"seed: -1 is not in \[0, 2\*\*64\)"),
        ("seed", 2**64, r"seed: 18446744073709551616 is not in"),
        ("stream", 2**32, r"stream: 4294967296 is not in \[0, 2\*\*32\)"),
    ],
)
def test_refuses(name, value, message):
    with pytest.raises(ValueError, match=message):
        noise_v(**{**GOOD, name: value})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(index >> 32).to(tl.uint32)", "index.to(tl.uint32)"),
        ("stream.to(tl.uint32)", "index.to(tl.uint32)"),
        ("first = (pid % programs) * BLOCK", "first = (pid % programs) * 0"),
        ("tl.load(index_ptr + b)", "tl.load(index_ptr)"),
        ("turn + (1 << 21)", "turn"),
        ("((quadrant + 1) & 2) != 0", "(quadrant & 2) != 0"),
        ("tl.join(tl.join(z0, z2), tl.join(z1, z3))", "tl.join(tl.join(z0, z1), tl.join(z2, z3))"),
        ("(n % HW) * CHANNELS + n // HW", "n"),
        ("alpha * eps - sigma * x", "alpha * eps + sigma * x"),
        ("signed = seed - 2**64 if seed >= 2**63 else seed", "signed = seed % 2**63"),
    ],
    ids=["index", "stream", "block", "sample", "quadrant", "sign", "order", "layout", "v", "seed"],
)
def test_notices(old, new, tmp_path, device):
    bug = mutated(MODULE.__file__, old, new, tmp_path)

    def all_checks():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            eps = noise_of(bug.noise_v, (4, 17, 23), 2**40 + 5, INDEX, 3, device, memory_format)
            assert_native(eps, 2**40 + 5, INDEX, 3)
        assert_native(noise_of(bug.noise_v, (8,), 2**63, INDEX, 3, device), 2**63, INDEX, 3)
        check(bug.noise_v, (3, 5, 7), torch.float32, device)

    with pytest.raises(AssertionError):
        all_checks()
