"""What the folder of a training run says: the only thing that its report is made of.

A folder of an earlier release has less in it; what is missing is None or empty, and the report leaves it out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import clip, is_name, read_file, read_json, read_json_lines
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet_config import UNetConfig
from bilevel_fast.runs import history, sessions
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.worlds import WORLDS, world

SAMPLES = "samples/index.json"
"""{"models": [...], "samples": [{"prompt": ..., "files": [one for each model, beside it]}]}"""


@dataclass(frozen=True)
class Sample:
    """One prompt, and the PNG that each model drew for it."""

    prompt: str
    images: Mapping[str, bytes]


@dataclass(frozen=True)
class Record:
    """A run as its files tell it."""

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    stats: Mapping[str, Sequence[Mapping[str, Any]]]
    """By training: `student`, and perhaps `distilled`."""
    sessions: Sequence[Mapping[str, Any]]
    structure: Structure
    erased: tuple[str, ...]
    """Concepts, the first erased first; of a run without suppression those that it was asked for."""
    samples: Sequence[Sample]
    sheet: bytes | None
    """All samples on one picture."""

    @classmethod
    def of(cls, path: Path) -> "Record":
        """Read a run folder.

        Raises:
            UserError: A file of it is missing or broken; says which.
        """
        config, summary = read_json(path / "config.json"), read_json(path / "summary.json")
        stats = {"student": path / "stats.jsonl", "distilled": path / "stats-distilled.jsonl"}
        unet, sheet = path / "student" / "unet", path / "samples" / "comparison.png"
        narrow = unet / "structure.json"
        return cls(
            path,
            config,
            summary,
            {name: [row for _, row in read_json_lines(file)] for name, file in stats.items() if file.is_file()},
            sessions.read(path),
            Structure.load(narrow) if narrow.is_file() else Structure.dense(UNetConfig.load(unet)),
            _erased(path, config),
            read_samples(path),
            read_file(sheet) if sheet.is_file() else None,
        )

    @property
    def world(self) -> str | None:
        """The built-in world that it was on; None of a run on folders."""
        name = self.config.get("world", "mini")
        return name if name in WORLDS and self.config.get("data") is None else None

    def shares(self) -> dict[str, int]:
        """For each metric of the quality table that is a share of images: of how many. Empty if nobody can say."""
        if self.world is None:
            return {}
        here, kind = world(self.world), type(getattr(TrainConfig(), self.world))
        known = {field.name for field in dataclasses.fields(kind)}
        settings = {key: value for key, value in self.config.get(self.world, {}).items() if key in known}
        return here.shares(here.erased_concepts(self.erased), kind(**settings))


def _erased(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    record = path / history.RECORD
    if record.is_file():
        concepts = read_json(record).get("concepts", [])
        names = [concept.get("name") for concept in concepts if isinstance(concept, dict)]
    else:
        names = config.get("erase", []) if config.get("data") is None else config.get("concepts", [])
    return tuple(str(name) for name in names)


def read_samples(path: Path) -> list[Sample]:
    """What a run has drawn; nothing of one on folders, or of an earlier release.

    Raises:
        UserError: The index or a picture is broken or missing; says which.
    """
    index = path / SAMPLES
    if not index.is_file():
        return []
    fields, found = read_json(index), []
    try:
        models = [str(name) for name in fields["models"]]
        for row in fields["samples"]:
            files = dict(zip(models, row["files"], strict=True))
            if not all(map(is_name, files.values())):
                raise ValueError(f"{clip(row['files'])} are no files beside it")
            found.append(Sample(str(row["prompt"]), {m: read_file(index.parent / name) for m, name in files.items()}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{index} does not hold what a list of samples holds ({clip(error)})") from error
    return found
