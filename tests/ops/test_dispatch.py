"""Ops through every provider that runs here: the same values, no graph break, and torch where nobody else can."""

import copy
from collections import Counter as Tally
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend

from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops import dispatch as ops
from bilevel_fast.ops import providers
from bilevel_fast.ops.dispatch import (
    Branch,
    add_norm,
    attention,
    geglu,
    group_norm_and_input,
    group_norm_silu,
    group_norm_silu_and_input,
    group_norm_silu_of_two,
    linear,
)
from bilevel_fast.ops.native import GroupNorm, operators
from bilevel_fast.profiling.cost import AsOnGPU, Counter

# two levels are enough: every kind of module is in them
TINY = replace(
    MINI,
    sample_size=4,
    block_out_channels=(16, 32),
    num_heads=(2, 4),
    norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)

# all but the one that runs a backward pass twice through the same graph
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.fixture
def native_is_an_error(monkeypatch):
    monkeypatch.setattr(GroupNorm, "forward", lambda *_: pytest.fail("native code was called"))


def normalised(dtype=torch.float32):
    x = torch.randn(3, 24, 6, 5, dtype=dtype).to(memory_format=torch.channels_last)
    norm = nn.GroupNorm(8, 24).to(dtype)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return x, norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_affine_gradients_of_a_layer_norm_are_added_in_fp32(device, dtype):
    """16,384 rows: torch's own kernel on the CPU is off by tens of percent in bf16."""
    x, upstream = (torch.randn(16, 1024, 48, device=device).to(dtype) for _ in range(2))
    norm = nn.LayerNorm(48).to(device, dtype)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    exact = copy.deepcopy(norm).double()
    exact(x.double()).backward(upstream.double())
    add_norm(None, x, norm)[1].backward(upstream)
    for mine, theirs in zip(norm.parameters(), exact.parameters(), strict=True):
        error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(add_norm(None, x, norm)[1].double(), exact(x.double()), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("native_is_an_error")
@pytest.mark.parametrize(
    "change",
    [
        lambda x, norm: (x.contiguous(), norm),
        lambda x, norm: (x.double(), norm.double()),
        lambda x, norm: (x.to(torch.bfloat16), norm.to(torch.bfloat16)),
        lambda x, norm: (x.flatten(2), norm),
        lambda x, norm: (x[:0], norm),
        lambda x, norm: (x, nn.GroupNorm(8, 24, affine=False)),
        lambda x, norm: (x.to("meta"), norm.to("meta")),
    ],
    ids=["NCHW", "fp64", "bf16", "3-D", "empty", "not affine", "meta"],
)
def test_what_native_code_cannot_take_goes_to_torch(change):
    x, norm = change(*normalised())
    assert group_norm_and_input(x, norm)[0].shape == x.shape
    assert group_norm_silu(x, norm).shape == x.shape


@pytest.mark.usefixtures("native_is_an_error")
def test_native_is_called_where_it_can_be(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "native")
    for op in (group_norm_and_input, group_norm_silu):
        with pytest.raises(pytest.fail.Exception, match="native code was called"):
            op(*normalised())


@pytest.mark.usefixtures("native_is_an_error")
def test_the_environment_forces_torch(monkeypatch):
    x, norm = normalised()
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")
    assert torch.equal(group_norm_silu(x, norm), F.silu(norm(x)))


@pytest.mark.parametrize("provider", ["torch", "native", "triton"])
def test_time_and_padding(provider, monkeypatch):
    """time is added before the norm; statistics do not see the padding, which comes out as zeros."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    x, norm = normalised()
    time = torch.randn(3, 27)
    padded = F.pad(x, (0, 0, 0, 0, 0, 3), value=7.0).contiguous(memory_format=torch.channels_last)
    out = group_norm_silu(padded, norm, padding=3, time=time)
    torch.testing.assert_close(out[:, :24], F.silu(norm(x + time[:, :24, None, None])), rtol=1e-4, atol=1e-5)
    assert not out[:, 24:].any()


@pytest.mark.parametrize("provider", ["torch", "native", "triton"])
def test_a_norm_of_two_tensors(provider, monkeypatch):
    """As of one that holds both; with Triton, where groups are large, they are not joined."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    x, skip = (torch.randn(2, c, 24, 20).to(memory_format=torch.channels_last) for c in (37, 23))
    norm = nn.GroupNorm(3, 60)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    h, sources = group_norm_silu_of_two(x, skip, norm)
    assert len(sources) == (2 if provider == "triton" else 1)
    whole = torch.cat([x, skip], 1)
    assert torch.equal(torch.cat(sources, 1), whole)
    torch.testing.assert_close(h, F.silu(norm(whole)), rtol=1e-4, atol=1e-5)
    assert len(group_norm_silu_of_two(x.contiguous(), skip.contiguous(), norm)[1]) == 1


def test_native_group_norm_is_a_well_formed_operator():
    x, norm = normalised()
    x.requires_grad_()
    torch.library.opcheck(operators.group_norm, (x, norm.weight, norm.bias, 8, 1e-5, 0, True))


def test_not_differentiable_twice():
    x, norm = normalised()
    x.requires_grad_()
    (dx,) = torch.autograd.grad(operators.group_norm(x, norm.weight, norm.bias, 8, 1e-5, 0, True)[0].sum(), x,
                                create_graph=True)  # fmt: skip
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


@pytest.mark.parametrize("provider", ["torch", "triton"])
def test_attention_and_geglu_by_hand(provider, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    heads = [torch.softmax(q[..., i : i + 4] @ k[..., i : i + 4].mT / 2, -1) @ v[..., i : i + 4] for i in (0, 4, 8)]
    torch.testing.assert_close(attention(q, k, v, heads=3), torch.cat(heads, -1), rtol=1e-4, atol=1e-5)
    proj = nn.Linear(12, 16)
    value, gate = proj(q)[..., :8], proj(q)[..., 8:]
    torch.testing.assert_close(geglu(q, proj), value * F.gelu(gate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("provider", ["torch", "triton"])
def test_a_layer_that_adds_to_its_weight_is_called(provider, monkeypatch):
    """A LoRA's layer has the `weight` of the one that it stands for; who reads that leaves the LoRA out."""

    class Adding(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    x, proj = torch.randn(2, 5, 12), Adding(12, 16)
    value, gate = proj(x).chunk(2, -1)
    torch.testing.assert_close(geglu(x, proj), value * F.gelu(gate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("capability", "first"), [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_attention_is_cudnn_first_on_new_cards(capability, first, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    before = torch._C._get_sdp_priority_order()
    with ops._backends(torch.device("cuda")):
        order = torch._C._get_sdp_priority_order()
    assert (order[0] == SDPBackend.CUDNN_ATTENTION.value) == first
    assert set(order) == set(before)
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize("provider", ["torch", "native", "triton"])
@pytest.mark.parametrize("op", [group_norm_silu_and_input, group_norm_and_input])
def test_a_residual_connection_around_a_group_norm(op, provider, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    x, norm = normalised()
    upstream = torch.randn_like(x)

    def gradients(both):
        leaf = x.clone().requires_grad_()
        y, again = both(leaf)
        return torch.autograd.grad(((y + 2.0 * again) * upstream).sum(), [leaf, norm.weight, norm.bias])

    def by_hand(x):
        return (F.silu(norm(x)) if op is group_norm_silu_and_input else norm(x)), x

    for found, expected in zip(gradients(lambda x: op(x, norm)), gradients(by_hand), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("provider", ["torch", "triton"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_branch_and_the_norm_behind_it(alone, provider, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    layer, norm = nn.Linear(7, 12), nn.LayerNorm(12)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, inner = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 7, requires_grad=True)
    upstream = torch.randn(2, 2, 5, 12)
    leaves = [inner, *layer.parameters(), *norm.parameters(), *([] if alone else [x])]

    def gradients(h, y):
        return torch.autograd.grad(h.mul(upstream[0]).sum() + y.mul(upstream[1]).sum(), leaves)

    branch = linear(inner, layer)
    assert isinstance(branch, Branch) == (provider == "triton")
    expected = layer(inner) if alone else x + layer(inner)
    h, y = add_norm(None if alone else x, branch, norm)
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(gradients(h, y), gradients(expected, norm(expected)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_watched_is_not_left_for_later(monkeypatch):
    """Hooks see what it says."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")
    layer, x = nn.Linear(7, 12), torch.randn(2, 5, 7)
    assert isinstance(linear(x, layer), Branch)
    seen = []
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    assert isinstance(linear(x, layer), torch.Tensor)
    assert seen
    handle.remove()
    assert torch.equal(linear(x, layer).whole(), layer(x))


@pytest.mark.parametrize("level", ["linear", "conv"])
def test_backward_of_a_transformer_and_a_resnet_adds_no_gradients_of_residual_connections(level, monkeypatch):
    """On meta: what is left of `add` are the sums of forward, and the gradients of q, k and v."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")
    config = replace(TINY, use_linear_projection=level == "linear")
    with torch.device("meta"):
        block = UNet(config).down_blocks[0].to(torch.bfloat16)
        x = torch.randn(2, 16, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        time = torch.randn(2, 64, dtype=torch.bfloat16)
        text = torch.randn(2, 5, config.cross_attention_dim, dtype=torch.bfloat16)
        with AsOnGPU():
            h = block.attend(0, block.resnet(0, x, None, time, None), text, None)
        with Counter() as counter:
            h.backward(torch.randn_like(h))
    counts = Tally(cost.op for cost in counter.costs)
    assert counts["aten::add"] <= 2  # attention takes its input thrice
    assert not counts["aten::native_layer_norm_backward"] + counts["aten::clone"]
    assert counts["aten::sum"] == (2 if level == "linear" else 1)  # of biases: time, projection out


def test_a_resnet_behind_a_skip_connection_joins_and_adds_nothing(monkeypatch):
    """On meta, forward and backward. What is added: the biases of conv2 and the shortcut, whose gradient is one."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")
    with torch.device("meta"):
        unet = UNet(TINY).to(torch.bfloat16)
        x, skip = (
            torch.randn(2, c, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
            for c in (32, 16)
        )
        time = torch.randn(2, 64, dtype=torch.bfloat16)
        leaves = [x.requires_grad_(), skip.requires_grad_()]
        with AsOnGPU():
            unet.up_blocks[1].resnet(0, *leaves, time, None)
        with Counter() as counter:
            out = unet.up_blocks[1].resnet(0, *leaves, time, None)
            out.backward(torch.randn_like(out))
    large = Tally(cost.op for cost in counter.costs if cost.bytes >= out.numel() * 2)
    assert not large["aten::cat"] + large["aten::add"] + large["aten::clone"]
    assert large["bilevel_kernels::linear_add_fwd"] == 1
    assert large["bilevel_kernels::group_norm_silu_two_bwd"] == 1


def test_a_resnet_behind_a_skip_connection_is_the_same_unjoined(monkeypatch):
    """Against modules in fp64: what is off is the rounding of sums over pixels, sqrt(n) eps at most. A bias has no more
    terms than that, and all other errors are smaller.
    """
    resnet = UNet(TINY).up_blocks[1].resnets[0]
    assert resnet.conv_shortcut is not None
    leaves = [torch.randn(2, c, 40, 36).to(memory_format=torch.channels_last).requires_grad_() for c in (32, 16)]
    leaves.append(torch.randn(2, 64, requires_grad=True))
    upstream = torch.randn(2, 16, 40, 36)

    def results(provider, resnet, leaves, upstream):
        monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
        with Counter() as counter:
            out = resnet(*leaves)
        joined = any(cost.op == "aten::cat" for cost in counter.costs)
        assert joined == (provider == "torch")
        return [out, *torch.autograd.grad(out, [*leaves, *resnet.parameters()], upstream)]

    found = results("triton", resnet, leaves, upstream)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = results("torch", copy.deepcopy(resnet).double(), wide, upstream.double())
    allowed = (2 * 40 * 36) ** 0.5 * torch.finfo(torch.float32).eps
    for mine, gold in zip(found, exact, strict=True):
        assert (mine - gold).norm() < allowed * gold.norm()


def features(dtype=torch.float32):
    shapes = [(2, 24, 3, 5), (2, 8, 1, 1)]
    student = [torch.randn(s, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_() for s in shapes]
    return student, [torch.randn_like(s) for s in student]


@pytest.mark.parametrize("provider", ["torch", "native", "triton"])
def test_feature_kd_by_hand(provider, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    student, teacher = features()
    total, mean = ops.feature_kd(student, teacher, 0.1)
    expected = sum((s - t).square().mean() for s, t in zip(student, teacher, strict=True)) / 2
    torch.testing.assert_close(total, 0.1 * expected)
    torch.testing.assert_close(mean, expected)
    assert not mean.requires_grad
    found = torch.autograd.grad(3.0 * total, student)  # an upstream gradient that is not 1
    for g, s, t in zip(found, student, teacher, strict=True):
        torch.testing.assert_close(g, 0.3 * (s - t) / s.numel())


@pytest.mark.parametrize(
    "change",
    [
        lambda s, t: (s, [t[0].contiguous(), t[1]]),
        lambda s, t: ([x[:, ::2] for x in s], [x[:, ::2] for x in t]),
        lambda s, t: ([x.double() for x in s], [x.double() for x in t]),
        lambda s, t: (s, [x.to(torch.bfloat16) for x in t]),
    ],
    ids=["layouts differ", "gaps", "fp64", "dtypes differ"],
)
def test_features_that_native_code_cannot_take_go_to_torch(change, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "native")
    monkeypatch.setattr(operators, "feature_kd", lambda *_: pytest.fail("native code was called"))
    student, teacher = change(*features())
    assert ops.feature_kd(student, teacher, 1.0)[0] > 0


def test_native_feature_kd_is_a_well_formed_operator():
    student, teacher = features()
    torch.library.opcheck(operators.feature_kd, (student, teacher, 0.1), test_utils=OPCHECKS)
    torch.library.opcheck(operators.scale_unless_one, (teacher, torch.tensor(0.5)))
    torch.library.opcheck(operators.scale_unless_one, (teacher, torch.tensor(1.0)))


def test_native_feature_kd_refuses_a_second_backward_pass():
    """The stored gradient was scaled in place; a second use would give a wrong answer."""
    student, teacher = features()
    total = operators.feature_kd(student, teacher, 0.1)[0]
    torch.autograd.grad(total, student, torch.tensor(0.5), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, student)


def unet_and_inputs(batch=2):
    torch.manual_seed(0)
    unet = UNet(TINY).cut(Structure.uniform(TINY, 0.6), align=8)
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    text = torch.randn(batch, 5, TINY.cross_attention_dim)
    return unet, (torch.randn(batch, 12, 4, 4), torch.tensor([3, 700])[:batch], text)


def gradients(unet, call, inputs):
    out = call(*inputs).out
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in unet.parameters())]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("provider", ["native", "triton"])
def test_the_unet_is_the_same_through_every_provider(provider, monkeypatch):
    unet, inputs = unet_and_inputs()
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")
    expected = gradients(copy.deepcopy(unet), unet, inputs)[:1] + [p.grad for p in unet.parameters()]
    other = copy.deepcopy(unet)
    other.zero_grad()
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    assert_same(gradients(other, other, inputs), expected)


@pytest.mark.parametrize("provider", [None, "torch", "triton"], ids=str)
def test_no_graph_break(provider, monkeypatch):
    """The whole UNet in one graph, forward and backward; `aot_eager` traces as inductor does and compiles nothing."""
    if provider:
        monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    unet, inputs = unet_and_inputs(batch=1)
    eager = copy.deepcopy(unet)
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    assert_same(gradients(unet, compiled, inputs), gradients(eager, eager, inputs))


def test_providers_are_asked_for_what_they_are_measured_on(monkeypatch):
    """Every name that an op asks `choose` with is a name that the benchmarks write."""
    from benchmarks.kernels.cases import OPS

    asked = set()
    monkeypatch.setattr(ops, "choose", lambda op, *args: asked.add(op) or providers.choose(op, *args))
    unet, inputs = unet_and_inputs()
    unet(*inputs)
    alone = {"group_norm_silu", "layer_norm", "pruned_attention", "geglu", "linear_geglu"}
    assert asked == alone | {"linear_add", "linear_norm"}
    assert asked <= set(OPS)


@pytest.mark.parametrize("provider", ["torch", "triton"])
@pytest.mark.parametrize("weights", [(1.0, 2.0), (1.0, 0.0), (0.0, 2.0)], ids=str)
def test_denoise_loss_by_hand(provider, weights, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", provider)
    student, target, teacher = torch.randn(3, 2, 4, 5, 3).unbind()
    student.requires_grad_()
    weight = torch.tensor([0.3, 2.0])
    diffusion = (weight[:, None, None, None] * (student - target).square()).mean() if weights[0] else torch.zeros(())
    output = (student - teacher).square().mean() if weights[1] else torch.zeros(())
    absent = torch.empty(0)
    given = (target if weights[0] else absent, teacher if weights[1] else absent, weight if weights[0] else absent)
    total, terms = ops.denoise_loss(student, *given, *weights)
    torch.testing.assert_close(terms, torch.stack([diffusion, output]).detach())
    expected = weights[0] * diffusion + weights[1] * output
    torch.testing.assert_close(total, expected)
    gradients = (torch.autograd.grad(3.0 * x, student)[0] for x in (total, expected))
    torch.testing.assert_close(*gradients)
