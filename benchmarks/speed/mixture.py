"""A batch of several experts from one dense storage: is it as fast as every expert by itself?

    python -m benchmarks.speed.mixture --tiny --out benchmarks/results/mixture_cpu.jsonl     the mini world, on the CPU
    python -m benchmarks.speed.mixture --device cuda --out rows.jsonl                        SD 2.1 at 512 px

    mixed     `bilevel_fast.pruning.aptp.mixed`: one batch, one storage
    alone     every expert on its rows, one after the other, with its own weights, cut beforehand: K students in memory
    masks     the dense UNet behind gates of zeros and ones for each row (`pruning/aptp/gates.py`)
    dense     the dense UNet, which prunes nothing

The experts are planned at one budget from random gates, dropped sites included: each keeps other units. Rows go to one
expert after the other. bf16 and a CUDA graph of each on CUDA, fp32 on the CPU; random weights. Everything of one budget
and batch size is timed in one interleaved run; a ratio is the median over rounds of the ratio in a round. Nothing is
timed if mixed rows differ from those of the experts alone by more than rounding explains.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.measure import interleaved, recorded
from benchmarks.rows import append_rows
from benchmarks.speed.unet import make_inputs
from benchmarks.speed.unet_providers import Inputs, bound, distance
from benchmarks.structures import Model, model
from bilevel_fast.base import errors, flags
from bilevel_fast.base.devices import settle_libraries
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.vector import layout, to_vector
from bilevel_fast.ops.randomness import Stream, uniform
from bilevel_fast.pruning.aptp.experts import planned
from bilevel_fast.pruning.aptp.gates import gated
from bilevel_fast.pruning.aptp.mixed import Mix
from bilevel_fast.pruning.budget import MacBudget

Row = dict[str, Any]
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    tiny: bool = False
    """The mini world's UNet instead of SD 2.1's."""
    experts: int = 4
    """How many there are."""
    batch: tuple[int, ...] = (16, 64)
    """Rows."""
    budget: tuple[float, ...] = (0.80, 0.55)
    """Share of the dense MACs that every expert keeps."""
    rounds: int = 20
    """Rounds that count."""
    out: Path | None = None
    """Append rows to this file as they come."""


def make_experts(size: Model, budget: float, count: int) -> tuple[Structure, ...]:
    """At the budget each, from random gates."""
    gates = uniform(0, Stream.WORLD, range(count), (layout(size.config).size,))
    return planned(size.config, gates, MacBudget(budget, size.latent, size.text))


def calls(unet: UNet, structures: tuple[Structure, ...], expert: Tensor, inputs: Inputs) -> dict[str, Call]:
    """What is to be timed; each returns the predictions of all rows, in their order."""
    device, dtype = inputs[0].device, inputs[0].dtype
    align = 8 if device.type == "cuda" else 1
    rows = {k: (expert == k).nonzero()[:, 0].to(device) for k in expert.unique().tolist()}
    cuts = {k: unet.cut(structures[k], align).to(dtype).eval().requires_grad_(False) for k in rows}
    back = torch.cat(list(rows.values())).argsort()
    gates = torch.stack([to_vector(s) for s in structures])[expert].to(inputs[0])
    mixture = Mix(structures, device).bind(unet, expert)

    def alone() -> Tensor:
        return torch.cat([cuts[k](*(x[which] for x in inputs)).out for k, which in rows.items()])[back]

    return {
        "mixed": lambda: mixture(*inputs).out,
        "alone": alone,
        "masks": lambda: gated(unet, *inputs, gates).out,
        "dense": lambda: unet(*inputs).out,
    }


@torch.no_grad()
def measure(settings: Settings) -> Iterator[Row]:
    """`ms` of every provider, and how many times faster than each other one `mixed` is."""
    device, size = torch.device(settings.device), model(settings.tiny)
    settle_libraries(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine = describe(device) | {"dtype": str(dtype).removeprefix("torch.")}
    torch.manual_seed(0)
    with device:
        unet = UNet(size.config).to(dtype).eval().requires_grad_(False)
    for budget in settings.budget:
        structures = make_experts(size, budget, settings.experts)
        params = dict.fromkeys(("mixed", "masks", "dense"), sum(p.numel() for p in unet.parameters()))
        params["alone"] = sum(count(s, size.latent, size.text).params for s in structures)
        for batch in settings.batch:
            inputs, expert = make_inputs(size, batch, device, dtype), torch.arange(batch) % settings.experts
            providers = calls(unet, structures, expert, inputs)
            error, limit = distance(providers["mixed"](), providers["alone"]()), bound(unet, inputs)
            if not error <= limit:
                raise UserError(f"mixed rows are {error:.2g} away from their experts', at most {limit:.2g} is rounding")
            made = {name: recorded(lambda call=call: call, device) for name, call in providers.items()}
            providers, graphs = ({name: pair[i] for name, pair in made.items()} for i in (0, 1))
            wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
            timings = interleaved(providers, settings.rounds, synchronize=wait)
            for name, timing in timings.items():
                config = {
                    "model": size.name, "budget": budget, "batch": batch, "experts": settings.experts,
                    "latent": size.latent, "text": size.text, "params": params[name], "graph": graphs[name],
                    "error": error, "bound": limit, "load": os.getloadavg()[0],
                }  # fmt: skip
                shared = {"suite": "mixture", "case": f"{size.name} {budget:.2f} b{batch}", "config": config,
                          "command": "python -m benchmarks.speed.mixture" + " --tiny" * settings.tiny,
                          **machine}  # fmt: skip
                metrics = {("ms", "ms"): timing.map(lambda s: 1e3 * s)}
                if name != "mixed":
                    metrics["mixed_times_faster", "x"] = timings["mixed"].times_faster_than(timing)
                for (metric, unit), t in metrics.items():
                    values = {"value": t.p50, "p20": t.p20, "p80": t.p80}
                    yield {**shared, "provider": name, "metric": metric, "unit": unit, **values}


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.speed.mixture", __doc__)
    if settings.experts < 1 or not settings.batch or min(settings.batch) < 1 or settings.rounds < 4:
        raise UserError("--experts and --batch want positive numbers, --rounds at least 4")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU")
    for row in measure(settings):
        where = f"{row['case']:16} {row['provider']:6} {row['metric']:19}{row['value']:9.3f} {row['unit']:3}"
        print(f"{where}({row['p20']:.3f} .. {row['p80']:.3f})", flush=True)
        if settings.out is not None:
            append_rows(settings.out, [row])


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
