"""What our step is compared with: the same two steps through diffusers' UNet, in three ways of running them.

    released   as the trainer released with arXiv:2412.15341 runs them
    eager      as a careful user writes them today
    compile    eager, with both UNets through torch.compile

Every peer holds the same pruned student and dense teacher, takes the same batches, noise and timesteps, and its losses
are ours but for rounding; schedule and SNR weights come from `models.diffusion`. They differ in how networks,
losses and optimizers run:

                        released                          eager, compile
    weights             fp32, NCHW                        bf16, channels_last; fp32 masters
    fp32 products       matmul fp32, convolution TF32     left as they are
    block outputs       forward hooks, one mse_loss each  the same
    optimizer           a foreach AdamW per level         a fused AdamW per level
    latents             the VAE, in every step            cached
    text states         cached                            cached
    losses              read by the host                  stay on the device
    autograd            anomaly mode                      plain
    teacher, upper      two forward passes                two forward passes
    penalty, upper      none                              lambda L_ft on the last lower batch, teacher and all

`released` follows the configuration file of the bilevel run: no mixed precision, no clipping, and TF32 where torch has
it by default. What else that trainer does is left out, in its favour: JPEG files, text encoders and learning rates. In
favour of all three, noise and timesteps are on the device before anything is timed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.diffusers_unet import Hooked, diffusers_unet
from bilevel_fast.base.errors import require
from bilevel_fast.data.batch import Batch
from bilevel_fast.models.diffusion import Noised, Schedule, noise
from bilevel_fast.models.structure import Structure
from bilevel_fast.ops.randomness import Stream, integers, normal
from bilevel_fast.training.losses import DEFAULT_WEIGHTS, LossWeights


def _vae(*channels: int, **fields: Any) -> Mapping[str, Any]:
    blocks = {f"{half}_block_types": (kind,) * len(channels) for half, kind in _VAE_BLOCKS.items()}
    return {"block_out_channels": channels, "latent_channels": 4, **blocks, **fields}


_VAE_BLOCKS = {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}
SD_VAE = _vae(128, 256, 512, 512, layers_per_block=2)
"""`AutoencoderKL` of Stable Diffusion; its latents are an eighth of the pixels."""
TINY_VAE = _vae(8, 16, layers_per_block=1, norm_num_groups=4)
"""To rehearse with on a CPU; its latents are half of the pixels."""


@dataclass(frozen=True)
class Peer:
    """Somebody else's steps. A call moves the student once, and returns the loss before that: (), detached.

    It is on the device; the upper one is that of the suppression, without the penalty.
    """

    name: str
    lower: Callable[[], Tensor]
    upper: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What every peer starts from; it copies what it changes."""

    structure: Structure
    teacher: Mapping[str, Tensor]
    """State dict of the dense UNet."""
    student: Mapping[str, Tensor]
    """State dict of the pruned one, `UNet(structure.config, structure).state_dict()`."""
    lower: Batch
    upper: Batch
    """With anchors; the released trainer's are the null prompt."""
    schedule: Schedule = field(default_factory=Schedule.sd)
    seed: int = 0
    """Noise and timesteps follow from it and from the indices of a batch, as in the engine."""
    weights: LossWeights = DEFAULT_WEIGHTS
    snr_gamma: float | None = 5.0
    lr: tuple[float, float] = (1e-6, 5e-6)
    """Of the lower and the upper level."""
    eta: float = 1.0
    penalty: float = 1.0
    """lambda; of `eager` and `compile` only."""
    penalty_norm: Literal["grad", "raw"] = "grad"


class Material:
    """A batch on the device, noised in every step as a trainer does it.

    Args:
        dtype: What the networks get; the loss' target stays fp32.
    """

    def __init__(self, inputs: Inputs, batch: Batch, device: torch.device, dtype: torch.dtype, layout: Any):
        self.inputs, self.dtype, self.layout = inputs, dtype, layout
        self.schedule = inputs.schedule.to(device)
        self.latents, shape = batch.latents.to(device), tuple(batch.latents.shape[1:])
        self.eps = normal(inputs.seed, Stream.NOISE, batch.index, shape).to(device)
        self.t = integers(inputs.seed, Stream.TIMESTEP, batch.index, self.schedule.num_train_timesteps).to(device)
        self.text = batch.text.to(device, dtype)
        self.anchor = None if batch.anchor is None else batch.anchor.to(device, dtype)

    def noised(self) -> tuple[Noised, Tensor]:
        """The noised batch, and its x as the networks take it."""
        noised = noise(self.schedule, self.latents, self.eps, self.t, self.inputs.snr_gamma)
        return noised, noised.x.to(self.dtype, memory_format=self.layout)


def fine_tuning_terms(student: Hooked, teacher: Hooked, batch: Material) -> tuple[Tensor, list[Tensor]]:
    """L_ft and its terms before weighting (diffusion, output, feature), one `mse_loss` per block."""
    noised, x = batch.noised()
    with torch.no_grad():
        theirs, their_blocks = teacher(x, noised.t, batch.text)
    mine, my_blocks = student(x, noised.t, batch.text)
    squared = F.mse_loss(mine.float(), noised.target, reduction="none")
    diffusion = (squared.mean(dim=(1, 2, 3)) * noised.weight).mean()
    output = F.mse_loss(mine.float(), theirs.float())
    feature = torch.zeros((), device=mine.device)
    for one, other in zip(my_blocks, their_blocks, strict=True):
        feature = feature + F.mse_loss(one.float(), other.float())
    feature = feature / len(my_blocks)
    weights = batch.inputs.weights
    total = weights.diffusion * diffusion + weights.output * output + weights.feature * feature
    return total, [term.detach() for term in (diffusion, output, feature)]


def suppression_loss(student: Hooked, teacher: Hooked, batch: Material) -> Tensor:
    """The student on the concept against a - eta (c - a) of the teacher, which is asked twice."""
    assert batch.anchor is not None, "an upper batch needs anchors"
    noised, x = batch.noised()
    with torch.no_grad():
        concept = teacher(x, noised.t, batch.text)[0].float()
        anchor = teacher(x, noised.t, batch.anchor)[0].float()
    return F.mse_loss(student(x, noised.t, batch.text)[0].float(), anchor - batch.inputs.eta * (concept - anchor))


def released(inputs: Inputs, device: torch.device, vae: Mapping[str, Any] | None = None, anomaly: bool = True) -> Peer:
    """Both steps as the released trainer runs them.

    Args:
        vae: Configuration of the `AutoencoderKL` that encodes pixels in every step (`SD_VAE`, `TINY_VAE`); None encodes
            nothing. Its weights are random, so the step goes on with the latents of the batch.
        anomaly: Autograd anomaly mode, which the trainer's script turns on.
    """
    teacher = Hooked(diffusers_unet(Structure.dense(inputs.structure.config), inputs.teacher, device=device))
    student = Hooked(diffusers_unet(inputs.structure, inputs.student, device=device))
    teacher.eval().requires_grad_(False)
    student.train()
    as_is: Any = (device, torch.float32, torch.contiguous_format)
    batches = [Material(inputs, batch, *as_is) for batch in (inputs.lower, inputs.upper)]
    optimizers = [torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0, foreach=True) for lr in inputs.lr]
    encode = _encoder(vae, device) if vae is not None else None

    def step(level: int, loss_and_terms: Callable[[Material], tuple[Tensor, list[Tensor]]]) -> Tensor:
        with _default_tf32(), torch.autograd.set_detect_anomaly(anomaly):
            if encode is not None:
                encode(batches[level])
            loss, terms = loss_and_terms(batches[level])
            loss.item()
            loss.backward()
            optimizers[level].step()
            optimizers[level].zero_grad()
            for term in (*terms, loss):  # to the log, and to the progress bar
                term.item()
        return loss.detach()

    return Peer(
        "released",
        lambda: step(0, lambda batch: fine_tuning_terms(student, teacher, batch)),
        lambda: step(1, lambda batch: (suppression_loss(student, teacher, batch), [])),
    )


def _encoder(config: Mapping[str, Any], device: torch.device) -> Callable[[Material], Tensor]:
    """Draws latents of pixels that are on the device already."""
    model = require("diffusers", "sd").AutoencoderKL(**config).to(device).eval().requires_grad_(False)
    scale = 2 ** (len(config["block_out_channels"]) - 1)

    @cache
    def pixels(batch: Material) -> Tensor:
        height, width = batch.latents.shape[2:]
        return torch.rand(len(batch.latents), 3, scale * height, scale * width, device=device) * 2 - 1

    return lambda batch: model.encode(pixels(batch)).latent_dist.sample() * model.config.scaling_factor


@contextmanager
def _default_tf32() -> Iterator[None]:
    """TF32 where torch has it by default: in convolutions, not in matrix products. As before afterwards."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


class Masters:
    """The weights in fp32, which both levels' AdamW move; the networks compute with `weights`, which follow.

    Args:
        weights: By name, as the network holds them.
        state: The same in full precision.
        rates: Learning rate of each level.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], rates: tuple[float, ...]):
        self.weights = list(weights.values())
        self.copies = [nn.Parameter(torch.empty_like(w, dtype=torch.float32)) for w in self.weights]
        with torch.no_grad():
            for copy, name in zip(self.copies, weights, strict=True):
                copy.copy_(state[name])
                copy.grad = torch.zeros_like(copy)
        self.optimizers = [torch.optim.AdamW(self.copies, lr=lr, weight_decay=0.0, fused=True) for lr in rates]

    @property
    def gradients(self) -> list[Tensor]:
        return [copy.grad for copy in self.copies if copy.grad is not None]

    def take(self, loss: Tensor) -> None:
        """Set the gradients to those of a loss."""
        loss.backward()
        torch._foreach_copy_(self.gradients, [w.grad for w in self.weights])
        for weight in self.weights:
            weight.grad = None

    def add_penalty(self, loss: Tensor, penalty: float, norm: Literal["grad", "raw"]) -> None:
        """Add lambda times the gradient of L_ft; with `grad` it is first scaled to the norm of what is there."""
        loss.backward()
        extra = [w.grad.float() for w in self.weights if w.grad is not None]
        for weight in self.weights:
            weight.grad = None
        scale = torch.full((), penalty, device=loss.device)
        if norm == "grad":
            scale = scale * nn.utils.get_total_norm(self.gradients) / nn.utils.get_total_norm(extra)
        torch._foreach_mul_(extra, scale)
        torch._foreach_add_(self.gradients, extra)

    @torch.no_grad()
    def step(self, level: int) -> None:
        self.optimizers[level].step()
        torch._foreach_copy_(self.weights, self.copies)


def eager(inputs: Inputs, device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> Peer:
    """Both steps as a careful user writes them today."""
    return _careful("eager", inputs, device, dtype, lambda unet: unet)


def compiled(
    inputs: Inputs, device: torch.device, *, dtype: torch.dtype = torch.bfloat16, backend: str = "inductor"
) -> Peer:
    """`eager`, with each UNet as one compiled graph; hooks and all, nothing breaks it."""
    options: Any = {"fullgraph": True, "dynamic": False, "backend": backend}
    return _careful("compile", inputs, device, dtype, lambda unet: torch.compile(unet, **options))


def _careful(
    name: str, inputs: Inputs, device: torch.device, dtype: torch.dtype, prepare: Callable[[Hooked], Any]
) -> Peer:
    layout: Any = {"dtype": dtype, "device": device, "memory_format": torch.channels_last}
    dense = Structure.dense(inputs.structure.config)
    # There is no dropout to turn on, and in training mode diffusers copies the input of a shortcut to NCHW.
    teacher_unet = Hooked(diffusers_unet(dense, inputs.teacher, **layout)).eval().requires_grad_(False)
    student_unet = Hooked(diffusers_unet(inputs.structure, inputs.student, **layout)).eval()
    teacher, student = prepare(teacher_unet), prepare(student_unet)
    masters = Masters(dict(student_unet.unet.named_parameters()), inputs.student, inputs.lr)
    lower, upper = (Material(inputs, b, device, dtype, torch.channels_last) for b in (inputs.lower, inputs.upper))

    def lower_step() -> Tensor:
        loss, _ = fine_tuning_terms(student, teacher, lower)
        masters.take(loss)
        masters.step(0)
        return loss.detach()

    def upper_step() -> Tensor:
        loss = suppression_loss(student, teacher, upper)
        masters.take(loss)
        if inputs.penalty:
            masters.add_penalty(fine_tuning_terms(student, teacher, lower)[0], inputs.penalty, inputs.penalty_norm)
        masters.step(1)
        return loss.detach()

    return Peer(name, lower_step, upper_step)


PEERS: Mapping[str, Callable[..., Peer]] = {"released": released, "eager": eager, "compile": compiled}
"""By name; called with `Inputs` and a device."""
