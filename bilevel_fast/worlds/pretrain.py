"""Train the teacher of a drawn world: a small text-to-image model of its drawings.

    python -m bilevel_fast.worlds.NAME.pretrain --out FOLDER    trains and writes a model folder; killed, it goes on
    python -m bilevel_fast.worlds.NAME.pretrain --steps 0       measures the shipped model folder, or that of --out

UNet and text encoder are trained together on the v-prediction loss (arXiv:2202.00512), with captions dropped now and
then for classifier-free guidance (arXiv:2207.12598); what is kept is an exponential moving average of the weights.
Images, captions, timesteps and noise are functions of (seed, sample index).

Shapes: B images, L text tokens, D text width.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_fast.base import flags
from bilevel_fast.base.errors import UserError, check_finite
from bilevel_fast.base.files import replacing, write_json
from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.diffusion import Schedule, noise
from bilevel_fast.models.folder import load_folder, load_unet, write_unet
from bilevel_fast.models.mini import MiniTextEncoder, PixelUnshuffleVAE, WordTokenizer
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, integers, normal, uniform
from bilevel_fast.worlds.drawn import DrawnWorld
from bilevel_fast.worlds.judge import paint
from bilevel_fast.worlds.probe import Accuracy
from bilevel_fast.worlds.scenes import Scene


@dataclass(frozen=True)
class PretrainConfig:
    """Train the teacher of a drawn world."""

    out: Path | None = None
    """The model folder to write, or with --steps 0 to measure; by default the shipped one is measured."""
    overwrite: bool = False
    """Write into a folder that is there."""
    steps: int = 3200
    """Optimizer steps in all. 0 measures what `out` holds."""
    batch: int = 32
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate, reached after `warmup` steps."""
    warmup: int = 200
    """Steps until the peak."""
    decay: float = 1.0
    """Share of the steps, the last ones, in which the learning rate falls to 0 along a cosine."""
    drop: float = 0.1
    """Share of the images whose caption is empty."""
    rephrase: float = 0.0
    """Share of the other images whose caption is another sentence for the same scene, where it has one."""
    ema: float = 0.999
    """Decay of the moving average of the weights, per step."""
    guidance: float = 3.0
    """Classifier-free guidance when measuring."""
    every: int = 1000
    """Steps between checkpoints, FOLDER.ckpt, and snapshots of `out`."""
    seed: int = 0
    """Of the weights and of everything that is drawn."""

    def check(self) -> None:
        """Refuse what cannot run, with a UserError that names the flag."""
        check_finite(self)
        for field, least in (("steps", 0), ("batch", 1), ("warmup", 1), ("every", 1)):
            if (value := getattr(self, field)) < least:
                raise UserError(f"--{field} is {value}; wanted {least} or more")
        if not 0 < self.decay <= 1:
            raise UserError(f"--decay is {self.decay}; wanted > 0 and <= 1")
        if self.steps and self.out is None:
            raise UserError("--out is missing: the model folder to write")
        if self.out is None or not self.steps or self.checkpoint.exists():
            return  # whose it is, `train` looks at
        if self.out.exists() and not self.overwrite:
            raise UserError(f"--out {self.out} exists already; choose another folder, or give --overwrite")

    @property
    def checkpoint(self) -> Path:
        """Beside `out`; a run that finds it goes on with it."""
        assert self.out is not None
        return self.out.with_name(f"{self.out.name}.ckpt")


@dataclass(frozen=True)
class Subject:
    """What is taught.

    Attributes:
        world: Its drawings and sentences.
        words: All words of these.
        index: The `model_index.json` of its models.
        start: A model folder whose UNet is begun with; None begins with random weights.
    """

    world: DrawnWorld[Any]
    words: tuple[str, ...]
    index: Mapping[str, Any]
    start: Path | None = None


@dataclass(frozen=True)
class TeacherBatch:
    """What one step learns from."""

    images: Tensor  # (B, 3, 32, 32)
    ids: Tensor  # (B, L) tokens of the captions, some of them empty
    t: Tensor  # (B,)
    eps: Tensor  # (B, 12, 16, 16)


class Model(nn.Module):
    """What is trained together."""

    def __init__(self, words: tuple[str, ...]) -> None:
        super().__init__()
        self.unet = UNet(MINI)
        self.text = MiniTextEncoder(WordTokenizer(words), width=MINI.cross_attention_dim)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """v of noised latents x (B, 12, 16, 16) at t (B,), given tokens (B, L)."""
        return self.unet(x, t, self.text(ids)).out


def batches(
    subject: Subject,
    config: PretrainConfig,
    tokenizer: WordTokenizer,
    schedule: Schedule,
    channels: int,
    first: int = 0,
) -> Iterator[TeacherBatch]:
    """The batches of a run, one per step, from step `first` on."""
    world, size = subject.world, MINI.sample_size
    for step in range(first, config.steps):
        indices = range(step * config.batch, (step + 1) * config.batch)
        numbers = integers(config.seed, Stream.CAPTION, indices, len(world.scenes)).tolist()
        scenes = [world.scenes[number] for number in numbers]
        yield TeacherBatch(
            world.render(scenes, config.seed, indices),
            tokenizer(_texts(world, config, scenes, indices)),
            integers(config.seed, Stream.TIMESTEP, indices, schedule.num_train_timesteps),
            normal(config.seed, Stream.NOISE, indices, (channels, size, size)),
        )


def _texts(world: DrawnWorld[Any], config: PretrainConfig, scenes: Sequence[Scene], indices: range) -> list[str]:
    draws, texts = uniform(config.seed, Stream.DROPOUT, indices, (3,)).tolist(), []
    for scene, (dropped, rephrased, which) in zip(scenes, draws, strict=True):
        caption, *others = world.captions(scene)
        if others and rephrased < config.rephrase:
            caption = others[int(which * len(others))]
        texts.append("" if dropped < config.drop else caption)
    return texts


def train(subject: Subject, config: PretrainConfig) -> None:
    """Train, from the last checkpoint on, and write one and a snapshot to `config.out` every so many steps.

    Raises:
        UserError: The checkpoint is of a training with other settings, and `overwrite` is off.
    """
    assert config.out is not None
    torch.manual_seed(config.seed)
    schedule, vae = Schedule.sd(), PixelUnshuffleVAE()
    model, average = Model(subject.words), Model(subject.words)
    if subject.start is not None:
        model.unet.load_state_dict(load_unet(subject.start).state_dict())
    average.load_state_dict(model.state_dict())
    average.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    state = {"model": model, "average": average, "optimizer": optimizer}
    settings = {name: value for name, value in asdict(config).items() if name not in _ANY}
    first = _resume(config, settings, state)
    if first >= config.steps:
        save(config.out, average, vae, schedule, subject.index)  # it may have been moved away
    loss_sum, start = torch.zeros(()), time.perf_counter()
    run = batches(subject, config, model.text.tokenizer, schedule, vae.channels, first)
    for step, batch in enumerate(run, start=first + 1):
        noised = noise(schedule, vae.moments(batch.images)[:, : vae.channels], batch.eps, batch.t, snr_gamma=None)
        loss = (model(noised.x, noised.t, batch.ids) - noised.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _lr_factor(step - 1, config)
        optimizer.step()
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        loss_sum += loss.detach()
        if step % 50 == 0:
            seconds = (time.perf_counter() - start) / (step - first)
            print(f"step {step}/{config.steps}  v-loss {loss_sum.item() / 50:.4f}  {seconds:.3f} s/step", flush=True)
            loss_sum.zero_()
        if step % config.every == 0 or step == config.steps:
            save(config.out, average, vae, schedule, subject.index)
            with replacing(config.checkpoint) as aside:
                parts = {name: part.state_dict() for name, part in state.items()}
                torch.save({**parts, "step": step, "settings": settings}, aside)


_ANY = ("out", "overwrite", "steps", "guidance", "every")
"""Settings with which a training may go on that was begun with others."""


def _resume(config: PretrainConfig, settings: Mapping[str, Any], state: Mapping[str, Any]) -> int:
    path = config.checkpoint
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    if (known := saved.get("settings")) != settings:
        if config.overwrite:
            return 0
        differ = [name for name in known or () if known[name] != settings.get(name)]
        other = ", ".join(f"--{name} {known[name]}" for name in differ) or "it does not say which"
        raise UserError(
            f"{path} is of another training ({other}); give its settings to go on "
            "with it, another --out, or --overwrite to begin anew"
        )
    for name, part in state.items():
        part.load_state_dict(saved[name])
    return saved["step"]


def _lr_factor(step: int, config: PretrainConfig) -> float:
    rise = min(1.0, (step + 1) / config.warmup)
    fallen = max(0.0, 1 - (1 - step / config.steps) / config.decay)
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, fallen)))


def save(folder: Path, model: Model, vae: PixelUnshuffleVAE, schedule: Schedule, index: Mapping[str, Any]) -> None:
    """Write a model folder in the diffusers layout, weights in fp16."""
    write_unet(folder / "unet", model.unet, torch.float16)
    model.text.save(folder)
    vae.save(folder / "vae")
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", schedule.to_dict())
    write_json(folder / "model_index.json", dict(index))


def measure(
    world: DrawnWorld[Any], folder: Path, guidance: float, per_scene: int, seed: int = 0
) -> dict[str, Accuracy]:
    """What the probe reads in images of each scene, sampled with 25 steps of DDIM: of all, and style by style."""
    model, vae = load_folder(folder), PixelUnshuffleVAE.load(folder / "vae")
    unet, found = model.unet(), {}
    parts = unet, model.schedule, model.text_encoder, vae
    samples = paint(*parts, list(world.scenes) * per_scene, seed=seed, guidance=guidance, steps=25)
    found["all"] = world.probe.accuracy(samples.images, samples.scenes)
    for style, name in enumerate(world.styles):
        rows = [row for row, scene in enumerate(samples.scenes) if scene.style == style]
        found[name] = world.probe.accuracy(samples.images[rows], [samples.scenes[row] for row in rows])
    return found


def command(subject: Subject, default: PretrainConfig, per_scene: int = 1) -> None:
    """`python -m bilevel_fast.worlds.NAME.pretrain`: train if there are steps to train, then measure."""
    name = subject.world.name
    config = flags.parse(PretrainConfig, f"bilevel_fast.worlds.{name}.pretrain", __doc__, default=default)
    config.check()
    if config.steps:
        train(subject, config)
    out = config.out or subject.world.teacher
    for what, accuracy in measure(subject.world, out, config.guidance, per_scene).items():
        print(f"{out}: {what}: {accuracy}  (guidance {config.guidance})")
