"""Every command on a small Stable Diffusion XL, one after the other: from pictures to a student without a concept."""

import json
from pathlib import Path

from bilevel_fast import erase, prepare, prune, train
from coco_folder import encoded, picture
from commands import run_command
from sdxl_folder import SIDE

SIZES = [(70, 90), (90, 70), (64, 64), (80, 200), (65, 64), (120, 96)]
"""Width and height of the pictures."""
PROMPTS = ["a red star by monet", "a house by monet"]


UPPER = ["--upper.batch", "2", "--upper.warmup", "0"]
"""Of upper levels with a gradient; edits read neither."""


def done(main, *flags) -> None:
    result = run_command(main, *flags)
    assert result.returncode == 0, result.stderr


def training(root: Path, sdxl: Path) -> list[str]:
    """Flags of `train` on what the chain has made."""
    given = ["--teacher", sdxl, "--student", root / "pruned", "--data", root / "cache", "--concepts", root / "bank"]
    given += ["--lower.batch", 2, "--lower.warmup", 0, "--log-every", 1]
    return [str(word) for word in given]


def make_sdxl_chain(root: Path, sdxl: Path) -> Path:
    """images/ cache/ list/ bank/ pruned/ run/ esd/ erased/, each made by its command."""
    (root / "images").mkdir()
    lines = []
    for number, size in enumerate(SIZES):
        (root / f"images/{number}.png").write_bytes(encoded(picture(number, *size), "PNG"))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a photo of a house {number}"}))
    (root / "images/metadata.jsonl").write_text("\n".join(lines))
    (root / "subjects.txt").write_text("a red star\na house\n")
    made = ["--root", root / "images", "--model", sdxl, "--resolution", SIDE, "--device", "cpu", "--threads", 1]
    done(prepare.main, "folder", *made, "--views", 2, "--batch", 2, "--per-file", 4, "--out", root / "cache")
    done(prepare.main, "folder", *made, "--no-latents", "--out", root / "list")
    drawn = ["--subjects", root / "subjects.txt", "--count", 4, "--steps", 2, "--batch", 2, "--out", root / "bank"]
    done(prepare.main, "concepts", "--model", sdxl, "--phrase", "by monet", *drawn)
    done(prune.main, "koala-700m", "--teacher", sdxl, "--out", root / "pruned")
    given = [*training(root, sdxl), *UPPER]
    done(train.main, *given, "--lower.steps", 6, "--upper.every", 3, "--out", root / "run")
    esd = ["--lower.steps", 1, "--upper.every", 1, "--upper.eraser", "esd", "--upper.esd.steps", 4]
    done(train.main, *given, *esd, "--out", root / "esd")
    edited = ["--model", root / "run/student", "--erase", *PROMPTS, "--out", root / "erased"]
    done(erase.main, "uce", *edited)
    return root
