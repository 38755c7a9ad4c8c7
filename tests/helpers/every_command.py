"""Every command that writes, small: what it is called with, and what must be the same however often it was killed."""

import io
import json
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bilevel_fast.data.bank import make_bank
from bilevel_fast.models.folder import load_folder
from coco_folder import encoded, picture
from measuring import doodle, image_folder
from mini_folder import TINY, make_mini_folder

WAVES = "in the style of waves"


@dataclass(frozen=True)
class Command:
    """One call.

    Attributes:
        words: Entry point and arguments; IN is the folder of `make_world`, OUT one that is there and empty.
        made: What it makes, in OUT.
        again: More arguments where `begun` is there.
        first: Arguments of a call that comes before, whole.
    """

    words: str
    made: str
    begun: str = ""
    again: str = ""
    first: str = ""

    def arguments(self, world: Path, out: Path) -> list[str]:
        words = self.words + (f" {self.again}" if self.begun and (out / self.made / self.begun).exists() else "")
        return filled(words, world, out)


def filled(words: str, world: Path, out: Path) -> list[str]:
    return [word.replace("~", " ").replace("IN/", f"{world}/").replace("OUT/", f"{out}/") for word in words.split()]


_MAKING = "--model IN/teacher --resolution 16 --batch 2 --per-file 2 --threads 1 --device cpu --out OUT/cache"
_TRAIN = "--teacher IN/larger --lower.batch 2 --upper.batch 2 --log-every 1 --device cpu --mini.images 8 --mini.bank 2"
_JUDGE = "--mini.judge-erased 1 --mini.judge-kept 1 --mini.judge-steps 2 --mini.bank-steps 2"
COMMANDS = {
    "prepare folder": Command(f"prepare folder --root IN/images {_MAKING}", "cache"),
    "prepare webdataset": Command(
        f"prepare webdataset --tars IN/a.tar {_MAKING} --shard 1/2", "cache",
        first=f"prepare webdataset --tars IN/a.tar {_MAKING} --shard 0/2",
    ),
    "prepare --no-latents": Command(f"prepare folder --root IN/images {_MAKING} --no-latents", "cache"),
    "prepare concepts": Command(
        "prepare concepts --model IN/teacher --phrase in~the~style~of~waves --count 5 --batch 1 "
        "--steps 2 --device cpu --out OUT/banks",
        "banks",
    ),
    "prune": Command("prune uniform --teacher IN/teacher --budget 0.7 --device cpu --out OUT/new/pruned", "new"),
    "prune aptp": Command(
        "prune aptp --teacher IN/teacher --experts 2 --steps 4 --pretrain 2 --batch 2 --images 216 --log-every 1 "
        "--checkpoint-every 2 --budget 0.8 --device cpu --out OUT/mixture",
        "mixture", "config.json", "--resume",
    ),
    "erase": Command(
        "erase uce --model IN/teacher --erase in~the~style~of~waves --device cpu --out OUT/erased", "erased"
    ),
    "export": Command(
        "export folder --model OUT/student --dtype fp16 --out OUT/exported", "exported",
        first="prune uniform --teacher IN/teacher --budget 0.7 --device cpu --out OUT/student",
    ),
    "train": Command(
        f"train --preset smoke {_TRAIN} {_JUDGE} --no-twin --lower.steps 4 --checkpoint-every 2 --out OUT/run",
        "run", "config.json", "--resume",
    ),
    "sample --prompts": Command(
        "sample --model IN/teacher --prompts a~red~star --steps 2 --device cpu --out OUT/grid.png", "grid.png"
    ),
    "sample --prompts-file": Command(
        "sample --model IN/teacher --prompts-file IN/prompts.txt --steps 2 --batch 2 --device cpu --folder OUT/drawn",
        "drawn",
    ),
    "evaluate": Command(
        "evaluate --suite coco --images IN/drawn --prompts IN/captions.json --device cpu --out OUT/eval.json",
        "eval.json",
    ),
}  # fmt: skip
SLOW = {
    "rows of a benchmark": Command(
        "benchmarks.counts.roofline_sites --card A6000 --tiny --out OUT/rows.jsonl", "rows.jsonl"
    ),
    "profile": Command(
        f"profile --preset smoke {_TRAIN} --steps 1 --warmup 0 --profile-out OUT/profile", "profile", "trace.json",
        "--overwrite",
    ),
    "attack": Command(
        "attack ring-a-bell --model IN/larger --concepts IN/bank --tokens 2 --population 4 --generations 2 --count 1 "
        "--device cpu --out OUT/new/attacked",
        "new",
    ),
    "reproduce": Command(
        "reproduce fig5 --run.preset smoke --run.teacher IN/larger --run.lower.batch 2 --run.upper.batch 2 "
        "--run.device cpu --run.mini.images 8 --run.mini.bank 2 --run.mini.judge-erased 1 --run.mini.judge-kept 1 "
        "--run.mini.judge-steps 2 --run.mini.bank-steps 2 --run.lower.steps 2 --seeds 0 --out OUT/paper",
        "paper",
    ),
}  # fmt: skip
"""Tried only by `make soak`."""

_VOLATILE = {"seconds", "images_per_second", "resume", "out"}
_UNTOLD = ("manifest.json", "sessions.jsonl", "report.html", "trace.json", "profile.json", "step.png")
"""Files that hold times."""
_LOCKS = (".lock", ".index.lock")
"""That stay, in folders that processes share."""


def make_world(path: Path) -> Path:
    """What the commands read."""
    make_mini_folder(path / "teacher")
    make_mini_folder(path / "larger", config=replace(TINY, sample_size=16))  # of what the mini world draws
    make_bank(load_folder(path / "larger"), [f"a red star {WAVES}"], ["a red star"], 1, 0, 3.0, 2, 1, path / "bank")
    (path / "images").mkdir()
    names = [f"{n}.jpg" for n in range(5)]
    with tarfile.open(path / "a.tar", "w") as tar:
        for n, name in enumerate(names):
            data = encoded(picture(n, 40, 30))
            (path / "images" / name).write_bytes(data)
            for member, content in ((name, data), (f"{n}.txt", b"a star" if n != 3 else b"")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    rows = [{"file_name": name, "text": f"a star {n}"} for n, name in enumerate([*names, "gone.jpg"])]
    (path / "images" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = ["a red star", "a blue ring", f"a red star {WAVES}", "a green star", "a blue star"]
    (path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    told = {str(n): f"a room {n}" for n in range(2)}
    captions = [{"image_id": int(n), "caption": text} for n, text in told.items()]
    (path / "captions.json").write_text(json.dumps({"annotations": captions}))
    image_folder(path / "drawn", {n: doodle(int(n), 32) for n in told}, told)
    return path


def outcome(out: Path) -> dict[str, Any]:
    """What lies in a folder and must not depend on what happened on the way."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and "events" not in path.parts]
    return {str(path.relative_to(out)): _told(path) for path in files if path.name not in (*_UNTOLD, *_LOCKS)}


def leftovers(out: Path) -> list[str]:
    """What nobody will ever read."""
    return [str(path.relative_to(out)) for path in out.rglob(".*") if path.name not in _LOCKS]


def _told(path: Path) -> Any:
    if path.suffix == ".json":
        return _lasting(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_lasting(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lasting(held) for name, held in value.items() if name not in _VOLATILE}
    return [_lasting(held) for held in value] if isinstance(value, list) else value
