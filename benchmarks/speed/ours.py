"""Our two steps, as the trainer runs them, and the ladder that leads there: one technique more on each rung.

The batch is the same in every call and lies on the device already: what a loader costs is `benchmarks.speed.data`'s
question and is hidden by a thread in training.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speed.peers import Inputs, Peer
from bilevel_fast.data.batch import Batch
from bilevel_fast.erasing.targets import Guidance
from bilevel_fast.models.fp8 import to_fp8
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.graphs import WARMUP, cuda_recorder
from bilevel_fast.ops.providers import ops
from bilevel_fast.training.graphs import Graphs
from bilevel_fast.training.levels import Level, move
from bilevel_fast.training.lower import Answers, FineTuning
from bilevel_fast.training.optim import LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.training.upper import Suppression


@dataclass(frozen=True)
class Rung:
    """How our steps are run; the defaults are the lowest rung, in fp32."""

    name: str
    dtype: torch.dtype = torch.float32
    align: int = 1
    ops: str | None = "torch"
    """Provider of all ops; None: the table of providers."""
    graphs: bool = False
    recompute: bool = False
    fp8: bool = False


def ladder(device: torch.device) -> list[Rung]:
    """What the device can climb, from the bottom; the last one is how the trainer runs by default."""
    if device.type == "cpu":
        return [Rung("engine"), Rung("kernels", ops=None)]
    low = torch.bfloat16
    return [
        Rung("engine"),
        Rung("bf16", low),
        Rung("align 8", low, 8),
        Rung("kernels", low, 8, None),
        Rung("graphs", low, 8, None, graphs=True),
    ]


def beside(device: torch.device) -> list[Rung]:
    """Options beside the ladder, off by default."""
    top = ladder(device)[-1]
    options = [Rung("recompute", top.dtype, top.align, top.ops, top.graphs, recompute=True)]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        options.append(Rung("fp8 teacher", top.dtype, top.align, top.ops, top.graphs, fp8=True))
    return options


def ours(inputs: Inputs, device: torch.device, rung: Rung) -> Peer:
    """Both steps through the engine's phases."""
    config, structure = inputs.structure.config, inputs.structure
    teacher, student = UNet(config), UNet(config, structure, rung.align)
    teacher.load_state_dict(dict(inputs.teacher))
    student.load_state_dict(dict(inputs.student))
    student.recompute = rung.recompute
    frozen = teacher.to(device, rung.dtype).eval().requires_grad_(False)
    answers = Answers(
        Teacher(to_fp8(frozen) if rung.fp8 else frozen), inputs.schedule.to(device), inputs.seed, inputs.snr_gamma
    )
    flat = FlatParameters(student.to(device), rung.dtype)
    fine_tuning = FineTuning(flat, answers, inputs.weights)
    suppression = Suppression(fine_tuning, Guidance(inputs.eta), inputs.penalty, inputs.penalty_norm)
    first, second = (LevelOptimizer(flat, lr, warmup=0) for lr in inputs.lr)
    lower = Level("lower", lambda step: inputs.lower, fine_tuning, first)
    upper = Level("upper", lambda step: inputs.upper, suppression, second)
    timesteps = inputs.schedule.num_train_timesteps
    batches = [
        batch.drawn(inputs.seed, timesteps).map(lambda x: x.to(device)) for batch in (inputs.lower, inputs.upper)
    ]
    run = Graphs(cuda_recorder(device)) if rung.graphs else move
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def step(level: Level, batch: Batch, term: str) -> Tensor:
        if stream is None:
            with ops(rung.ops):
                return run(level, batch)[term]
        stream.wait_stream(torch.cuda.current_stream(device))
        with ops(rung.ops), torch.cuda.stream(stream):
            loss = run(level, batch)[term]
        torch.cuda.current_stream(device).wait_stream(stream)
        return loss

    return Peer(
        f"ours, {rung.name}",
        lambda: step(lower, batches[0], "lower/loss"),
        lambda: step(upper, batches[1], "upper/suppression"),
    )


def warm_up(peer: Peer, rung: Rung | None = None) -> tuple[float, float]:
    """Bring a peer to its steady state; the losses of its first lower and its first upper step."""
    first = peer.lower().item(), peer.upper().item()
    for _ in range(WARMUP if rung is not None and rung.graphs else 1):
        peer.lower(), peer.upper()
    return first
