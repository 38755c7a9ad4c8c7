"""fp8 linear layers: error, edges of the number format, what is replaced, and what is refused.

`torch._scaled_mm` takes row-wise scales on a GPU only; elsewhere the same rounded numbers are multiplied in fp32.
"""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.diffusion import noise
from bilevel_fast.models.folder import load_folder, load_unet
from bilevel_fast.models.fp8 import CARDS, E4M3, Fp8GEGLU, Fp8Linear, _check_card, kd_error, quantise, to_fp8
from bilevel_fast.models.layers import GEGLU
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, integers, normal
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.world import SCENES, render

TINY = dataclasses.replace(
    MINI, in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), num_heads=(1, 2, 2), norm_num_groups=8,
    cross_attention_dim=16,
)  # fmt: skip


SMALL = dataclasses.replace(
    TINY, block_out_channels=(16, 32), num_heads=(1, 2), mid_block_type=None,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip


def teacher(config=TINY, dtype=torch.float32):
    torch.manual_seed(0)
    unet = UNet(config)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return unet.to(dtype).requires_grad_(False)


def inputs(config=TINY, dtype=torch.float32, device="cpu"):
    torch.manual_seed(1)
    x, text = torch.randn(2, config.in_channels, 8, 8), torch.randn(2, 5, config.cross_attention_dim)
    return x.to(device, dtype), torch.tensor([3, 700], device=device), text.to(device, dtype)


def linear(k=64, n=48, bias=True, dtype=torch.float32):
    return nn.Linear(k, n, bias=bias).to(dtype).requires_grad_(False)


def sayable(*shape):
    """Numbers that e4m3 holds exactly with the scale of their row, whose largest is 1."""
    y = (torch.rand(*shape).mul(2).sub(1) * 448).to(E4M3).float() / 448
    y[..., 3] = 1
    return y


def relative(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


@pytest.mark.parametrize("shape", [(3, 77, 320), (16, 320)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_on_random_data(shape, dtype):
    layer = linear(320, 640, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    out, exact = Fp8Linear(layer, emulate=True)(x), F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert out.shape == (*shape[:-1], 640)
    assert out.dtype == dtype
    error = relative(out, exact)
    assert 0.01 < error < 0.05  # three bits of mantissa cannot do better than that
    assert -20 * math.log10(error) > 25


@pytest.mark.parametrize("bias", [True, False])
def test_what_e4m3_can_say_is_exact(bias):
    """Rows and channels each at a power of two of their own: a scale in the wrong place would be off by one."""
    layer = linear(32, 16, bias)
    rows, columns = 2.0 ** torch.arange(-10, 11)[:, None], 2.0 ** torch.arange(-8, 8)
    x, layer.weight[:] = rows * sayable(21, 32), columns[:, None] * sayable(16, 32)
    out, exact = Fp8Linear(layer, emulate=True)(x), F.linear(x.double(), layer.weight.double())
    if bias:
        assert not torch.equal(layer.bias, torch.zeros(16))
        exact += layer.bias
    torch.testing.assert_close(out / rows / columns, exact.float() / rows / columns, rtol=1e-5, atol=1e-5)


def test_rows_of_any_size():
    """Zeros are zeros, and the largest and smallest rows round like others, each next to the rest."""
    torch.manual_seed(2)
    layer = linear(64, 16, bias=False)
    sizes = torch.tensor([0.0, 1e-9, 1e-4, 1.0, 448.0, 1e5, 1e30])
    x = torch.randn(7, 64) * sizes[:, None]
    x[3, 5] = 1e4  # an outlier costs its row the rest, not the others
    out, exact = Fp8Linear(layer, emulate=True)(x), F.linear(x, layer.weight)
    assert torch.equal(out[0], torch.zeros(16))
    assert all(relative(a, b) < 0.06 for a, b in zip(out[1:], exact[1:], strict=True))


def test_zero_and_saturating_channels():
    layer = linear(32, 16)
    layer.weight[3] = 0
    layer.weight[4] *= 1e20
    x = torch.randn(256, 32)
    out = Fp8Linear(layer, emulate=True)(x)
    assert torch.equal(out[:, 3], layer.bias[3].expand(256))
    assert relative(out[:, 4], F.linear(x, layer.weight)[:, 4]) < 0.05
    assert out.isfinite().all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(bad):
    x = torch.randn(3, 64)
    x[1, 7] = bad
    finite = Fp8Linear(linear(), emulate=True)(x).isfinite()
    assert not finite[1].any()
    assert finite[[0, 2]].all()


def test_the_largest_number_of_a_row_is_448_and_not_nan():
    """The division may land just above 448, and e4m3 has no infinity: a careless cast ends in NaN."""
    rows = torch.rand(4096, 16) * 10.0 ** torch.randint(-6, 6, (4096, 1))
    quantised, scale = quantise(rows)
    assert quantised.dtype == E4M3
    assert torch.equal(quantised.float().amax(1), torch.full((4096,), 448.0))
    # half of the last digit: 1/16 of a normal number, and 2^-10 of the scale below
    error = (quantised.float() * scale - rows).abs()
    assert (error <= rows / 16 * 1.001 + scale * 2**-10).all()


def test_memory_of_the_weights_is_halved():
    layer = linear(320, 640, dtype=torch.bfloat16)
    state = Fp8Linear(layer).state_dict()
    assert set(state) == {"quantised", "scale", "bias"}
    assert state["quantised"].nbytes * 2 == layer.weight.nbytes
    assert state["scale"].nbytes == 4 * 640


def test_what_is_replaced():
    """All linear layers of the Transformers, GEGLU included; what the timestep goes through stays."""
    unet = teacher()
    fp8 = to_fp8(unet, emulate=True)
    replaced = {name for name, m in fp8.named_modules() if isinstance(m, Fp8Linear)}
    linears = {name for name, m in unet.named_modules() if isinstance(m, nn.Linear)}
    assert replaced == {name for name in linears if ".attentions." in name}
    assert any(name.endswith("ff.net.0.proj") for name in replaced)
    assert {name.rpartition(".")[2] for name in linears - replaced} == {"linear_1", "linear_2", "time_emb_proj"}
    assert not any(isinstance(m, GEGLU) for m in fp8.modules())
    # the given UNet is as it was, and lends its other weights
    assert not any(isinstance(m, Fp8Linear | Fp8GEGLU) for m in unet.modules())
    before = dict(unet.named_parameters())
    assert all(p is before[name] for name, p in fp8.named_parameters())
    assert {name.rpartition(".")[0] for name in set(before) - set(dict(fp8.named_parameters()))} == replaced


def test_odd_widths_stay():
    config = dataclasses.replace(TINY, cross_attention_dim=24)
    fp8 = to_fp8(teacher(config), emulate=True)
    left = {n for n, m in fp8.named_modules() if isinstance(m, nn.Linear) and ".attentions." in n}
    assert left
    assert all(n.endswith(("attn2.to_k", "attn2.to_v")) for n in left)
    assert fp8(*inputs(config)).out.isfinite().all()


def test_convolutional_projections_stay():
    config = dataclasses.replace(TINY, use_linear_projection=False)
    fp8 = to_fp8(teacher(config), emulate=True)
    names = {n.rpartition("attentions.")[2][2:] for n, m in fp8.named_modules() if isinstance(m, Fp8Linear)}
    assert names
    assert all(n.startswith("transformer_blocks.") for n in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kd_error_is_what_it_says(dtype):
    unet = teacher(dtype=dtype)
    fp8, given = to_fp8(unet, emulate=True), inputs(dtype=dtype)
    found = kd_error(unet, fp8, *given)
    exact, rough = unet(*given), fp8(*given)
    expected = {}
    pairs = zip((exact.out, *exact.blocks), (rough.out, *rough.blocks), strict=True)
    for name, (a, b) in zip(("output", *TINY.blocks), pairs, strict=True):
        noise, signal = (b.double() - a.double()).square().sum(), a.double().square().sum()
        expected[f"{name}/relative"] = (noise / signal).sqrt().item()
        expected[f"{name}/sqnr_db"] = 10 * (signal / noise).log10().item()
    assert found == pytest.approx(expected, rel=1e-3)
    assert all(1e-3 < v < 0.1 for k, v in found.items() if k.endswith("relative"))
    assert set(kd_error(unet, unet, *given).values()) == {0.0, math.inf}


def test_on_a_trained_teacher():
    """The mini world's: several times what bf16 costs, which is why `kd_error` is to be read before a training."""
    folder = load_folder(TEACHER)
    unet, scenes, index = load_unet(TEACHER).requires_grad_(False), SCENES[::20], torch.arange(len(SCENES[::20]))
    labels = torch.tensor([(scene.object, scene.color, scene.style) for scene in scenes]).T
    latents = folder.vae.moments(render(*labels, seed=0, indices=index))[:, : folder.config.in_channels]
    t = integers(0, Stream.TIMESTEP, index, 1000)
    x = noise(folder.schedule, latents, normal(0, Stream.NOISE, index, tuple(latents.shape[1:])), t).x
    text = folder.text_encoder.encode([scene.caption for scene in scenes])
    found = kd_error(unet, to_fp8(unet, emulate=True), x, t, text)
    low = copy.deepcopy(unet).bfloat16()
    bf16 = relative(low(x.bfloat16(), t, text.bfloat16()).out, unet(x, t, text).out)
    assert 20 < found["output/sqnr_db"] < 30
    assert 3 * bf16 < found["output/relative"] < 10 * bf16


def test_the_unet_through_triton(monkeypatch):
    """The same rounding error, whoever runs norms, attention and the gate."""
    unet, (x, t, text) = teacher(SMALL), inputs(SMALL)
    fp8, outs = to_fp8(unet, emulate=True), {}
    for provider in ("torch", "triton"):
        monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
        outs[provider] = fp8(x[:1], t[:1], text[:1]).out - unet(x[:1], t[:1], text[:1]).out
    # not equal: the last digit of a sum may move a number across a border of rounding
    assert relative(outs["triton"], outs["torch"]) < 0.05
    assert outs["torch"].norm() > 1e-3


@pytest.mark.parametrize("provider", ["torch", "triton"])
def test_geglu_equals_that_of_the_unet(monkeypatch, provider):
    """On weights and inputs that e4m3 can say."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    geglu = GEGLU(32, 16).requires_grad_(False)
    geglu.proj.weight.copy_(sayable(32, 32))
    x = sayable(2, 5, 32)
    out = Fp8GEGLU(Fp8Linear(geglu.proj, emulate=True))(x)
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")
    torch.testing.assert_close(out, geglu(x), rtol=1e-5, atol=1e-6)


def test_a_trainable_unet_is_refused():
    unet = teacher()
    unet.mid_block.resnets[0].conv1.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"mid_block\.resnets\.0\.conv1\.weight needs a gradient"):
        to_fp8(unet, emulate=True)


def test_a_cpu_is_refused():
    with pytest.raises(UserError, match=r"the teacher is on cpu; wanted a GPU of sm_89 or sm_90"):
        to_fp8(teacher(dtype=torch.bfloat16))


class OnACard:
    """Where and what a weight is, without a card."""

    device, dtype = torch.device("cuda"), torch.bfloat16


@pytest.mark.parametrize(("capability", "fits"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_cards(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Model T")
    if fits:
        _check_card(OnACard())
        weight = OnACard()
        weight.dtype = torch.float32
        with pytest.raises(UserError, match=r"in torch.float32; wanted torch.bfloat16"):
            _check_card(weight)
    else:
        with pytest.raises(UserError, match=rf"the card is Model T, sm_8{capability[1]}; wanted sm_89 or sm_90"):
            _check_card(OnACard())


def test_a_later_cast_is_refused():
    """`Module.to(dtype)` turns e4m3 weights into numbers without their scale's precision."""
    fp8 = to_fp8(teacher(), emulate=True).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="cast a UNet before"):
        fp8(*inputs(dtype=torch.bfloat16))


@pytest.mark.gpu
def test_a_card_computes_what_is_emulated():
    if torch.cuda.get_device_capability() not in CARDS:
        pytest.skip("needs sm_89 or sm_90")
    layer = linear(320, 640, dtype=torch.bfloat16).cuda()
    for shape in ((2, 77, 320), (3, 320), (1, 320)):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        emulated = Fp8Linear(layer, emulate=True)(x)
        assert relative(Fp8Linear(layer)(x), emulated) < 0.005  # bf16 rounds either
    unet = teacher(dtype=torch.bfloat16).cuda()
    given = inputs(dtype=torch.bfloat16, device="cuda")
    assert kd_error(unet, to_fp8(unet), *given)["output/relative"] < 0.1
