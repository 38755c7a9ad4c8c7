"""The peers of the benchmarks: the losses of the engine, the steps of a plain transcription, and what sets the
peers apart from one another."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed import peers
from benchmarks.speed.peers import TINY_VAE, Inputs, Masters, compiled, eager, released
from bilevel_fast.data.batch import Batch
from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, integers, normal
from bilevel_fast.training.losses import suppression_loss
from bilevel_fast.training.lower import Answers, FineTuning
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.teacher import Teacher

diffusers = pytest.importorskip("diffusers")

TINY = dataclasses.replace(
    MINI, in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), num_heads=(1, 2, 2), norm_num_groups=8,
    cross_attention_dim=16,
)  # fmt: skip
STRUCTURE = Structure.uniform(TINY, 0.6, ["up_blocks.2.attentions.1"])
SMALL = dataclasses.replace(
    TINY, block_out_channels=(16, 32), num_heads=(1, 2), mid_block_type=None,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
B, SHAPE, SEED = 3, (4, 8, 8), 7
CPU = torch.device("cpu")


def make_batch(start):
    index = torch.arange(start, start + B)
    text, anchor = (normal(seed, Stream.CAPTION, index, (5, 16)) for seed in (1, 3))
    return Batch(normal(2, Stream.VIEW, index, SHAPE), text, anchor, index)


def make_unets(structure=STRUCTURE):
    """A teacher and its pruned student, away from initial values."""
    torch.manual_seed(0)
    teacher = UNet(structure.config)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return teacher, teacher.cut(structure)


def make_inputs(structure=STRUCTURE, **fields):
    teacher, student = make_unets(structure)
    batches = {"lower": make_batch(0), "upper": make_batch(2**40)}
    return Inputs(structure, teacher.state_dict(), student.state_dict(), **batches, seed=SEED, **fields)


def in_fp32(inputs):
    return {"released": released(inputs, CPU), "eager": eager(inputs, CPU, dtype=torch.float32)}


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_the_first_losses_are_those_of_the_engine(prediction_type):
    """Both levels at the initial weights, with settings that are nobody's default."""
    schedule, eta = Schedule.sd(prediction_type), 0.7
    weights = dataclasses.replace(peers.DEFAULT_WEIGHTS, diffusion=0.5, feature=0.3)
    inputs = make_inputs(schedule=schedule, eta=eta, weights=weights, snr_gamma=2.0, lr=(0.0, 0.0))
    teacher, student = make_unets()
    answers = Answers(Teacher(teacher), schedule, SEED, snr_gamma=2.0)
    lower = FineTuning(FlatParameters(student), answers, weights).loss(answers.ask(inputs.lower)).total.item()
    noised = answers.noise(inputs.upper)
    target = answers.teacher.steered(noised.x, noised.t, inputs.upper.text, inputs.upper.anchor, eta)[0]
    upper = suppression_loss(student(noised.x, noised.t, inputs.upper.text).out, target).total.item()
    for name, peer in in_fp32(inputs).items():
        assert peer.name == name
        losses = peer.lower(), peer.upper()
        assert not any(loss.requires_grad for loss in losses)
        assert [loss.item() for loss in losses] == pytest.approx([lower, upper], rel=1e-5), name


def plain(inputs, steps, penalty):
    """The algorithm with our UNet and torch's AdamW: losses of `steps`, a string of l and u."""
    teacher, student = make_unets()
    parameters = list(student.parameters())
    adam = {
        level: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0) for level, lr in zip("lu", inputs.lr, strict=True)
    }
    abar = Schedule.sd().alphas_cumprod

    def noised(batch):
        t = integers(SEED, Stream.TIMESTEP, batch.index, 1000)
        eps, a = normal(SEED, Stream.NOISE, batch.index, SHAPE), abar[t][:, None, None, None]
        x, v = a.sqrt() * batch.latents + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * batch.latents
        return x, t, v, (5 * (1 - abar[t])).clamp(max=1)

    def lower_loss():
        x, t, v, omega = noised(inputs.lower)
        mine = student(x, t, inputs.lower.text)
        with torch.no_grad():
            theirs = teacher(x, t, inputs.lower.text)
        diffusion = (omega * (mine.out - v).square().mean((1, 2, 3))).mean()
        feature = sum(F.mse_loss(a, b) for a, b in zip(mine.blocks, theirs.blocks, strict=True)) / len(mine.blocks)
        return diffusion + 2 * F.mse_loss(mine.out, theirs.out) + 0.1 * feature

    def upper_loss():
        x, t, _, _ = noised(inputs.upper)
        with torch.no_grad():
            concept, anchor = (teacher(x, t, text).out for text in (inputs.upper.text, inputs.upper.anchor))
        return F.mse_loss(student(x, t, inputs.upper.text).out, 2 * anchor - concept)

    losses = []
    for level in steps:
        loss = lower_loss() if level == "l" else upper_loss()
        gradients = torch.autograd.grad(loss, parameters)
        if level == "u" and penalty:
            extra = torch.autograd.grad(lower_loss(), parameters)
            sizes = [torch.cat([g.flatten() for g in gs]).norm() for gs in (gradients, extra)]
            scale = penalty * (sizes[0] / sizes[1] if inputs.penalty_norm == "grad" else 1)
            gradients = [a + scale * b for a, b in zip(gradients, extra, strict=True)]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        adam[level].step()
        losses.append(loss.item())
    return losses


STEPS = "llluulul"


@pytest.mark.parametrize("name", ["released", "eager", "eager raw"])
def test_steps_equal_a_plain_transcription(name):
    """Lower and upper steps in turn, at learning rates that change every loss by much more than the tolerance."""
    norm = "raw" if name.endswith("raw") else "grad"
    inputs = make_inputs(lr=(1e-3, 2e-3), penalty=0.5, penalty_norm=norm)
    expected = plain(inputs, STEPS, penalty=0.0 if name == "released" else 0.5)
    peer = in_fp32(inputs)[name.partition(" ")[0]]
    losses = [(peer.lower() if level == "l" else peer.upper()).item() for level in STEPS]
    assert losses == pytest.approx(expected, rel=1e-3)
    moved = [[x for x, level in zip(losses, STEPS, strict=True) if level == which] for which in "lu"]
    assert all(abs(a / b - 1) > 1e-2 for values in moved for a, b in itertools.pairwise(values)), moved


def test_the_penalty_matters_to_the_transcription():
    """Otherwise the test above could not tell a wrong penalty."""
    inputs = make_inputs(lr=(1e-3, 2e-3))
    without, with_it, wrong = (plain(inputs, STEPS, penalty)[5:] for penalty in (0.0, 0.5, 0.6))
    for one, other in ((without, with_it), (with_it, wrong)):
        assert max(abs(a / b - 1) for a, b in zip(one, other, strict=True)) > 2e-3


def test_bf16_is_the_same_step_but_for_rounding():
    inputs = make_inputs()
    exact, rounded = eager(inputs, CPU, dtype=torch.float32), eager(inputs, CPU)
    for one, other in ((exact.lower, rounded.lower), (exact.upper, rounded.upper)):
        a, b = one(), other()
        assert b.dtype == torch.float32
        assert 0 < abs(a.item() / b.item() - 1) < 0.05


def test_masters_hold_what_bf16_cannot():
    """Steps of 1e-4 from 1 are less than half of bf16's last digit there, but ten of them are more."""
    weight = torch.nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    masters = Masters({"w": weight}, {"w": torch.full((4, 3), 1.001)}, (1e-4, 1e-2))
    for _ in range(10):
        masters.take((weight.float() * torch.tensor([1.0, 2.0, -3.0])).sum())
        masters.step(0)
    expected = 1.001 - 1e-3 * torch.tensor([1.0, 1.0, -1.0]).expand(4, 3)
    torch.testing.assert_close(masters.copies[0].detach(), expected, rtol=1e-5, atol=0)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, masters.copies[0].bfloat16())
    masters.step(1)  # the other level: its own rate, its own moments
    assert (masters.copies[0] - expected).abs().min() > 0.5e-2


class Reads(TorchDispatchMode):
    """Counts the tensors that the host reads."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(step):
    step()  # optimizers set themselves up
    with Reads() as mode:
        step()
    return mode.count


def test_who_waits_for_the_host():
    """Five reads of a lower step as released, two of an upper one, none in eager."""
    inputs = make_inputs()
    quiet, loud = eager(inputs, CPU), released(inputs, CPU, anomaly=False)
    assert [reads(quiet.lower), reads(quiet.upper)] == [0, 0]
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in inputs.student]
    for p in parameters:
        p.grad = torch.ones(1)
    of_adamw = reads(torch.optim.AdamW(parameters, foreach=True).step)  # its step counts, which are on the host
    assert [reads(loud.lower) - of_adamw, reads(loud.upper) - of_adamw] == [5, 2]


@pytest.mark.parametrize("anomaly", [True, False])
def test_released_sets_its_flags_for_itself_alone(monkeypatch, anomaly):
    seen = []

    def spy(*args):
        convolution = torch.backends.cudnn.allow_tf32
        seen.append((torch.is_anomaly_enabled(), torch.get_float32_matmul_precision(), convolution))
        return original(*args)

    original = peers.fine_tuning_terms
    monkeypatch.setattr(peers, "fine_tuning_terms", spy)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = False
        peer = released(make_inputs(), CPU, anomaly=anomaly)
        peer.lower()
        assert seen == [(anomaly, "highest", True)]
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.is_anomaly_enabled()
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_autoencoder_works_in_every_step(monkeypatch):
    """On pixels of the latents' size times its scale; the loss stays that of the other peers."""
    shapes = []
    original = diffusers.AutoencoderKL.encode

    def spy(self, pixels, *args, **kwargs):
        shapes.append(tuple(pixels.shape))
        return original(self, pixels, *args, **kwargs)

    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", spy)
    inputs = make_inputs()
    online, cached = released(inputs, CPU, vae=TINY_VAE), released(inputs, CPU)
    assert online.lower() == cached.lower()
    assert online.upper() == cached.upper()
    assert shapes == [(B, 3, 16, 16)] * 2


def test_the_real_autoencoder():
    """Stable Diffusion's, by its number of parameters and the size of its latents."""
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(**peers.SD_VAE)
        latents = model.encode(torch.empty(1, 3, 512, 512)).latent_dist.mean
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert latents.shape == (1, 4, 64, 64)


def test_layouts():
    """Weights and activations in channels_last for eager, in NCHW as released."""
    inputs = make_inputs()
    for make, channels_last in ((eager, True), (released, False)):
        found = []
        original = torch.nn.Conv2d.forward

        def spy(self, x, original=original, found=found):
            if self.kernel_size == (3, 3) and x.shape[2] > 1:
                found.append(
                    [y.is_contiguous(memory_format=torch.channels_last) for y in (x, self.weight)] + [x.is_contiguous()]
                )
            return original(self, x)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Conv2d, "forward", spy)
            make(inputs, CPU).lower()
        x, weight, nchw = ([f[i] for f in found] for i in range(3))
        # diffusers itself leaves channels_last after a Transformer, so not every x follows
        assert all(weight) is channels_last
        assert (sum(x) > len(x) / 2) is channels_last
        assert all(nchw) is not channels_last


def test_compile_is_eager_in_two_graphs():
    """One for the teacher and one for the student, whatever the level, and none more in later steps."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    structure = Structure.uniform(SMALL, 0.6, ["up_blocks.1.attentions.1", "up_blocks.0.resnets.1"])
    inputs = make_inputs(structure, lr=(1e-3, 2e-3))
    peer = compiled(inputs, CPU, dtype=torch.float32, backend="aot_eager")
    other = eager(inputs, CPU, dtype=torch.float32)
    for _ in range(2):
        assert peer.lower().item() == pytest.approx(other.lower().item(), rel=1e-4)
        assert peer.upper().item() == pytest.approx(other.upper().item(), rel=1e-4)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
