"""The steps that a run would take, profiled."""

from pathlib import Path

import torch

from bilevel_fast.ops.graphs import cuda_recorder
from bilevel_fast.profiling.profile import StepProfile, descents
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.runs.session import start_levels
from bilevel_fast.training.loop import running


def profiled(
    config: TrainConfig, device: torch.device, steps: int, warmup: int, scratch: Path, trace: Path
) -> tuple[list[StepProfile], bool]:
    """Profiles of both levels' steps, and whether they train as CUDA graphs.

    Args:
        config: The settings of the run.
        device: Where it computes.
        steps: Lower steps to record; of upper ones as many as training takes meanwhile, at least one.
        warmup: Steps of each level before anything is timed.
        scratch: A folder for the concept bank.
        trace: Where the Chrome trace is written.

    Raises:
        UserError: Bad input of any kind, as in `session.run`.
    """
    levels = [level for level in start_levels(config, device, scratch) if level is not None]
    with running(levels, device):
        repeats = {"lower": steps, "upper": max(1, steps // max(1, config.upper.every))}
        record = cuda_recorder(device) if config.graphs else None
        return descents(levels, device, repeats, warmup, record, trace)
