"""What the ranks of one run must have in common before its first step, by what it is called."""

import contextlib
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import bilevel_fast
from bilevel_fast.base.devices import Ranks
from bilevel_fast.data.blend import parts_of
from bilevel_fast.data.cache import Cache
from bilevel_fast.data.sources import LatentSource, MemorySource
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.weights import DIGEST, digest_of
from bilevel_fast.runs import sessions
from bilevel_fast.runs.assemble import Materials
from bilevel_fast.runs.config import TrainConfig, preset
from bilevel_fast.scale.team import Team
from bilevel_fast.training.run_folder import RunFolder, flatten

_LOOKED_AT = 8  # samples whose latents are compared


def goes_on(ranks: Ranks, out: Path) -> bool:
    """Whether these processes are not the first that their torchrun has started on a run.

    It may have started them again after one was lost; or a machine has come, or gone, which it does not count.
    """
    again = ranks.restarts > 0 or (sessions.launch() is not None and sessions.launch() in sessions.launches(out))
    return again and RunFolder(out).config.is_file()


def started_with(config: TrainConfig) -> dict[str, Any]:
    """Settings, by their flags, and versions. Whether the run is resumed asks the first rank alone."""
    settings = flatten(config.to_dict())
    flags = {"--" + name.replace("_", "-"): value for name, value in settings.items() if name != "resume"}
    versions = {
        "bilevel_fast": bilevel_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return flags | {f"the version of {name}": value for name, value in versions.items()}


def trained_with(start: UNet, materials: Materials) -> dict[str, str | None]:
    """Digests of the student as it starts, of the teacher, and of what both levels are trained on."""
    concepts = materials.concepts
    return {
        "the student's first weights": digest_of(start)[:DIGEST],
        "the teacher's weights": digest_of(materials.teacher)[:DIGEST],
        "the lower level's data": source_digest(materials.data),
        "the upper level's data": None if concepts is None else source_digest(concepts),
    }


def source_digest(source: LatentSource) -> str:
    """Of the number of samples, all captions, and where latents are stored as they are, a few of these."""
    digest = hashlib.sha256()
    for part in parts_of(source):
        count = len(part)
        digest.update(json.dumps([count, part.views, *part.latent_shape]).encode())
        for index in range(count):
            digest.update(json.dumps([*part.captions(index), part.anchor(index)]).encode())
        if isinstance(part, Cache | MemorySource):  # what a GPU encodes anew may differ from card to card
            some = sorted({index * (count - 1) // (_LOOKED_AT - 1) for index in range(_LOOKED_AT)})
            digest.update(part.moments(some, [0] * len(some)).contiguous().numpy().tobytes())
    return digest.hexdigest()[:DIGEST]


@contextlib.contextmanager
def run_folder(
    config: TrainConfig, volatile: tuple[str, ...], known: Mapping[str, list[str]], team: Team
) -> Iterator[RunFolder]:
    """The run's folder, which the first rank opens, holds and writes to; the others read what it writes.

    `volatile` is that of `RunFolder.open`, `known` its inputs.

    Raises:
        UserError: As `RunFolder.open`.
    """
    with contextlib.ExitStack() as stack:
        place = RunFolder(config.out)
        if team.rank == 0:
            unset = preset(config.preset).to_dict()
            opening = RunFolder.open(
                config.out, config.to_dict(), resume=config.resume, volatile=volatile, inputs=known, unset=unset
            )
            place = stack.enter_context(opening)
        team.first(lambda: None)
        yield place
