"""APTP from a dense model to a mixture folder, with checkpoints: train the router, then cut its experts.

The run folder and the mixture folder are one. A run that was killed and resumed ends, on a CPU, with the same bits as
one that was not: batches, noise and gates follow from the step.

Legend: B batch, N training prompts, K experts, D width of the prompt embedding.
"""

import dataclasses
import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel_fast.base.devices import pick_device
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json
from bilevel_fast.data.batch import Batch
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.loader import Loader
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.models.folder import ModelFolder, load_folder
from bilevel_fast.models.macs import count
from bilevel_fast.ops import dispatch as ops
from bilevel_fast.ops import providers
from bilevel_fast.pruning.aptp.encoders import MpnetPrompts, PromptEncoder, TextPrompts, centred
from bilevel_fast.pruning.aptp.experts import planned
from bilevel_fast.pruning.aptp.mixture_folder import INDEX, write_mixture
from bilevel_fast.pruning.aptp.train import RouterConfig, RouterTraining
from bilevel_fast.pruning.budget import MacBudget
from bilevel_fast.runs import sessions
from bilevel_fast.runs.inputs import fetched, inputs
from bilevel_fast.runs.page import mixture as page
from bilevel_fast.runs.sources import image_source
from bilevel_fast.training import loop
from bilevel_fast.training.checkpoint import GracefulStop
from bilevel_fast.training.loop import LoopSettings, Places, Trainee, running
from bilevel_fast.training.run_folder import RunFolder
from bilevel_fast.training.stats import Means
from bilevel_fast.worlds.mini import TEACHER

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AptpConfig(RouterConfig):
    """Train APTP's router, cut its experts, and write the mixture folder.

    Without --data the mini world draws its own images; with it, the defaults of the training are APTP's.
    """

    MAIN: ClassVar = ("out", "teacher", "data", "experts", "budget", "steps", "batch", "seed", "resume", "device")

    out: Path = Path("runs/aptp")
    """Run folder, which becomes the mixture folder; must be new, unless --resume."""
    teacher: Path = TEACHER
    """Dense model folder in the diffusers layout, or its id on the hub; `mini` and `emoji` are the
    built-in teachers. Default: mini."""
    data: Path | None = None
    """Latent cache to train on."""
    prompt_encoder: Path | None = None
    """Folder of a sentence encoder (all-mpnet-base-v2); by default the model's own text encoder."""
    experts: int = 4
    """How many there are."""
    budget: float = 0.8
    """MACs of each expert as a share of the teacher's."""
    steps: int = 480
    """Of the training."""
    batch: int = 16
    """Images per step."""
    lr: float = 0.01
    """Learning rate, times the square root of the batch size."""
    pretrain: int = 48
    """First steps, in which the predictor's own gates drive the network."""
    warmup: int = 10
    """Steps until the learning rate is reached, linearly."""
    snr_gamma: float | None = 5.0
    """Clips the weight of a timestep in the diffusion loss."""
    seed: int = 0
    """Of everything random."""
    images: int = 864
    """Images that the mini world draws: four of each scene."""
    max_prompts: int = 20_000
    """Different captions that the experts are shared out over in the end, at most; taken evenly from the data."""
    latent: int | None = None
    """Height and width of the latents to count MACs at; by default the UNet's sample size."""
    text: int | None = None
    """Text tokens to count MACs at; by default the length of the text encoder."""
    recompute: bool = False
    """Compute the inside of the UNet's sites again in backward instead of keeping it: less memory."""
    log_every: int = 20
    """Steps per status line."""
    checkpoint_every: int = 100
    """Steps per checkpoint."""
    max_bad_steps: int = 10
    """Stop after this many steps in a row whose gradient is not finite; each of them is skipped."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    resume: bool = False
    """Go on with the run in --out, from its last checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", "images", "max_prompts", "log_every", "checkpoint_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, wanted at least 1")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        fields = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}


VOLATILE = ("out", "recompute", "log_every", "checkpoint_every", "max_bad_steps", "device", "resume")
"""Fields that a resumed run may change: none of them changes a result."""

MINI = AptpConfig()
PAPER = AptpConfig(experts=8, steps=5000, batch=64, lr=2e-4, pretrain=500, warmup=100, checkpoint_every=500)
"""The settings of arXiv:2406.12042; it holds the mean of the experts to the budget, which is `--no-per-expert`."""


def run(config: AptpConfig) -> dict[str, Any]:
    """Carry out a run, or the rest of it, and return what `summary.json` holds: a row for each expert.

    Raises:
        UserError: Bad input of any kind.
        Interrupted: SIGTERM or SIGINT came; everything is saved.
    """
    config = fetched(config, "teacher")
    device = pick_device(config.device)
    RunFolder(config.out).check(config.resume)
    for note in providers.notes(device, ops.missing(device)):
        _log.info(note)
    folder = load_folder(config.teacher, device)
    if folder.structure is not None:
        raise UserError(f"{config.teacher} is pruned already; wanted a dense model")
    source = image_source(folder, config.data, config.images, config.seed)
    if source is None:
        raise UserError(
            f"{config.teacher} is no model of a built-in world, which draws its own images; --data is missing"
        )
    encoder = _encoder(config, folder, device)
    latent = folder.config.sample_size if config.latent is None else config.latent
    text = folder.text_encoder.length if config.text is None else config.text
    budget = MacBudget(config.budget, latent, text)
    teacher = folder.unet().to(device)
    teacher.recompute = config.recompute
    training = RouterTraining(teacher, folder.schedule, budget, encoder.width, config.batch, config)
    planned(folder.config, training.router.gates()[:1], budget)  # a budget out of reach: better now than afterwards
    known = inputs(config, {})
    with RunFolder.open(
        config.out, config.to_dict(), resume=config.resume, volatile=VOLATILE, inputs=known, unset=MINI.to_dict()
    ) as place:
        if not (place.path / INDEX).exists():
            sessions.begin(place.path, device)
            prompts = training_prompts(source, config.max_prompts)
            encoder, embeddings = centred(encoder, prompts)
            batches = Batches(source, folder.text_encoder, config.batch, config.seed)
            with GracefulStop() as stop:
                try:
                    _fit(config, training, batches, Embeddings(encoder, prompts, embeddings), place, stop)
                except torch.OutOfMemoryError as error:
                    advice = "--recompute or a smaller --batch take less"
                    raise UserError(f"{device} is out of memory; what was saved is whole; {advice}") from error
            _finish(config, folder, training, encoder, embeddings, budget, place)
        return read_json(place.summary)


def _finish(
    config: AptpConfig,
    folder: ModelFolder,
    training: RouterTraining,
    encoder: PromptEncoder,
    embeddings: Tensor,
    budget: MacBudget,
    place: RunFolder,
) -> None:
    """Share the prompts out, cut the experts, write the mixture."""
    training.flat.release()
    router = training.router.requires_grad_(False).cpu()
    router.rebalance(embeddings)
    structures = planned(folder.config, router.gates(), budget)
    counts = router.route(embeddings).bincount(minlength=len(structures)).tolist()
    rows = [
        {"expert": k, "macs": count(s, budget.latent, budget.text).ratio, "prompts": n, "dropped": sorted(s.dropped)}
        for k, (s, n) in enumerate(zip(structures, counts, strict=True))
    ]
    # before the mixture: where one is, so is this
    place.write_json("summary.json", {"budget": budget.ratio, "prompts": len(embeddings), "experts": rows})
    sessions.finish(place.path, training.device)
    place.write_text("report.html", page.report(place.path, (MINI if config.data is None else PAPER).to_dict()))
    settings = dataclasses.asdict(config)
    settings = {f.name: settings[f.name] for f in dataclasses.fields(RouterConfig)} | {"batch": config.batch}
    write_mixture(place.path, folder, training.teacher, router, encoder, structures, budget, settings)


def training_prompts(source: LatentSource, limit: int) -> list[str]:
    """The different captions of a source in its order, or so many of them, taken evenly."""
    count = min(len(source), limit)
    positions = [i * len(source) // count for i in range(count)]
    found = list(dict.fromkeys(caption for position in positions for caption in source.captions(position)))
    taken = min(len(found), limit)
    return [found[i * len(found) // taken] for i in range(taken)]


class Embeddings:
    """Embeddings of captions, looked up where all captions of a batch were encoded before.

    Args:
        encoder: Encodes the others.
        prompts: N captions.
        embeddings: Theirs, (N, D).
    """

    def __init__(self, encoder: PromptEncoder, prompts: Sequence[str], embeddings: Tensor) -> None:
        self._encoder, self._embeddings = encoder, embeddings
        self._rows = {caption: row for row, caption in enumerate(prompts)}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, D) fp32, on the CPU or where the encoder is; nothing waits for it."""
        rows = [self._rows.get(caption, -1) for caption in captions]
        return self._encoder.encode(captions) if -1 in rows else self._embeddings[torch.tensor(rows)]


def _encoder(config: AptpConfig, folder: ModelFolder, device: torch.device) -> PromptEncoder:
    if config.prompt_encoder is None:
        return TextPrompts(folder.text_encoder)
    return MpnetPrompts.load(config.prompt_encoder, device)


class _RouterRun(Trainee):
    """A router on its way, as the run loop takes it."""

    name, counters = "router", ("step", "seconds")

    def __init__(self, training: RouterTraining, batches: Callable[[int], Batch], embeddings: Embeddings):
        self.training, self.batches, self.embeddings = training, batches, embeddings
        self.flat, self.optimizers, self.means = training.flat, {"router": training.optimizer}, [Means()]

    def steps(self, start: int, end: int) -> Generator[object, None, None]:
        self.training.step = start
        for step in range(start, end):
            batch = self.batches(step)
            terms = self.training.advance(batch, self.embeddings(batch.captions))
            self.means[0].add(terms)
            yield terms

    def numbers(self) -> dict[str, Tensor | float]:
        return {"lr": self.training.optimizer.next_lr}

    def lr_flag(self, name: str) -> str:
        return "--lr"


def _fit(
    config: AptpConfig,
    training: RouterTraining,
    batches: Batches,
    embeddings: Embeddings,
    place: RunFolder,
    stop: GracefulStop,
) -> None:
    """Train up to `config.steps`, from the latest checkpoint if there is one."""
    device = training.device
    settings = LoopSettings(config.steps, config.batch, config.log_every, config.checkpoint_every, config.max_bad_steps)
    loader = Loader(batches, device, config.seed, training.schedule.num_train_timesteps)
    with running([], device), loader:
        loop.run(_RouterRun(training, loader, embeddings), settings, Places(place.checkpoints, place.stats), stop)
