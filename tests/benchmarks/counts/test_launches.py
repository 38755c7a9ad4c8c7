"""What `launches`, and `roofline` by the same `Steps`, count is what the engine launches."""

import pytest
import torch

from benchmarks.counts import launches, roofline
from bilevel_fast.erasing.targets import Guidance
from bilevel_fast.models.folder import load_folder
from bilevel_fast.ops.providers import ops
from bilevel_fast.profiling.meta_steps import Steps
from bilevel_fast.runs.config import preset
from bilevel_fast.runs.session import initial_student
from bilevel_fast.worlds.mini import TEACHER

CPU = torch.device("cpu")


@pytest.mark.slow
def test_the_steps_that_are_counted_are_the_engines():
    """Op by op: both levels of a run of the mini world, and `Steps` of the same student.

    On the meta device some products have other names, and norms copy what is channels_last: there, the FLOPs of the
    products are the same.
    """
    config, folder = preset("mini"), load_folder(TEACHER)
    upper, kept = config.upper, initial_student(config, folder, align=1).structure
    assert (upper.eraser, upper.eta) == ("guidance", roofline.ERASER.eta)

    def steps(device):
        found = Steps(kept, 16, 12, config.lower.batch, device, torch.float32, align=1)
        levels = {"lower": found.lower, "upper": found.upper(Guidance(upper.eta), upper.penalty)}
        return {name: found.count(level) for name, level in levels.items()}

    with ops("torch"):
        engine, counted, on_meta = launches.mini_world(CPU), steps(CPU), steps(torch.device("meta"))
    for name in ("lower", "upper"):
        assert counted[name] == engine[name]
        products = ([(c.room, c.flops) for c in costs if c.flops] for costs in (engine[name], on_meta[name]))
        assert next(products) == next(products)


def test_both_commands_count_the_same(monkeypatch):
    """At any size: what `roofline` projects with torch's ops is as many ops as `launches` says."""
    size = roofline.model(tiny=True)
    kept = launches.structure("0.80", tiny=True)
    for name, value in {"LATENT": size.latent, "TEXT": size.text, "BATCH": 2}.items():
        monkeypatch.setattr(launches, name, value)
    projected, counted = roofline.count(size, kept, 2, "torch"), launches.on_meta(kept)
    assert {name: len(costs) for name, costs in counted.items()} == {
        name: len(projected[name]) for name in ("lower", "upper")
    }
