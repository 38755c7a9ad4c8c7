"""That the main job erases: the settings of the mini world's preset, but smaller batches, fewer steps and samples."""

import json

import pytest

from bilevel_fast.train import main
from commands import run_command

SMALLER = {
    "mini.images": 512, "mini.bank": 24, "mini.judge-erased": 12, "mini.judge-kept": 4, "lower.steps": 40,
    "lower.batch": 4, "upper.every": 2, "upper.batch": 4,
}  # fmt: skip


@pytest.mark.slow
def test_the_style_goes_and_the_others_stay(tmp_path):
    """The twin is the same run with `upper.every` 0: without the upper level the style is still drawn.

    20 upper steps take all of it; after 12, a third of the drawings still show it.
    """
    flags = [f"--{name}={value}" for name, value in SMALLER.items()]
    result = run_command(main, *flags, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    quality = json.loads((tmp_path / "run" / "summary.json").read_text())["quality"]
    assert quality["student"]["concept_hit"] <= 0.05
    assert quality["student"]["other_style_hit"] >= 0.95
    assert quality["distilled"]["concept_hit"] >= 0.9
    assert quality["distilled"]["other_style_hit"] >= 0.95
