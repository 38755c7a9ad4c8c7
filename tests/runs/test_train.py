"""The command line of `train`, and whole runs on the mini world at the size of the smoke preset."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder
from bilevel_fast.runs import sessions
from bilevel_fast.runs.config import PRESETS, TrainConfig, preset
from bilevel_fast.train import main, parse
from bilevel_fast.training.checkpoint import latest
from commands import run_command
from forked import Started

LITTLE = ["--mini.judge-erased", "1", "--mini.judge-kept", "1", "--mini.judge-steps", "2"]
"""For runs whose quality nobody looks at."""


def train(*flags: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run_command(main, *flags, cwd=cwd)


def refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    """Exit code 2 and one clear line."""
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert message in errors[0]
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("smoke") / "run"
    return out, train("--preset", "smoke", "--out", out)


def test_run_leaves_everything_behind(smoke_run):
    out, result = smoke_run
    assert result.returncode == 0, result.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["preset"], summary["lower_steps"], summary["upper_steps"]) == ("smoke", 8, 2)
    assert summary["seconds"] > 0
    assert summary["images_per_second"] > 0
    assert 0.798 <= summary["macs"]["ratio"] <= 0.80
    assert set(summary["quality"]) == {"teacher", "distilled", "student"}
    for row in summary["quality"].values():
        assert set(row) == {"concept_hit", "content_kept", "other_style_hit", "object", "color", "fid"}
    steps = [json.loads(line)["step"] for line in (out / "stats.jsonl").read_text().splitlines()]
    assert steps == [4, 8]
    assert (out / "samples" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3 * 12, "what three models drew for twelve prompts"
    assert [row["event"] for row in sessions.read(out)] == ["begun", "finished"]
    assert list((out / "events" / "student").glob("events.out.tfevents.*"))
    assert json.loads((out / "config.json").read_text())["lower"]["steps"] == 8
    student = load_folder(out / "student").unet()
    assert not student.structure.is_dense
    assert "student" in result.stdout
    assert "concept_hit" in result.stdout


def test_the_upper_level_makes_the_only_difference_to_the_twin(smoke_run):
    out, _ = smoke_run
    student, twin = (load_folder(out / name).unet() for name in ("student", "distilled"))
    assert student.structure == twin.structure
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), twin.parameters(), strict=True))


def test_a_finished_run_is_not_overwritten(smoke_run):
    out, _ = smoke_run
    before = (out / "summary.json").read_bytes()
    refused(train("--preset", "smoke", "--out", out), "already holds a run")
    assert (out / "summary.json").read_bytes() == before


def test_resume_with_another_config_is_refused(smoke_run):
    out, _ = smoke_run
    refused(train("--preset", "smoke", "--out", out, "--resume", "--lower.lr", "1e-5"), "lower.lr")


def test_same_seed_same_weights_another_seed_others(small_teacher, tmp_path):
    """With and without the twin, whatever is judged."""
    flags = ["--preset", "smoke", "--teacher", small_teacher, "--lower.steps", 4, *LITTLE]
    runs = {"first": (0, "--mini.judge-kept", 2), "again": (0, "--no-twin"), "other": (1, "--no-twin")}
    for name, (seed, *more) in runs.items():
        assert train(*flags, "--out", tmp_path / name, "--seed", seed, *more).returncode == 0
    first, second, third = (load_folder(tmp_path / name / "student").unet().state_dict() for name in runs)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], third[k]) for k in first)


def test_dry_run_prints_the_resolved_settings(tmp_path):
    result = train("--preset", "released", "--upper.every", "7", "--dry-run", "--out", tmp_path / "run")
    settings = json.loads(result.stdout)
    assert settings["upper"]["every"] == 7
    assert settings["lower"]["steps"] == 50_000
    assert not (tmp_path / "run").exists()


def test_help_lists_presets_and_flags():
    result = train("--help")
    assert result.returncode == 0
    told = " ".join(result.stdout.split())  # wherever its lines are broken
    for word in ("--preset", "mini, emoji, smoke, paper or released", "--upper.every", "K: lower steps per upper step"):
        assert word in told, word


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "mina"], "preset 'mina' does not exist; did you mean 'mini'?"),
        (["--preset", "paper"], "preset 'paper' is for folders"),
        (["--preset", "paper", "--data", "x"], "--data given without --teacher"),
        (["--teacher", "x", "--data", "y"], "--data given without --concepts"),
        (["--teacher", "nowhere"], "model folder nowhere does not exist"),
        (["--erase", "wave"], "style 'wave' does not exist; did you mean 'waves'?"),
        (["--erase", "plain"], "style 'plain' cannot be erased"),
        (["--lower.steps", "0"], "--lower.steps is 0: wanted >= 1"),
        (["--prune.method", "magnitute"], "no pruning method 'magnitute'; did you mean 'magnitude'?"),
        (["--prune.budget", "0.01"], "budget 0.01 is too small"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--resume"], "there is no run to resume"),
        (["--lower.stepz", "3"], "there is no flag '--lower.stepz'; did you mean '--lower.steps'"),
        (["--no-twinn"], "there is no flag '--no-twinn'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(flags, message, tmp_path):
    refused(train(*flags, "--out", tmp_path / "run", cwd=tmp_path), message)


def test_presets_are_consistent():
    for name in PRESETS:
        config = preset(name)
        assert config.preset == name
        assert isinstance(config, TrainConfig)
        assert config.out == Path("runs") / name
    assert parse([]).preset == "mini"
    folders = ["--teacher", "t", "--data", "d", "--concepts", "c"]
    assert parse(folders).preset == "paper"
    assert parse([*folders, "--preset=released"]).preset == "released"


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--prune.budget", "1.5"], "--prune.budget is 1.5: wanted > 0 and <= 1"),
        (["--lower.batch", "0"], "--lower.batch is 0: wanted >= 1"),
        (["--lower.lr", "0"], "--lower.lr is 0.0: wanted > 0"),
        (["--lower.p-uncond", "1"], "--lower.p-uncond is 1.0: wanted >= 0 and < 1"),
        (["--erase"], "--erase is (): wanted one or more"),
        (["--concept-weights", "0"], "--concept-weights is (0.0,): wanted each > 0 and finite"),
        (["--clip-norm", "0"], "--clip-norm is 0.0: wanted > 0"),
        (["--ema", "1"], "--ema is 1.0: wanted > 0 and < 1"),
        (["--log-every", "0"], "--log-every is 0: wanted >= 1"),
        (["--checkpoint-every", "0"], "--checkpoint-every is 0: wanted >= 1"),
        (["--scale.leaves", "0"], "--scale.leaves is 0: wanted >= 1"),
        (["--scale.leaves", "3"], "--scale.leaves is 3: wanted a divisor of --lower.batch 16 (1, 2, 4, 8, 16)"),
    ],
)
def test_a_refusal_names_the_range(flags, wanted):
    with pytest.raises(UserError) as refused:
        parse(flags)
    assert str(refused.value) == wanted


def test_a_micro_batch_is_a_part_of_a_leaf():
    with pytest.raises(UserError, match=r"--upper.micro-batch is 8: wanted a divisor of a leaf, which has 4 of"):
        parse(["--scale.leaves", "4", "--upper.micro-batch", "8"])
    parse(["--scale.leaves", "4", "--upper.micro-batch", "2"])


def test_bf16_with_an_average_and_recomputation_is_killed_and_resumed(small_teacher, tmp_path):
    """What is saved is fp32 and the average; a stop in between changes no bit."""
    flags = ["--preset", "smoke", "--no-twin", "--precision", "bf16", "--ema", "0.9", "--recompute", *LITTLE]
    flags += ["--teacher", small_teacher, "--lower.batch", 2, "--upper.batch", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = train(*flags, "--out", whole)
    assert result.returncode == 0, result.stderr
    process = Started("train", *flags, "--out", parts, log=tmp_path / "parts.log")
    while "\nstep 4/8" not in process.said():
        assert process.runs(), process.said()
        time.sleep(0.01)
    process.send(signal.SIGTERM)
    assert process.wait() == 130
    assert train(*flags, "--out", parts, "--resume").returncode == 0
    first, second = (load_folder(path / "student").unet().state_dict() for path in (whole, parts))
    assert all(value.dtype == torch.float32 for value in first.values())
    assert all(torch.equal(first[k], second[k]) for k in first)
    trained = latest(whole / "checkpoints" / "student")
    assert trained is not None
    assert all(torch.equal(trained.optimizers["average"][k], first[k]) for k in first)


def test_out_of_memory_says_what_would_fit(small_teacher, monkeypatch, tmp_path):
    def fit(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("bilevel_fast.runs.assemble.levels", fit)
    flags = ["--preset", "smoke", "--no-twin", "--teacher", small_teacher, *LITTLE, "--lower.batch", 32]
    result = train(*flags, "--out", tmp_path / "run")
    assert result.returncode == 2
    assert "error: cpu is out of memory; what was saved is whole\nbatch 32 at latents of 16 x 16 (fp32) wants" in (
        result.stderr
    )
    assert "student activations" in result.stderr


def test_the_error_of_an_fp8_teacher_is_said(small_teacher, monkeypatch, tmp_path):
    from bilevel_fast.models.fp8 import to_fp8

    monkeypatch.setattr("bilevel_fast.runs.assemble.to_fp8", lambda unet: to_fp8(unet, emulate=True))
    flags = ["--preset", "smoke", "--no-twin", "--teacher", small_teacher, "--lower.steps", 1, *LITTLE]
    result = train(*flags, "--out", tmp_path / "run", "--fp8-teacher")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fp8 teacher")]
    assert 0.5 < float(line.split("off by ")[1].split(" ")[0]) < 20


def test_an_fp8_teacher_wants_its_card(tmp_path):
    result = train("--preset", "smoke", "--fp8-teacher", "--device", "cpu", "--out", tmp_path / "run")
    refused(result, "fp8: the teacher is on cpu; wanted a GPU of sm_89 or sm_90")


def test_methods_that_want_data_or_a_seed_get_them(small_teacher):
    from dataclasses import replace

    from bilevel_fast.runs.session import initial_student

    folder, config = load_folder(small_teacher), preset("smoke")
    random = replace(config, prune=replace(config.prune, method="random"))
    first, again, other = (initial_student(replace(random, seed=seed), folder, 1).structure for seed in (0, 0, 1))
    assert first == again != other
    laptop = replace(config, prune=replace(config.prune, method="laptop"))
    assert initial_student(laptop, folder, 1).structure.dropped, "it has looked at what layers do to images"
