"""Train the mini world's teacher: a text-to-image model of the drawn world, from nothing.

    python -m bilevel_fast.worlds.mini.pretrain --out FOLDER         trains and writes a model folder
    python -m bilevel_fast.worlds.mini.pretrain --steps 0            measures the shipped model folder, or that of --out

UNet and text encoder are trained together on the v-prediction loss (arXiv:2202.00512), with captions dropped now and
then for classifier-free guidance (arXiv:2207.12598); what is kept is an exponential moving average of the weights.
Images, captions, timesteps and noise are functions of (seed, sample index).

Shapes: B images, L text tokens, D text width.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError, check_finite
from bilevel_fast.base.files import write_json
from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.diffusion import Schedule, noise
from bilevel_fast.models.family import MINI_INDEX
from bilevel_fast.models.folder import load_folder, write_unet
from bilevel_fast.models.mini import MiniTextEncoder, PixelUnshuffleVAE, WordTokenizer
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, integers, normal, uniform
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.judge import paint
from bilevel_fast.worlds.mini.probe import Accuracy, Probe
from bilevel_fast.worlds.mini.world import SCENES, WORDS, labels, render


@dataclass(frozen=True)
class PretrainConfig:
    """Train the mini world's teacher."""

    out: Path | None = None
    """The model folder to write, or with --steps 0 to measure; by default the shipped one is measured."""
    overwrite: bool = False
    """Write into a folder that is there."""
    steps: int = 3200
    """Optimizer steps. 0 measures what `out` holds."""
    batch: int = 32
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate, reached after `warmup` steps, then brought to 0 along a cosine."""
    warmup: int = 200
    """Steps until the peak."""
    drop: float = 0.1
    """Share of the images whose caption is empty."""
    ema: float = 0.999
    """Decay of the moving average of the weights, per step."""
    guidance: float = 3.0
    """Classifier-free guidance when measuring."""
    every: int = 1000
    """Steps between snapshots of `out`."""
    seed: int = 0
    """Of the weights and of everything that is drawn."""

    def check(self) -> None:
        """Refuse what cannot run, with a UserError that names the flag."""
        check_finite(self)
        for field, least in (("steps", 0), ("batch", 1), ("warmup", 1), ("every", 1)):
            if (value := getattr(self, field)) < least:
                raise UserError(f"--{field} is {value}; wanted {least} or more")
        if self.steps and self.out is None:
            raise UserError("--out is missing: the model folder to write")
        if self.steps and self.out is not None and self.out.exists() and not self.overwrite:
            raise UserError(f"--out {self.out} exists already; choose another folder, or give --overwrite")


@dataclass(frozen=True)
class TeacherBatch:
    """What one step learns from."""

    images: Tensor  # (B, 3, 32, 32)
    ids: Tensor  # (B, L) tokens of the captions, some of them empty
    t: Tensor  # (B,)
    eps: Tensor  # (B, 12, 16, 16)


class Model(nn.Module):
    """What is trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(MINI)
        self.text = MiniTextEncoder(WordTokenizer(WORDS), width=MINI.cross_attention_dim)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """v of noised latents x (B, 12, 16, 16) at t (B,), given tokens (B, L)."""
        return self.unet(x, t, self.text(ids)).out


def batches(
    config: PretrainConfig, tokenizer: WordTokenizer, schedule: Schedule, channels: int
) -> Iterator[TeacherBatch]:
    """The batches of a run, one per step."""
    objects, colors, styles = labels(SCENES)
    ids, empty = tokenizer([scene.caption for scene in SCENES]), tokenizer([""])
    size = MINI.sample_size
    for step in range(config.steps):
        indices = range(step * config.batch, (step + 1) * config.batch)
        scenes = integers(config.seed, Stream.CAPTION, indices, len(SCENES))
        dropped = uniform(config.seed, Stream.DROPOUT, indices, (1,)) < config.drop
        yield TeacherBatch(
            render(objects[scenes], colors[scenes], styles[scenes], config.seed, indices),
            torch.where(dropped, empty, ids[scenes]),
            integers(config.seed, Stream.TIMESTEP, indices, schedule.num_train_timesteps),
            normal(config.seed, Stream.NOISE, indices, (channels, size, size)),
        )


def train(config: PretrainConfig) -> None:
    """Train, and write a snapshot to `config.out` every so many steps and at the end."""
    assert config.out is not None
    torch.manual_seed(config.seed)
    schedule, vae, model, average = Schedule.sd(), PixelUnshuffleVAE(), Model(), Model()
    average.load_state_dict(model.state_dict())
    average.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, config))
    loss_sum, start = torch.zeros(()), time.perf_counter()
    for step, batch in enumerate(batches(config, model.text.tokenizer, schedule, vae.channels), start=1):
        noised = noise(schedule, vae.moments(batch.images)[:, : vae.channels], batch.eps, batch.t, snr_gamma=None)
        loss = (model(noised.x, noised.t, batch.ids) - noised.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        loss_sum += loss.detach()
        if step % 50 == 0:
            seconds = (time.perf_counter() - start) / step
            print(f"step {step}/{config.steps}  v-loss {loss_sum.item() / 50:.4f}  {seconds:.3f} s/step", flush=True)
            loss_sum.zero_()
        if step % config.every == 0 or step == config.steps:
            save(config.out, average, vae, schedule)


def _lr_factor(step: int, config: PretrainConfig) -> float:
    rise = min(1.0, (step + 1) / config.warmup)
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))


def save(folder: Path, model: Model, vae: PixelUnshuffleVAE, schedule: Schedule) -> None:
    """Write a model folder in the diffusers layout, weights in fp16."""
    write_unet(folder / "unet", model.unet, torch.float16)
    model.text.save(folder)
    vae.save(folder / "vae")
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", schedule.to_dict())
    write_json(folder / "model_index.json", MINI_INDEX)


def measure(folder: Path, guidance: float, seed: int = 0) -> Accuracy:
    """What the probe reads in one image of each of the 216 scenes, sampled with 25 steps of PNDM."""
    model, vae = load_folder(folder), PixelUnshuffleVAE.load(folder / "vae")
    samples = paint(
        model.unet(), model.schedule, model.text_encoder, vae, SCENES, seed=seed, guidance=guidance, steps=25
    )
    return Probe.load().accuracy(samples.images, samples.scenes)


def main() -> None:
    """Train if there are steps to train, then measure."""
    config = flags.parse(PretrainConfig, "bilevel_fast.worlds.mini.pretrain", __doc__)
    config.check()
    if config.steps:
        train(config)
    out = config.out or TEACHER
    print(f"{out}: {measure(out, config.guidance)}  (guidance {config.guidance})")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
