"""Where the time of a training step goes, room by room.

On the built-in mini world, with a GPU if there is one, or on a model of yours:

python -m bilevel_fast.profile
python -m bilevel_fast.profile --preset paper --teacher DIR --student DIR --data CACHE --concepts BANK

Profiles the steps that `bilevel_fast.train` would take with the same flags: prints time, share, launches, TFLOP/s and
GB/s of every room of the lower and the upper step, and the ops that take most of them. Leaves profile.json, trace.json
(for ui.perfetto.dev) and step.png in --profile-out. Keeps no student: --out and --resume have no effect.

The rooms are NVTX ranges, too:

nsys profile python -m bilevel_fast.profile ...
"""

import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from bilevel_fast.base import errors
from bilevel_fast.base.alone import alone
from bilevel_fast.runs.profile_settings import ProfileConfig, read


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return {"": ProfileConfig}


def parse(argv: Sequence[str]) -> ProfileConfig:
    """Read the command line.

    Raises:
        UserError: Names the flag.
    """
    return read(argv, __doc__)


def main() -> None:
    alone("bilevel_fast.profile")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    config = parse(sys.argv[1:])
    if config.dry_run:
        print(json.dumps(config.to_dict(), indent=2))
        return
    # after parsing: --help and a typo should not wait for the engine
    from bilevel_fast.base.claims import locked, made
    from bilevel_fast.base.devices import machine, pick_device
    from bilevel_fast.base.files import scratch
    from bilevel_fast.profiling import picture
    from bilevel_fast.runs.profiled import profiled

    picture.check_free(config.profile_out, config.overwrite)
    device = pick_device(config.device)
    with (
        made(config.profile_out),
        scratch(config.profile_out) as folder,
        locked(config.profile_out / ".lock", f"--profile-out {config.profile_out}"),
    ):
        trace = folder / "trace.json"
        steps, graphs = profiled(config, device, config.steps, config.warmup, folder, trace)
        about = {**machine(device), "graphs": graphs, "config": config.to_dict()}
        picture.save(config.profile_out, steps, about, trace)
    print("\n\n".join(picture.tables(step, device.type == "cuda") for step in steps))
    if graphs:
        print("\nWithout the profiler, and in training, a step is one CUDA graph; it is profiled as single launches.")
    print(f"\n{config.profile_out / 'step.png'}   trace.json   profile.json")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
