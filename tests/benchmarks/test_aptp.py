"""`python -m benchmarks.aptp`: errors, routes and information of a short training are what they are said to be."""

import json
import math

import pytest
import torch

from benchmarks import aptp
from bilevel_fast import errors
from bilevel_fast.folder import load_folder
from bilevel_fast.mini import TEACHER
from bilevel_fast.mini.world import SCENES
from bilevel_fast.pruning.aptp.mixture_folder import Mixture
from bilevel_fast.pruning.aptp.run import AptpConfig, run


def test_information():
    half = [0, 0, 1, 1]
    assert aptp.information(half, half) == pytest.approx(1)
    assert aptp.information(half, [0, 1, 0, 1]) == pytest.approx(0)
    assert aptp.information(range(8), range(8)) == pytest.approx(3)
    wanted = 1 - 0.75 * (-(1 / 3) * math.log2(1 / 3) - (2 / 3) * math.log2(2 / 3))  # H(v) - H(v | r)
    assert aptp.information([0, 0, 0, 1], [1, 1, 0, 0]) == pytest.approx(wanted)


def test_distances_are_relative_to_the_teacher():
    folder = load_folder(TEACHER)
    teacher, silent = folder.unet().eval(), folder.unet().eval()
    with torch.no_grad():
        for parameter in silent.conv_out.parameters():
            parameter.zero_()
    found = aptp.distances(teacher, {"same": teacher, "silent": silent}, folder, rounds=1)
    assert found["same"].eq(0).all()
    assert found["silent"].shape == (len(SCENES),)
    assert found["silent"].mean().item() == pytest.approx(1)


def test_trains_measures_and_writes(tmp_path, monkeypatch, capsys):
    """A training of two steps; then the same mixture again from its folder, against what it says of itself."""
    monkeypatch.setattr(aptp, "METHODS", ("uniform", "magnitude"))
    monkeypatch.setattr(aptp, "RESULTS", tmp_path / "aptp.jsonl")
    flags = ["--steps", "2", "--rounds", "1", "--budget", "0.7"]
    monkeypatch.setattr("sys.argv", ["aptp", *flags])
    assert errors.run(aptp.main) == 0
    out = tmp_path / "mixture"
    run(AptpConfig(out=out, budget=0.7, steps=2))
    monkeypatch.setattr("sys.argv", ["aptp", "--mixture", str(out), "--rounds", "1"])
    assert errors.run(aptp.main) == 0
    capsys.readouterr()

    trained, found = map(json.loads, (tmp_path / "aptp.jsonl").read_text().splitlines())
    for name in ("case", "seed", "experts", "told_by", "errors", "config"):
        assert trained[name] == found[name]
    mixture = Mixture.load(out)
    routes = mixture.route([scene.caption for scene in SCENES])
    assert [expert["prompts"] for expert in found["experts"]] == routes.bincount(minlength=4).tolist()
    assert all(0.69 < expert["macs"] <= 0.7 for expert in found["experts"])
    assert found["case"] == "0.70"
    assert found["seconds"] > 0
    folder = load_folder(TEACHER)
    teacher = folder.unet().eval()
    students = {str(k): teacher.cut(s).eval() for k, s in enumerate(mixture.structures)}
    lost = aptp.distances(teacher, students, folder, rounds=1)
    behind = [lost[str(k)][i].item() for i, k in enumerate(routes.tolist())]
    assert found["errors"].keys() == {"routed", "astray", "uniform", "magnitude"}
    assert found["errors"]["routed"] == pytest.approx(sum(behind) / len(behind))
    elsewhere = [sum(lost[str(j)][i].item() for j in range(4) if j != k) / 3 for i, k in enumerate(routes.tolist())]
    assert found["errors"]["astray"] == pytest.approx(sum(elsewhere) / len(elsewhere))


def test_refuses(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["aptp", "--rounds", "0"])
    assert errors.run(aptp.main) == 2
    assert "--rounds is 0, wanted at least 1" in capsys.readouterr().err
