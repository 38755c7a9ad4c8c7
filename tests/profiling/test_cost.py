"""`profiling.cost`: FLOPs, bytes and launches counted by hand, and the UNet against `models.macs`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bilevel_fast.models.architecture import MINI, SD21, sites
from bilevel_fast.models.macs import count, fixed_costs
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.profiling.cost import _OURS, KINDS, Cost, Counter, Line, table
from bilevel_fast.training.phases import phase
from bilevel_kernels import Kept, feature_kd
from bilevel_kernels.adamw_ema import adamw_ema_, adamw_ema_bytes
from bilevel_kernels.denoise_loss import denoise_loss, denoise_loss_bytes
from bilevel_kernels.pruned_attention import pruned_attention, pruned_attention_bytes
from bilevel_kernels.structured_conv2d import structured_conv2d, structured_conv2d_bytes

DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


def flops(costs, *kinds):
    return sum(c.flops for c in costs if not kinds or c.kind in kinds)


def only(costs):
    (cost,) = costs
    return cost


# --- an op ----------------------------------------------------------------------------------


@DEVICES
@pytest.mark.parametrize(
    ("x", "weight", "stride", "padding", "groups", "forward"),
    [
        ((2, 3, 7, 5), (4, 3, 3, 3), 2, 1, 1, 2 * (2 * 4 * 4 * 3) * (3 * 9)),  # 7 x 5 -> 4 x 3
        ((1, 6, 5, 4), (2, 6, 1, 1), 1, 0, 1, 2 * (1 * 2 * 5 * 4) * 6),
        ((3, 4, 9, 9), (4, 4, 3, 3), 1, 0, 1, 2 * (3 * 4 * 7 * 7) * (4 * 9)),
        ((1, 8, 4, 4), (6, 4, 3, 3), 1, 1, 2, 2 * (1 * 6 * 4 * 4) * (4 * 9)),
    ],
)
def test_convolution(x, weight, stride, padding, groups, forward, device):
    w, b = torch.zeros(weight, device=device, requires_grad=True), torch.zeros(weight[0], device=device)
    for wants in (True, False):
        image = torch.zeros(x, device=device, requires_grad=wants)
        with Counter() as there:
            out = F.conv2d(image, w, b, stride, padding, groups=groups)
        cost = only(there.costs)
        assert (cost.kind, cost.flops) == ("conv", forward)
        assert cost.bytes == 4 * (image.numel() + w.numel() + b.numel() + out.numel())
        with Counter() as back:
            out.backward(torch.zeros_like(out))
        gradients = only([c for c in back.costs if c.kind == "conv"])
        assert gradients.flops == forward * (1 + wants)
        written = w.numel() + image.numel() * wants
        assert gradients.bytes == 4 * (out.numel() + image.numel() + w.numel() + written)


@DEVICES
def test_linear(device):
    layer = nn.Linear(7, 3, device=device)
    x = torch.zeros(5, 7, device=device, requires_grad=True)
    with Counter() as there:
        out = layer(x)
    assert there.costs == [Cost(None, "linear", "aten::addmm", 2 * 5 * 7 * 3, 4 * (35 + 21 + 3 + 15))]
    with Counter() as back:
        out.backward(torch.zeros_like(out))
    assert [(c.flops, c.bytes) for c in back.costs if c.kind == "linear"] == [
        (2 * 5 * 7 * 3, 4 * (15 + 21 + 35)),
        (2 * 5 * 7 * 3, 4 * (15 + 35 + 21)),
    ]
    with Counter() as batched:
        torch.zeros(4, 2, 3, device=device) @ torch.zeros(4, 3, 5, device=device)
        torch.baddbmm(*(torch.zeros(4, *s, device=device) for s in ((2, 5), (2, 3), (3, 5))))
    assert [c.flops for c in batched.costs if "bmm" in c.op] == [2 * 4 * 2 * 3 * 5] * 2


@DEVICES
@pytest.mark.parametrize("keys", [9, 4])
def test_attention(keys, device):
    """Fused on both devices: two products, five in backward; nothing of the size of the scores is moved."""
    q, k, v = (torch.zeros(2, 3, n, 16, device=device, requires_grad=True) for n in (9, keys, keys))
    product = 2 * (2 * 3) * 9 * keys * 16
    with Counter() as there:
        out = F.scaled_dot_product_attention(q, k, v)
    cost = only(there.costs)
    assert (cost.kind, cost.flops) == ("attention", 2 * product)
    operands = 4 * (2 * q.numel() + 2 * k.numel())
    assert operands <= cost.bytes <= operands + 4 * (2 * 3 * 9) + 32  # and a logarithm for each row, and a seed
    with Counter() as back:
        out.backward(torch.zeros_like(out))
    assert flops(back.costs) == 5 * product


def test_attention_by_every_name():
    """All variants that torch may dispatch, whichever way their axes go."""
    aten, queries, keys = torch.ops.aten, 9, 4

    def make(tokens_first):
        shapes = [(2, n, 3, 16) if tokens_first else (2, 3, n, 16) for n in (queries, keys, keys)]
        return (torch.zeros(s, device="meta", dtype=torch.bfloat16, requires_grad=True) for s in shapes)

    product = 2 * (2 * 3) * queries * keys * 16
    variants = {
        "efficient": lambda: aten._scaled_dot_product_efficient_attention(*make(False), None, True),
        "flash": lambda: aten._scaled_dot_product_flash_attention(*make(False)),
        "cudnn": lambda: aten._scaled_dot_product_cudnn_attention(*make(False), None, True),
        "raw efficient": lambda: aten._efficient_attention_forward(
            *make(True), None, None, None, None, None, 0.0, 0, True
        ),
        "raw flash": lambda: aten._flash_attention_forward(
            *make(True), None, None, queries, keys, 0.0, False, False
        ),
    }  # fmt: skip
    for name, variant in variants.items():
        with Counter() as there:
            out = variant()[0]
        assert flops(there.costs, "attention") == flops(there.costs) == 2 * product, name
        with Counter() as back:
            out.backward(torch.zeros_like(out))
        assert flops(back.costs, "attention") == 5 * product, name
    q, k, v = make(False)
    mask = torch.zeros(queries, keys, device="meta", dtype=torch.bfloat16)
    with Counter() as plain:  # through a matrix of scores: two products, four in backward
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    assert flops(plain.costs, "attention") == flops(plain.costs) == 6 * product


@DEVICES
def test_bytes(device):
    """Distinct elements read once, written ones once."""
    x, y = torch.zeros(8, 8, device=device), torch.zeros(8, 8, device=device)
    row, n = torch.zeros(1, 8, device=device), 4 * 64
    wide, index = torch.zeros(8, 16, device=device), torch.zeros(3, dtype=torch.int64, device=device)

    def moved(call):
        with Counter() as counter:
            call()
        return only(counter.costs).bytes

    assert moved(lambda: x + y) == 3 * n
    assert moved(lambda: x.add_(y)) == 3 * n
    assert moved(lambda: x + x) == 2 * n
    assert moved(lambda: x + x.t()) == 2 * n
    assert moved(lambda: x.copy_(y)) == 2 * n
    assert moved(lambda: x.zero_()) == n
    assert moved(lambda: torch.add(x, y, out=y)) == 3 * n
    assert moved(lambda: row.expand(8, 8) + x) == 4 * 8 + 2 * n
    assert moved(lambda: row.expand(8, 8).clone(memory_format=torch.contiguous_format)) == 4 * 8 + n
    assert moved(lambda: wide[:1, ::2].expand(8, 8) + x) == 4 * 8 + 2 * n
    assert moved(lambda: wide[:, :8] * wide[:, 8:]) == 3 * n
    assert moved(lambda: x[:4] + x[4:]) == n + n // 2
    assert moved(lambda: x[:5] + x[3:]) == n + 5 * 8 * 4
    assert moved(lambda: x.to(torch.bfloat16)) == n + n // 2
    assert moved(lambda: F.embedding(index, x)) == 3 * 8 + 2 * (3 * 8 * 4)
    assert moved(lambda: torch.cat([x, y])) == 4 * n


@DEVICES
def test_views_and_allocations_launch_nothing(device):
    x, weight = torch.zeros(4, 6, device=device), torch.zeros(5, 6, device=device)
    with Counter() as counter:
        x.t(), x.view(24), x[1:], x.expand(2, 4, 6), x.detach(), x.chunk(2), x.unflatten(1, (2, 3)), x.reshape(6, 4)
        torch.empty_like(x), x.new_empty(3), torch.empty(2, device=device), torch.empty(0, device=device) + 1
    assert counter.launches == 0
    with Counter() as counter, torch.inference_mode():  # which leaves composite ops whole
        F.linear(x, weight)
    assert [c.flops for c in counter.costs] == [2 * 4 * 6 * 5]


@DEVICES
def test_backward_of_silu_is_one_op(device):
    """It has a kernel and, besides, a definition by other ops, which a GPU does not run."""
    x = torch.zeros(4, 6, device=device, requires_grad=True)
    out = F.silu(x)
    with Counter() as counter:
        out.backward(torch.zeros_like(out))
    silu = [c for c in counter.costs if c.op == "aten::silu_backward"]
    assert [(c.kind, c.bytes) for c in silu] == [("pointwise", 3 * x.nbytes)]
    assert counter.launches <= 3  # with zeros_like and, perhaps, the gradient's first copy


def test_reading_a_scalar_is_seen():
    x = torch.ones(())
    with Counter() as counter:
        x.item()
    assert only(counter.costs).kind == "copy"


def test_rooms_and_table():
    x = torch.zeros(4, 4)
    with Counter() as counter:
        x @ x
        with phase("student"):
            x @ x
            x.clone()
            with phase("losses"):
                x @ x
        with phase("student"):
            x @ x
    product = (2 * 64, 4 * 2 * 16)
    assert table(counter.costs) == [
        Line("student", "linear", 2, 2 * product[0], 2 * product[1]),
        Line("student", "copy", 1, 0, 4 * 32),
        Line("losses", "linear", 1, *product),
        Line(None, "linear", 1, *product),
    ]


# --- our own ops ----------------------------------------------------------------------------


def test_native_group_norm_is_one_op():
    x = torch.zeros(2, 16, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.ones(16, requires_grad=True) for _ in range(2))
    with Counter() as counter:
        out = torch.ops.bilevel_fast.group_norm(x, weight, bias, 4, 1e-5, 0, True)[0]
    assert counter.costs == [
        Cost(None, "norm", "bilevel_fast::group_norm", 0, 4 * (2 * x.numel() + 2 * 16 + 2 * 2 * 4))
    ]
    with Counter() as back:
        out.backward(torch.ones_like(out))
    assert [c.kind for c in back.costs if "group_norm" in c.op] == ["norm"]


def test_every_operator_of_the_kernels_has_a_kind():
    """From its module, by its name."""
    names = {n.partition("::")[2] for n in torch._C._dispatch_get_all_op_names() if n.startswith("bilevel_kernels::")}
    assert len(names) >= 13
    assert {name for name in names if not name.startswith(tuple(_OURS))} == set()
    assert {module.KIND for module in _OURS.values()} == set(KINDS) - {"copy", "other"}


def test_triton_ops_count_what_they_keep():
    """On the meta device no kernel runs: what is counted is the operator."""
    bf16 = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (torch.zeros(2, n, 5 * 16, **bf16) for n in (9, 4, 4))
    for kept, heads in ((None, 2 * 5), (Kept.per_sample(5, [[0, 2], [1]]), 3)):
        product = 2 * heads * 9 * 4 * 16
        with Counter() as there:
            out = pruned_attention(q, k, v, 5, kept=kept)
        assert flops(there.costs, "attention") == flops(there.costs) == 2 * product
        with Counter() as back:
            out.backward(torch.zeros_like(out))
        assert flops(back.costs, "attention") == 5 * product
        if kept is None:  # operands are dense in memory whatever is kept; and 4 bytes for each row of scores
            least = pruned_attention_bytes(9, 4, 2 * 5 * 16, 2, backward=False)
            assert only(there.costs).bytes == least + 4 * 2 * 5 * 9
    x = torch.zeros(2, 16, 6, 6, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.zeros(8, 16, 3, 3, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    kept = {"kept_in": Kept.same(4, [0, 3]), "kept_out": Kept.per_sample(4, [[1], [0, 2, 3]])}
    for lists, channels in (({}, 2 * 16 * 8), (kept, 8 * 2 + 8 * 6)):
        with Counter() as there:
            out = structured_conv2d(x, weight, **lists)
        assert flops(there.costs, "conv") == 2 * channels * 36 * 9
        if not lists:
            assert only(there.costs).bytes == structured_conv2d_bytes(2 * 36, 16, 8, 3, 4, backward=False)
        with Counter() as back:
            out.backward(torch.zeros_like(out))
        assert flops(back.costs, "conv") == 2 * 2 * channels * 36 * 9


def test_scaling_by_one_moves_nothing():
    """Forward stores the gradient of a distillation loss; backward launches, looks at the factor and leaves it."""
    student, teacher = (torch.zeros(2, 8, 4, 4, device="meta", requires_grad=wants) for wants in (True, False))
    with Counter() as there:
        total, _ = feature_kd([student], [teacher], 0.1)
    assert [c.kind for c in there.costs if "feature_kd" in c.op] == ["pointwise"]
    with Counter() as back:
        total.backward()
    assert [c.bytes for c in back.costs if "scale_unless_one" in c.op] == [4]
    with Counter() as there:
        denoise_loss(student, teacher, teacher.clone(), torch.zeros(2, device="meta"))
    (moved,) = (c.bytes for c in there.costs if "denoise_loss" in c.op)
    assert moved == denoise_loss_bytes(student.numel(), 4) + 4 * (2 + 1 + 2)  # the weights, the total and its terms


def test_optimizers():
    n = 64
    p, g, m, v = (torch.zeros(n) for _ in range(4))
    steps = [torch.ones(())]
    with Counter() as counter:
        torch._fused_adamw_(
            [p], [g], [m], [v], [], steps, lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip
    assert only(counter.costs) == Cost(None, "optimizer", "aten::_fused_adamw_", 0, 28 * n + 4)
    flat, moments = torch.zeros(n, device="meta"), [torch.zeros(n, device="meta") for _ in range(2)]
    gradient, copy = (torch.zeros(n, device="meta", dtype=torch.bfloat16) for _ in range(2))
    lr, step = (torch.zeros((), device="meta") for _ in range(2))
    with Counter() as counter:
        adamw_ema_(flat, gradient, *moments, lr=lr, step=step, beta1=0.9, beta2=0.999, eps=1e-8, ema=flat.clone(),
                   ema_decay=0.99, copy=copy)  # fmt: skip
    cost = only([c for c in counter.costs if c.kind == "optimizer"])
    assert cost.bytes == adamw_ema_bytes(n, torch.bfloat16, True, torch.bfloat16) + 8


# --- the UNet -------------------------------------------------------------------------------


def forward(config, structure, latent, text, batch, device="meta"):
    with torch.device(device):
        unet = UNet(config, structure)
        inputs = (
            torch.zeros(batch, config.in_channels, latent, latent),
            torch.zeros(batch, dtype=torch.int64),
            torch.zeros(batch, text, config.cross_attention_dim),
        )
    with Counter() as counter:
        out = unet(*inputs)
    return counter, out


DROPPED = ["up_blocks.3.attentions.2", "down_blocks.3.resnets.1"]


@pytest.mark.parametrize("structure", [Structure.dense(SD21), Structure.uniform(SD21, 0.7, DROPPED)])
@pytest.mark.parametrize("latent", [64, 45])
def test_sd21_forward_multiplies_what_macs_says(structure, latent):
    counter, _ = forward(SD21, structure, latent, 77, batch=2)
    macs = count(structure, latent, 77)
    assert flops(counter.costs, "conv", "linear", "attention") == flops(counter.costs) == 2 * 2 * macs.products
    if structure.is_dense and latent == 64:
        assert macs.products == 402_128_732_160


@DEVICES
def test_mini_forward_and_backward(device):
    """Three times forward; attention 3.5 times, as scores are computed again; nothing for inputs without gradient."""
    batch, text = 2, 12
    structure, size = Structure.uniform(MINI, 0.7), MINI.sample_size
    counter, out = forward(MINI, structure, size, text, batch, device)
    attention = 0
    no_input_gradient = fixed_costs(MINI, size)["conv_in"].products + MINI.block_out_channels[0] * MINI.time_embed_dim
    for site in sites(MINI):
        if site.kind == "transformer":
            tokens = (-(-size // site.stride)) ** 2
            own, cross = (structure.count(site, w) * w.unit_size for w in site.widths[:2])
            attention += 2 * tokens * (tokens * own + text * cross)
            no_input_gradient += 2 * text * MINI.cross_attention_dim * cross  # the text's keys and values
    assert flops(counter.costs, "attention") == 2 * batch * attention
    with counter:
        sum(block.sum() for block in (out.out, *out.blocks)).backward()
    products = count(structure, size, text).products
    assert flops(counter.costs) == batch * (2 * (3 * products - no_input_gradient) + attention)


def test_convolutions_and_matrix_products_agree_with_torch():
    """Torch's own counter, on the CPU, where it does not see attention."""
    structure, size = Structure.uniform(MINI, 0.7), MINI.sample_size
    with FlopCounterMode(display=False) as oracle:
        counter, out = forward(MINI, structure, size, 12, 1, "cpu")
        with counter:
            out.out.sum().backward()
    assert flops(counter.costs, "conv", "linear") == oracle.get_total_flops() > 0


def test_meta_keeps_channels_last():
    """As cuDNN does: without it every Transformer of the count would copy its input once more, and no norm would."""
    with torch.device("meta"):
        conv = nn.Conv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
        x = torch.zeros(2, 4, 6, 6, requires_grad=True)
    with Counter():
        out = conv(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    with Counter():
        assert nn.Conv2d(4, 8, 3, device="meta")(x.detach()).is_contiguous()
