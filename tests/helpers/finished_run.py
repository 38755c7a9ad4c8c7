"""The folder of a training run that has ended, without the training: what its report is made of."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from bilevel_fast.base.files import write_json
from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.structure import Structure
from bilevel_fast.runs.config import TrainConfig, preset

HOSTILE = '<script>document.title = "owned"</script><img src="https://example.org/x.png" onerror="alert(1)">'
"""What a user may have typed, or a caption may hold."""
MODELS = ("teacher", "distilled", "student")
_QUALITY = {"concept_hit": 1.0, "content_kept": 1.0, "other_style_hit": 0.9944, "object": 1.0, "color": 1.0, "fid": 3.0}


def finished_run(path: Path, config: TrainConfig | None = None, prompts: Sequence[str] = ("a red star",)) -> Path:
    """Write a run of the mini world: two trainings of 40 records, one of them with values that are not finite."""
    config = config or replace(preset("mini"), out=path)
    path.mkdir(parents=True)
    write_json(path / "config.json", config.to_dict())
    student = {**_QUALITY, "concept_hit": 0.0, "fid": 3.77}
    macs = {"dense_g": 0.237607, "student_g": 0.190084, "ratio": 0.799993}
    summary: dict[str, Any] = {"preset": config.preset, "seconds": 186.2, "images_per_second": 31.6, "macs": macs}
    summary |= {
        "lower_steps": 120,
        "upper_steps": 30,
        "quality": dict.fromkeys(MODELS, _QUALITY) | {"student": student},
    }
    write_json(path / "summary.json", summary)
    write_records(path)
    begun = {"event": "begun", "time": "2026-11-30T15:53:39Z", "device": "AMD EPYC, 2 cores", "torch": "2.11.0+cu130"}
    begun |= {"cuda": None, "threads": 2, "processes": 1, "python": "3.11.7", "version": "0.1.0", "commit": "d443560"}
    finished = {"event": "finished", "time": "2026-11-30T15:57:01Z", "peak_gib": 1.549, "peak_of": "process"}
    lines(path / "sessions.jsonl", [begun, begun, finished])
    write_samples(path, prompts)
    (path / "student" / "unet").mkdir(parents=True)
    write_json(path / "student" / "unet" / "config.json", MINI.to_dict())
    Structure.uniform(MINI, 0.6, drop=["mid_block.attentions.0"]).save(path / "student" / "unet" / "structure.json")
    return path


def write_records(path: Path) -> None:
    for name, terms in (("stats", ("diffusion", "output", "loss")), ("stats-distilled", ("diffusion", "output"))):
        rows: list[dict[str, Any]] = []
        for n in range(1, 41):
            row: dict[str, Any] = {"step": 3 * n, "images": 48 * n, "seconds": 1.5 * n, "images_per_second": 32.0}
            row |= {"nonfinite": {}} | {f"lower/{term}": 2.0 / n for term in terms} | {"lower/lr": 3e-4}
            if name == "stats":
                row |= {"upper/suppression": 1.2 / n}
                row |= {"nonfinite": {"lower/output": 2}, "lower/output": None} if n == 20 else {}
            rows.append(row)
        lines(path / f"{name}.jsonl", rows)


def write_samples(path: Path, prompts: Sequence[str]) -> None:
    (path / "samples").mkdir()
    for n in range(len(prompts)):
        for model in MODELS:
            Image.new("RGB", (32, 32), (40 * n, 90, 160)).save(path / "samples" / f"{n:02d}-{model}.png")
    found = [{"prompt": p, "files": [f"{n:02d}-{model}.png" for model in MODELS]} for n, p in enumerate(prompts)]
    write_json(path / "samples" / "index.json", {"models": list(MODELS), "samples": found})
    Image.new("RGB", (1200, 300), "white").save(path / "samples" / "comparison.png")


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
