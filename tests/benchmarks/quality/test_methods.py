"""`python -m benchmarks.quality.methods`: where each case starts, what it is trained on, rows once, a true table."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.quality import methods, tables
from benchmarks.quality.methods import Run, distances, held_out, run
from benchmarks.quality.methods_cases import WEIGHTS, cases
from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder, save_student
from bilevel_fast.models.structure import Structure
from bilevel_fast.runs.config import preset
from bilevel_fast.training.settings import LossWeights
from bilevel_fast.worlds.drawn import DrawnWorld
from bilevel_fast.worlds.mini import TEACHER

VARIANTS = ("0.55 magnitude", "0.55 random weights", "0.55 diffusion only", "0.55 distillation only")
SMALL = Run(budget=0.55, preset="smoke", steps=2, batch=2, judged=1, only=VARIANTS)


@pytest.fixture(scope="module")
def folder():
    return load_folder(TEACHER)


@pytest.fixture(scope="module")
def teacher(folder):
    return folder.unet().eval()


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "ROWS", tmp_path / "methods.jsonl")
    monkeypatch.setattr(methods, "held_out", partial(held_out, batches=1))
    return tmp_path / "methods.jsonl"


def test_rows(results, monkeypatch):
    """All start where they should and go where their losses lead; what is measured is not measured again."""
    drawn, draw = [], DrawnWorld.drawn_source
    monkeypatch.setattr(DrawnWorld, "drawn_source", lambda here, *args: drawn.append(args[1:]) or draw(here, *args))
    run(SMALL, 3, {"device": "here"})
    calibration = ((), 64, 3)
    assert drawn == [([], 64, 3), ([], 216, methods.HELD_OUT), calibration], "errors are measured on other drawings"
    lines = results.read_text().splitlines()
    found = {(row["case"], row["step"]): row for row in map(json.loads, lines)}
    assert found.keys() == {("teacher", 0), *((case, step) for case in VARIANTS for step in (0, 2))}
    assert len(lines) == 9
    assert found["teacher", 0]["output_error"] == 0.0 < found["teacher", 0]["target_error"] < 0.2
    starts = [found[case, 0]["output_error"] for case in VARIANTS]
    assert starts[0] == starts[2] == starts[3] != starts[1]
    ends = {found[case, 2]["output_error"] for case in VARIANTS}
    assert len(ends | set(starts)) == 6, "every case is trained, on losses of its own"
    for (case, _), row in found.items():
        assert row["device"] == "here"
        assert row["seed"] == 3
        assert {"style", "object", "color", "fid"} <= row.keys()
        assert case == "teacher" or 0.548 <= row["macs_ratio"] <= 0.55
    off = dict.fromkeys(vars(LossWeights()), 0.0)
    assert found["0.55 diffusion only", 2]["config"]["weights"] == off | {"diffusion": 1.0}
    assert found["0.55 distillation only", 2]["config"]["weights"] == off | {"output": 2.0, "feature": 0.1}

    run(SMALL, 3, {"device": "here"})
    assert results.read_text().splitlines() == lines
    results.write_text("\n".join(lines[:-1]) + "\n")
    run(SMALL, 3, {"device": "here"})
    again = results.read_text().splitlines()
    assert again[:-1] == lines[:-1]
    assert json.loads(again[-1])["output_error"] == pytest.approx(json.loads(lines[-1])["output_error"], rel=1e-5)

    run(replace(SMALL, only=("0.55 magnitude",)), 4, {})
    other = {(row["case"], row["step"]): row for row in map(json.loads, results.read_text().splitlines()[9:])}
    assert len(other) == 3
    assert other["0.55 magnitude", 0]["output_error"] == starts[0]
    assert other["0.55 magnitude", 2]["output_error"] != pytest.approx(
        found["0.55 magnitude", 2]["output_error"], rel=1e-4
    ), "another seed sees other batches"


def test_cases(folder, teacher, tmp_path, capsys):
    config = preset("smoke")
    wide, narrow = ({case.name: case for case in cases(b, (), config, folder, teacher)} for b in (0.8, 0.55))
    assert {"0.80 magnitude", "0.80 laptop", "0.80 random", "0.80 random weights", "bk-sdm-small"} <= wide.keys()
    assert {name for name in narrow if not name.startswith("0.55 ")} == set()
    assert {f"0.55 {name}" for name in WEIGHTS} <= narrow.keys()
    assert "bk-sdm-base drops nothing" in capsys.readouterr().err
    assert narrow["0.55 magnitude"].judged == (100, 300)

    kept = narrow["0.55 magnitude"].make()
    other = next(c for c in cases(0.55, (), replace(config, seed=1), folder, teacher) if c.name.endswith("weights"))
    fresh = narrow["0.55 random weights"].make()
    assert fresh.structure == kept.structure
    weights = [unet.conv_in.weight for unet in (kept, fresh, other.make())]
    assert weights[0].equal(teacher.conv_in.weight)
    assert not weights[0].equal(weights[1])
    assert not weights[1].equal(weights[2])

    save_student(tmp_path / "expert-0", folder, fresh)
    extra = f"an expert={tmp_path}/expert-{{seed}}"
    case = next(c for c in cases(0.55, (extra,), config, folder, teacher) if c.name == "0.55 an expert")
    assert case.make().conv_in.weight.equal(weights[1])
    for wrong in ("expert", "=folder", "magnitude=folder"):
        with pytest.raises(UserError, match="wanted NAME=FOLDER"):
            list(cases(0.55, (wrong,), config, folder, teacher))


def test_distances(folder, teacher):
    """0 to the teacher for itself, 1 to both for a network that says nothing; the drawings are always the same."""
    asked, again = (held_out(folder, teacher, batches=1) for _ in range(2))
    assert asked[0].noised.x.equal(again[0].noised.x)
    assert distances(teacher, asked)["output_error"] == 0.0
    silent = teacher.cut(Structure.dense(teacher.config))
    with torch.no_grad():
        silent.conv_out.weight.zero_()
        silent.conv_out.bias.zero_()
    assert distances(silent, asked) == pytest.approx({"output_error": 1.0, "target_error": 1.0})


def made_up(case: str, seed: int, step: int, error: float, fid: float | None = None) -> dict:
    row = {"case": case, "seed": seed, "step": step, "output_error": error, "target_error": error + 0.1}
    row |= {
        "config": {"steps": 600, "batch": 4, "lr": 3e-4, "judged": 12},
        "macs_ratio": 0.96,
        "device": "d",
        "torch": "t",
        "commit": "c",
        "date": "x",
    }
    return row if fid is None else {**row, "fid": fid}


def rows_of(case: str, errors: tuple[float, ...], fids: tuple[float, ...]) -> list[dict]:
    """Two seeds, 10 % apart; the FID is measured first and last."""
    steps = (0, 100, 300, 600)
    return [
        made_up(case, seed, step, error * (1 + seed / 10), fid * (1 + seed / 10))
        for seed in (0, 1)
        for step, error, fid in zip(steps, errors, fids, strict=True)
    ]


ROWS = [
    *rows_of("0.55 magnitude", (0.5, 0.20, 0.10, 0.05), (100, 50, 40, 20)),
    *rows_of("0.55 diffusion only", (0.5, 0.40, 0.30, 0.20), (100, 90, 80, 40)),
    *rows_of("0.55 distillation only", (0.5, 0.25, 0.21, 0.15), (100, 60, 50, 45)),
    *rows_of("0.55 random weights", (1.0, 0.9, 0.8, 0.7), (900, 800, 700, 600)),
    *rows_of("0.80 magnitude", (0.1, 0.05, 0.04, 0.03), (30, 20, 15, 12)),
    *rows_of("bk-sdm-small", (0.01, 0.01, 0.01, 0.005), (500, 30, 20, 10)),
    made_up("teacher", 0, 0, 0.0, 9.0),
    made_up("teacher", 2, 0, 0.0, 99.0),
]


def test_table():
    assert tables.methods(ROWS[:3]) == "not measured"
    under_way = [made_up("0.80 magnitude", 2, step, 9.0, 9.0) for step in (0, 50)]
    lines = tables.methods([made_up("0.80 magnitude", 0, 600, 9.0, 9.0), *ROWS, *under_way]).splitlines()
    assert lines[0].startswith("| seeds 0, 1; before -> after 600 steps | 0.80: output error | 0.80: FID | 0.55:")
    assert "| magnitude | 0.105 -> 0.032 ± 0.002 | 31.5 -> 12.6 ± 0.6 | 0.525 -> 0.053 ± 0.003 |" in lines[2]
    assert lines[3].startswith("| random weights | not measured | not measured | 1.050 -> 0.735 ± 0.035 |")
    assert lines[4].startswith(
        "| bk-sdm-small, which leaves 0.96 of the MACs | 0.011 -> 0.005 ± 0.000 | 525 -> 10.5 ± 0.5 |"
    )
    assert lines[5] == "| teacher, all of the MACs | 0 | 9.0 (1 of 2 seeds) | - | - |"
    text = "\n".join(lines[6:])
    assert (
        "At 0.55, distillation alone gets to where the diffusion loss alone ends: "
        "error to the truth after 600 steps, FID not within 600 steps." in text
    )
    assert "At 0.55, both together gets to where the diffusion loss alone ends: error to the truth after 100" in text
    assert "from pruned weights gets to where a start from random weights ends: error to the truth after 0" in text
    assert "600 steps of 4 images at learning rate 0.0003; FID of 72 drawings." in text
    assert "Measured on d, torch t, x, commits c." in text


def test_plots(tmp_path):
    tables.methods_plots(ROWS, tmp_path)
    for name in ("methods", "figure4", "figure5"):
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000


def test_refuses(results, monkeypatch, capsys):
    for line, says in (
        (["run", "--budget", "0.7"], "--budget 0.7, wanted one of 0.8, 0.55"),
        (["report"], "no finished case"),
    ):
        monkeypatch.setattr("sys.argv", ["methods", *line])
        assert errors.run(methods.main) == 2
        assert says in capsys.readouterr().err
