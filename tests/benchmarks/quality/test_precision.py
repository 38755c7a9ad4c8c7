"""bf16 against fp32: every class is found, the rows say what was compared, and a gap is seen."""

import json

import pytest
import torch

from benchmarks.quality import precision
from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.unet import UNet
from bilevel_fast.runs.config import preset
from bilevel_fast.training import losses
from commands import run_command

SMOKE = preset("smoke")


def test_every_parameter_is_of_a_class():
    names = [name for name, _ in UNet(MINI).named_parameters()]
    found = {name: precision.class_of(name) for name in names}
    assert set(found.values()) == set(precision.CLASSES)
    assert found["down_blocks.0.resnets.0.time_emb_proj.weight"] == "time"
    assert found["down_blocks.0.attentions.0.transformer_blocks.0.norm1.bias"] == "norm"
    assert found["up_blocks.2.resnets.1.conv_shortcut.weight"] == "projection"
    assert found["mid_block.resnets.0.conv1.weight"] == "convolution"


def test_gradients_agree_and_a_gap_would_show(monkeypatch):
    rows = list(precision.cosines(SMOKE, batches=1))
    assert {row["case"] for row in rows} == {f"gradient {x} {k}" for x in ("lower", "upper") for k in precision.CLASSES}
    assert all(precision.COSINE < row["value"] < 1 for row in rows), "equal gradients were not compared"
    text, broken = precision.report(rows)
    assert not broken
    assert len(text.splitlines()) == len(rows)

    real = losses.feature_kd

    def off(student, teacher, weight):
        return real(student, teacher, weight * (30 if student[0].dtype == torch.bfloat16 else 1))

    monkeypatch.setattr(losses, "feature_kd", off)
    assert precision.report(list(precision.cosines(SMOKE, batches=1)))[1]


@pytest.mark.parametrize(("bf16", "broken"), [(4.0, False), (4.9, False), (6.0, True)])
def test_the_table_is_judged_by_what_seeds_do(bf16, broken):
    def row(name, seed, value):
        return {"case": f"quality {name} seed {seed}", "metric": "fid", "value": value}

    rows = [row("fp32", 0, 4.0), row("bf16", 0, bf16), row("fp32", 1, 5.0), row("bf16", 1, 5.0)]
    assert bool(precision.report(rows)[1]) == broken


def test_command_line(tmp_path):
    empty = run_command(precision.main, "report", "--out", tmp_path / "no")
    assert empty.returncode == 2
    assert "has no rows; run: python -m benchmarks.quality.precision gradients" in empty.stderr
    row = {"case": "gradient lower norm", "metric": "cosine", "value": 0.9}
    (tmp_path / "rows").write_text(json.dumps(row) + "\n")
    bad = run_command(precision.main, "report", "--out", tmp_path / "rows")
    assert bad.returncode == 1
    assert "gradient lower norm: 0.90000 < 0.995" in bad.stderr
