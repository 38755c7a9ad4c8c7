"""The launches in `launch/`: they parse, and ask for flags that there are."""

import re
import shlex
import subprocess
from pathlib import Path

import torch
import yaml

from bilevel_fast.base.devices import Ranks
from bilevel_fast.runs import sessions
from bilevel_fast.runs.ranks import goes_on
from bilevel_fast.train import parse

LAUNCH = Path(__file__).parents[2] / "launch"


def flags_of(script: str) -> list[str]:
    """What follows `-m bilevel_fast.train` in a script, without what its shell fills in."""
    command = script.replace("\\\n", " ").partition("-m bilevel_fast.train ")[2].partition("\n")[0]
    words = [word for word in shlex.split(command) if word not in ("${resume[@]}", "${RESUME[@]}", "$@", "&")]
    return [re.sub(r"^\$LEAVES$", "16", word) for word in words]


def test_slurm():
    path = LAUNCH / "slurm.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text, "or nothing that torchrun restarts succeeds"
    assert parse(flags_of(text)).scale.leaves == 16


def test_kubernetes():
    (job,) = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (script,) = pod["containers"][0]["args"]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    (*_, hook) = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    subprocess.run(["bash", "-n", "-c", hook], check=True)
    config = parse(flags_of(script))
    assert (config.preset, config.scale.leaves) == ("paper", 16)
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] * job["template"]["spec"]["parallelism"] == 16


def test_what_a_launch_has_begun_it_goes_on_with(tmp_path, monkeypatch):
    """torchrun counts processes that failed, and not those that it has started anew for a machine that came or left."""
    alone, again = Ranks(), Ranks(restarts=1)
    for name in ("first", "none"):  # none: without --rdzv-id
        out = tmp_path / name
        out.mkdir()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        assert not goes_on(again, out), "there is nothing yet"
        sessions.begin(out, torch.device("cpu"))
        (out / "config.json").write_text("{}")
        assert goes_on(again, out)
        assert goes_on(alone, out) == (name == "first")
    for other in ("second", None):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", other) if other else monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        assert not goes_on(alone, tmp_path / "first")
