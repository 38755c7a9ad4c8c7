"""`benchmarks.quality.aptp`: errors, routes and information of a short training are what they are said to be."""

import json
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from benchmarks.quality import aptp
from bilevel_fast.base import errors
from bilevel_fast.models.folder import load_folder
from bilevel_fast.pruning.aptp.mixture_folder import Mixture
from bilevel_fast.worlds.mini import world

SCENES = world.SCENES[:36]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(aptp, "SCENES", SCENES)


def test_information():
    half = [0, 0, 1, 1]
    assert aptp.information(half, half) == pytest.approx(1)
    assert aptp.information(half, [0, 1, 0, 1]) == pytest.approx(0)
    assert aptp.information(range(8), range(8)) == pytest.approx(3)
    wanted = 1 - 0.75 * (-(1 / 3) * math.log2(1 / 3) - (2 / 3) * math.log2(2 / 3))  # H(v) - H(v | r)
    assert aptp.information([0, 0, 0, 1], [1, 1, 0, 0]) == pytest.approx(wanted)


def test_distances_are_relative_to_the_teacher(small_teacher):
    folder = load_folder(small_teacher)
    teacher, silent = folder.unet().eval(), folder.unet().eval()
    with torch.no_grad():
        for parameter in silent.conv_out.parameters():
            parameter.zero_()
    found = aptp.distances(teacher, {"same": teacher, "silent": silent}, folder, rounds=1)
    assert found["same"].eq(0).all()
    assert found["silent"].shape == (len(SCENES),)
    assert found["silent"].mean().item() == pytest.approx(1)


def test_trains_measures_and_writes(small_teacher, tmp_path, monkeypatch):
    """A training of two steps, and its row against the mixture that it left behind."""
    monkeypatch.setattr(aptp, "TEACHER", small_teacher)
    monkeypatch.setattr(aptp, "AptpConfig", partial(aptp.AptpConfig, teacher=small_teacher, batch=4, images=216))
    monkeypatch.setattr(aptp, "METHODS", ("uniform",))
    monkeypatch.setattr(aptp, "ROWS", tmp_path / "aptp.jsonl")
    monkeypatch.setattr(aptp.tempfile, "TemporaryDirectory", lambda: nullcontext(tmp_path))
    monkeypatch.setattr("sys.argv", ["aptp", "--steps", "2", "--rounds", "1", "--budget", "0.7"])
    assert errors.run(aptp.main) == 0
    found = json.loads((tmp_path / "aptp.jsonl").read_text())
    mixture = Mixture.load(tmp_path / "mixture")
    routes = mixture.route([scene.caption for scene in SCENES])
    assert [expert["prompts"] for expert in found["experts"]] == routes.bincount(minlength=4).tolist()
    assert all(0.69 < expert["macs"] <= 0.7 for expert in found["experts"])
    assert found["case"] == "0.70"
    assert found["seconds"] > 0
    folder = load_folder(small_teacher)
    teacher = folder.unet().eval()
    students = {str(k): teacher.cut(s).eval() for k, s in enumerate(mixture.structures)}
    lost = aptp.distances(teacher, students, folder, rounds=1)
    behind = [lost[str(k)][i].item() for i, k in enumerate(routes.tolist())]
    assert found["errors"].keys() == {"routed", "astray", "uniform"}
    assert found["errors"]["routed"] == pytest.approx(sum(behind) / len(behind))
    elsewhere = [sum(lost[str(j)][i].item() for j in range(4) if j != k) / 3 for i, k in enumerate(routes.tolist())]
    assert found["errors"]["astray"] == pytest.approx(sum(elsewhere) / len(elsewhere))


def test_refuses(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["aptp", "--rounds", "0"])
    assert errors.run(aptp.main) == 2
    assert "--rounds is 0, wanted at least 1" in capsys.readouterr().err
