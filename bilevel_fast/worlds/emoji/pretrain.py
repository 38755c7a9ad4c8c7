"""Train the emoji world's teacher: a text-to-image model of the drawings, from nothing.

    python -m bilevel_fast.worlds.emoji.pretrain --out FOLDER         trains and writes a model folder; killed, it goes on

UNet and text encoder are trained together on the v-prediction loss (arXiv:2202.00512), with captions dropped now and
then for classifier-free guidance (arXiv:2207.12598); what is kept is an exponential moving average of the weights. The
learning rate is constant and falls to 0 over the last fifth of the steps, so that a run can be made longer later.
Images, captions, timesteps and noise are functions of (seed, sample index).

Shapes: B images, L text tokens, D text width.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import check_finite
from bilevel_fast.base.files import write_json
from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.diffusion import Schedule, noise
from bilevel_fast.models.family import MINI_INDEX
from bilevel_fast.models.folder import load_unet, write_unet
from bilevel_fast.models.mini import MiniTextEncoder, PixelUnshuffleVAE, WordTokenizer
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, integers, normal, uniform
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.emoji.drawings import SCENES, WORDS, labels, render


@dataclass(frozen=True)
class PretrainConfig:
    """Train the emoji world's teacher."""

    out: Path
    """The model folder to write; a checkpoint lies beside it, and is gone on with."""
    steps: int = 12000
    """Optimizer steps in all."""
    batch: int = 32
    """Images per step."""
    lr: float = 8e-4
    """Learning rate after `warmup` steps, until the last fifth."""
    warmup: int = 200
    """Steps until the learning rate is reached."""
    drop: float = 0.1
    """Share of the images whose caption is empty."""
    rephrase: float = 0.2
    """Share of the other images with a studio that are captioned by a paraphrase."""
    ema: float = 0.999
    """Decay of the moving average of the weights, per step."""
    every: int = 250
    """Steps between checkpoints."""
    seed: int = 0
    """Of the weights and of everything that is drawn."""


class Model(nn.Module):
    """What is trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(MINI)
        self.text = MiniTextEncoder(WordTokenizer(WORDS), width=MINI.cross_attention_dim)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """v of noised latents x (B, 12, 16, 16) at t (B,), given tokens (B, L)."""
        return self.unet(x, t, self.text(ids)).out


def captions(config: PretrainConfig, scenes: Tensor, indices: range) -> list[str]:
    """What each image is captioned by."""
    draws = uniform(config.seed, Stream.DROPOUT, indices, (3,)).tolist()
    texts = []
    for number, (dropped, rephrased, which) in zip(scenes.tolist(), draws, strict=True):
        scene = SCENES[number]
        others = scene.paraphrases
        text = others[int(which * len(others))] if others and rephrased < config.rephrase else scene.caption
        texts.append("" if dropped < config.drop else text)
    return texts


def train(config: PretrainConfig) -> None:
    """Train from the last checkpoint on, and write the model folder at each."""
    torch.manual_seed(config.seed)
    schedule, vae, model, average = Schedule.sd(), PixelUnshuffleVAE(), Model(), Model()
    model.unet.load_state_dict(load_unet(TEACHER).state_dict())
    average.load_state_dict(model.state_dict())
    average.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    checkpoint, first = config.out.with_suffix(".ckpt"), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    names, studios = labels(SCENES)
    size, tokenizer = MINI.sample_size, model.text.tokenizer
    losses, start = torch.zeros(()), time.perf_counter()
    for step in range(first, config.steps):
        indices = range(step * config.batch, (step + 1) * config.batch)
        scenes = integers(config.seed, Stream.CAPTION, indices, len(SCENES))
        images = render(names[scenes], studios[scenes], config.seed, indices)
        ids = tokenizer(captions(config, scenes, indices))
        t = integers(config.seed, Stream.TIMESTEP, indices, schedule.num_train_timesteps)
        eps = normal(config.seed, Stream.NOISE, indices, (vae.channels, size, size))
        noised = noise(schedule, vae.moments(images)[:, : vae.channels], eps, t, snr_gamma=None)
        loss = (model(noised.x, noised.t, ids) - noised.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min((step + 1) / config.warmup, 1.0, 5 * (1 - step / config.steps))
        optimizer.step()
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        losses += loss.detach()
        done = step + 1
        if done % 25 == 0:
            seconds = (time.perf_counter() - start) / (done - first)
            print(f"step {done}/{config.steps}  v-loss {losses.item() / 25:.4f}  {seconds:.3f} s/step", flush=True)
            losses.zero_()
        if done % config.every == 0 or done == config.steps:
            save(config.out, average, vae, schedule)
            state = {
                "model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(), "step": done
            }  # fmt: skip
            aside = checkpoint.with_suffix(".new")
            torch.save(state, aside)
            aside.replace(checkpoint)


def save(folder: Path, model: Model, vae: PixelUnshuffleVAE, schedule: Schedule) -> None:
    """Write a model folder in the diffusers layout, weights in fp16."""
    write_unet(folder / "unet", model.unet, torch.float16)
    model.text.save(folder)
    vae.save(folder / "vae")
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", schedule.to_dict())
    write_json(folder / "model_index.json", MINI_INDEX)


def main() -> None:
    config = flags.parse(PretrainConfig, "bilevel_fast.worlds.emoji.pretrain", __doc__)
    check_finite(config)
    train(config)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
