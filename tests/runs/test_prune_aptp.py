"""`python -m bilevel_fast.prune aptp | route`: from a teacher to a mixture, killed and resumed or not."""

import contextlib
import dataclasses
import html
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from bilevel_fast import prune
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.sources import MemorySource
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.macs import count
from bilevel_fast.pruning.aptp.encoders import TextPrompts
from bilevel_fast.pruning.aptp.experts import planned
from bilevel_fast.pruning.aptp.mixture_folder import Mixture
from bilevel_fast.pruning.aptp.train import RouterTraining
from bilevel_fast.pruning.budget import MacBudget
from bilevel_fast.runs import router as aptp_run
from bilevel_fast.runs.prune_aptp import COMMANDS
from bilevel_fast.runs.router import MINI, PAPER, AptpConfig, Embeddings, training_prompts
from bilevel_fast.runs.sources import image_source
from bilevel_fast.worlds.mini.world import SCENES
from mini_folder import TINY, make_mini_folder

STEPS = 16
QUICK = ("--experts", 3, "--steps", STEPS, "--pretrain", 6, "--batch", 2, "--images", 216, "--log-every", 1,
         "--checkpoint-every", 5, "--budget", 0.7, "--device", "cpu")  # fmt: skip


KILLED = """
import os, signal, sys
from bilevel_fast import prune
from bilevel_fast.base import errors
from bilevel_fast.pruning.aptp.train import RouterTraining

last, real = int(sys.argv.pop(1)), RouterTraining.advance

def advance(self, *batch):
    terms = real(self, *batch)
    if self.step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return terms

RouterTraining.advance = advance
raise SystemExit(errors.run(prune.main))
"""
"""The command, killed right after the step that its first argument says."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folder of a small dense model."""
    return make_mini_folder(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def run(command):
    """Run `python -m bilevel_fast.prune` in this process."""
    return partial(command, prune.main)


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    """The run folder of a run in one piece, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "aptp"
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        COMMANDS["aptp"]([str(x) for x in ("--teacher", teacher, "--out", out, *QUICK)])
    return out, stdout.getvalue(), stderr.getvalue()


def bits(out):
    """Everything that must not depend on how often the run was killed."""
    files = ["mixture.json", "router.safetensors", "summary.json"]
    files += [f"experts/{k}/unet/{name}" for k in range(3) for name in ("structure.json", "config.json")]
    files += [f"experts/{k}/unet/diffusion_pytorch_model.safetensors" for k in range(3)]
    found = {name: (out / name).read_bytes() for name in files}
    records = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"], record["images_per_second"]
    return found | {"stats": records}


# --- aptp ---


def test_table_is_what_the_mixture_holds(trained):
    """Experts on the budget, a row each, with the prompts that `route` sends there."""
    out, stdout, stderr = trained
    mixture = Mixture.load(out)
    captions = [scene.caption for scene in SCENES]
    routed = mixture.route(captions).bincount(minlength=3).tolist()
    header, *rows = stdout.splitlines()[:4]
    assert header.split("  ")[0] == "expert"
    for k, row in enumerate(rows):
        number, macs, prompts, dropped = row.split(maxsplit=3)
        structure = load_folder(mixture.expert_folder(k)).structure
        assert structure == mixture.structures[k]
        ratio = count(structure, 8, 12).ratio
        assert (number, macs, prompts) == (str(k), f"{ratio:.4f}", str(routed[k]))
        assert 0.69 < ratio <= 0.7
        assert set(dropped.split(", ")) - {"none"} <= structure.dropped | {f"and {len(structure.dropped) - 3} more"}
    assert sum(routed) == 216
    assert "216 training prompts, budget 0.7" in stdout
    steps = [json.loads(line)["step"] for line in (out / "stats.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert f"step {STEPS}/{STEPS}" in stderr
    assert mixture.budget == MacBudget(0.7, 8, 12)
    assert mixture.settings["steps"] == STEPS
    assert mixture.settings["batch"] == 2
    assert mixture.settings["weights"]["contrastive"] == 100.0


def test_run_is_the_training(trained, teacher):
    """Put together here: the centre, the captions of each batch, then balance and experts, bit by bit."""
    out, *_ = trained
    folder = load_folder(teacher)
    config = AptpConfig(experts=3, steps=STEPS, pretrain=6, batch=2)
    source = image_source(folder, None, 216, 0)
    plain = TextPrompts(folder.text_encoder)
    captions = [source.captions(i)[0] for i in range(216)]
    assert training_prompts(source, 10_000) == captions == list(dict.fromkeys(captions))
    raw = torch.cat([plain.encode(captions[i : i + 64]) for i in range(0, 216, 64)])
    embeddings = dict(zip(captions, raw - raw.double().mean(dim=0).float(), strict=True))
    training = RouterTraining(folder.unet(), folder.schedule, MacBudget(0.7, 8, 12), 64, 2, config)
    batches = Batches(source, folder.text_encoder, 2, 0)
    for step in range(STEPS):
        batch = batches(step)
        training.advance(batch, torch.stack([embeddings[caption] for caption in batch.captions]))
    training.router.rebalance(torch.stack(list(embeddings.values())))
    saved = load_file(out / "router.safetensors")
    for name, tensor in training.router.state_dict().items():
        assert torch.equal(saved[name], tensor), name
    assert saved["balance"].abs().max() > 0
    assert Mixture.load(out).structures == planned(TINY, training.router.gates(), MacBudget(0.7, 8, 12))


def test_a_report_shows_the_experts_and_the_command(trained, run, monkeypatch):
    out, *_ = trained
    text = (out / "report.html").read_text()
    for k, row in enumerate(json.loads((out / "summary.json").read_text())["experts"]):
        assert f"expert {k}</th>" in text
        assert f"{100 * row['macs']:.1f}".removesuffix(".0") + " %" in text
    assert text.count("<svg") >= 3, "losses and speed"
    (command,) = re.findall(r"<code>(python -m bilevel_fast.prune aptp .*?)</code>", text)
    seen = []
    monkeypatch.setattr("bilevel_fast.runs.prune_aptp.run", lambda config: seen.append(config) or {"experts": [],
        "prompts": 0, "budget": 0.8})  # fmt: skip
    assert run(*shlex.split(html.unescape(command))[3:])[0] == 0
    held = json.loads((out / "config.json").read_text())
    assert seen[0].to_dict() == {**held, "out": f"{out}-again", "resume": False}


@pytest.mark.slow
def test_stopped_killed_and_resumed(trained, teacher, run, tmp_path, monkeypatch, caplog):
    """SIGTERM saves the step it is at; `kill -9` loses what came after a checkpoint. Either way: the same bits."""
    out = tmp_path / "run"
    flags = ("aptp", "--teacher", teacher, "--out", out, *QUICK)
    real = RouterTraining.advance

    def advance(self, *batch):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)  # to the run that goes on in this process
        return real(self, *batch)

    def saved():
        return sorted(path.name for path in (out / "checkpoints").iterdir())

    monkeypatch.setattr(RouterTraining, "advance", advance)
    with pytest.raises(SystemExit) as end:
        run(*flags)
    monkeypatch.setattr(RouterTraining, "advance", real)
    assert end.value.code == 130
    assert saved() == ["step-000005", "step-000007"]
    command = [sys.executable, "-c", KILLED, "13", *map(str, flags), "--resume"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert saved() == ["step-000007", "step-000010"]
    assert not (out / "mixture.json").exists()
    with caplog.at_level("INFO"):
        code, stdout, stderr = run(*flags, "--resume")
    assert code == 0
    assert f"stopped after step 7 of {STEPS}; go on with --resume --out {out}" in stderr  # what was said at first
    assert "resuming after step 10" in caplog.text
    assert stdout.replace(str(out), "") == trained[1].replace(str(trained[0]), "")
    assert bits(out) == bits(trained[0])


def test_finished_run(trained, teacher, run):
    """Said again by --resume, with no step and no file changed; never begun anew, nor gone on with otherwise."""
    out, stdout, _ = trained
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    flags = ("aptp", "--teacher", teacher, "--out", out, *QUICK)
    code, again, _ = run(*flags, "--resume", "--log-every", 7)
    assert (code, again) == (0, stdout)
    code, _, stderr = run(*flags)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "already holds a run" in stderr
    code, _, stderr = run(*flags, "--resume", "--lr", 0.5, "--weights.contrastive", 7)
    assert code == 2
    assert "lr was 0.01, is 0.5; weights.contrastive was 100.0, is 7.0" in stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_killed_while_experts_are_cut(trained, teacher, run, tmp_path, monkeypatch):
    """The training is over, some experts are there: the rest of the run is done again."""
    out = tmp_path / "run"
    flags = ("aptp", "--teacher", teacher, "--out", out, *QUICK)
    real = aptp_run.write_mixture

    def half(path, folder, unet, router, encoder, structures, *rest):
        with monkeypatch.context() as patched:
            patched.setattr("bilevel_fast.pruning.aptp.mixture_folder.write_atomic", refuse)
            real(path, folder, unet, router, encoder, structures, *rest)

    def refuse(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(aptp_run, "write_mixture", half)
    assert run(*flags)[0] == 130
    assert (out / "experts" / "2").exists()
    assert not (out / "router.safetensors").exists()
    monkeypatch.setattr(aptp_run, "write_mixture", real)
    code, stdout, _ = run(*flags, "--resume")
    assert (code, stdout.replace(str(out), "")) == (0, trained[1].replace(str(trained[0]), ""))
    assert bits(out) == bits(trained[0])


def test_gradients_that_are_not_finite_end_the_run(teacher, run, tmp_path):
    out = tmp_path / "run"
    flags = ("aptp", "--teacher", teacher, "--out", out, *QUICK, "--weights.resource", "1e39", "--max-bad-steps", 2)
    code, _, stderr = run(*flags)
    assert code == 2
    assert "error: the last 2 router steps had a non-finite gradient and were skipped; stopped at step 2" in stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    state = json.loads((out / "checkpoints" / "step-000002" / "state.json").read_text())
    assert (list(state), state["step"]) == (["step", "seconds"], 2), "the layout that earlier releases have left"


def test_prompts_are_taken_evenly():
    """The different captions, in order; where they are too many, some of the whole source."""
    captions = [[f"a {i // 2}", f"b {i}"] for i in range(10)]
    source = MemorySource(torch.zeros(10, 1, 2, 1, 1), captions)
    every = training_prompts(source, 100)
    assert len(every) == 15
    assert every[:3] == ["a 0", "b 0", "b 1"]
    assert training_prompts(source, 5) == ["a 0", "a 1", "a 2", "a 3", "a 4"]
    assert training_prompts(source, 12)[-2:] == ["a 4", "b 8"]
    assert training_prompts(source, 1) == ["a 0"]


def test_captions_that_were_not_encoded_before():
    """Are encoded with their batch; a batch of known ones is looked up."""

    class Lengths:
        calls = 0

        def encode(self, captions):
            self.calls += 1
            return torch.tensor([[float(len(c))] for c in captions])

    encoder = Lengths()
    embeddings = Embeddings(encoder, ["a", "bb"], torch.tensor([[10.0], [20.0]]))
    assert embeddings(["bb", "a", "bb"]).tolist() == [[20.0], [10.0], [20.0]]
    assert encoder.calls == 0
    assert embeddings(["bb", "ccc"]).tolist() == [[2.0], [3.0]]


def test_defaults(run, monkeypatch, tmp_path):
    """Those of the mini world, or APTP's where there is data; a flag changes one."""
    seen = []
    monkeypatch.setattr("bilevel_fast.runs.prune_aptp.run", lambda config: seen.append(config) or {"experts": [],
        "prompts": 0, "budget": 0.8})  # fmt: skip
    assert run("aptp")[0] == 0
    assert run("aptp", "--steps", 7, "--weights.contrastive", 3)[0] == 0
    assert run("aptp", f"--data={tmp_path}", "--lr", 0.5)[0] == 0
    weights = dataclasses.replace(MINI.weights, contrastive=3.0)
    assert seen == [
        MINI,
        dataclasses.replace(MINI, steps=7, weights=weights),
        dataclasses.replace(PAPER, data=tmp_path, lr=0.5),
    ]
    assert (PAPER.experts, PAPER.steps, PAPER.batch, PAPER.lr, PAPER.pretrain) == (8, 5000, 64, 2e-4, 500)


def test_help_lists_the_commands(run, capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    flowing = " ".join(shown.split())
    for name, function in COMMANDS.items():
        assert re.search(rf"^  {name}  +\w", shown, re.MULTILINE)
        assert f"{name} {function.__doc__}" in flowing
        with pytest.raises(SystemExit):
            run(name, "--help")
        assert f"python -m bilevel_fast.prune {name}" in capsys.readouterr().out


def test_refusals(teacher, run, tmp_path):
    """One line, exit code 2, and nothing written."""
    out, pruned = tmp_path / "out", tmp_path / "pruned"
    assert run("uniform", "--teacher", teacher, "--out", pruned)[0] == 0
    for message, more in {
        "pruned is pruned already; wanted a dense model": ("--teacher", pruned),
        "experts is 0, wanted at least 1": ("--experts", 0),
        "--batch is 0, wanted at least 1": ("--batch", 0),
        "--max-prompts is -1, wanted at least 1": ("--max-prompts", -1),
        "weight of the resource loss is -1.0, wanted 0 or more": ("--weights.resource", -1),
        r"budget is 0.01, wanted 0\.\d+ < budget": ("--budget", 0.01),
        "budget 0.2 is too small: ": ("--budget", 0.2),  # gates could save as much, but something has to stay
        "none is no folder; wanted one in the layout of all-mpnet": ("--prompt-encoder", tmp_path / "none"),
        "none is not a cache": ("--data", tmp_path / "none"),
        "there is no run to resume": ("--resume",),
        "there is no flag '--expert'; did you mean '--experts'": ("--expert", 3),
    }.items():
        code, stdout, stderr = run("aptp", "--teacher", teacher, "--out", out, *more)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert re.search(message, stderr), stderr
    assert not out.exists()


def test_sd_folder_with_a_sentence_encoder(run, tmp_path):
    """Stable Diffusion's layout, a latent cache with captions, and MPNet: the whole way, as on a real model."""
    pytest.importorskip("diffusers")
    from bilevel_fast.data.cache import Index
    from bilevel_fast.data.writer import CacheWriter
    from mpnet_folder import WIDTH, make_mpnet_folder
    from sd_folder import make_sd_folder

    folder = load_folder(make_sd_folder(tmp_path / "teacher"))
    writer = CacheWriter(tmp_path / "cache", Index(kind="images", latent_shape=(4, 8, 8), vae=folder.vae_fingerprint))
    for i in range(4):
        moments = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(i))
        writer.add(moments, [f"a photo of {i}", f"a red house in the style of {'waves ' * i}"])
    writer.finish()
    make_mpnet_folder(tmp_path / "mpnet")
    base = ("aptp", "--teacher", tmp_path / "teacher", "--out", tmp_path / "run", "--steps", 2, "--batch", 2)
    code, _, stderr = run(*base)
    assert code == 2
    assert "is no model of a built-in world, which draws its own images; --data is missing" in stderr
    flags = ("--data", tmp_path / "cache", "--prompt-encoder", tmp_path / "mpnet", "--experts", 2, "--max-prompts", 6)
    code, stdout, stderr = run(*base, *flags)
    assert code == 0, stderr
    assert "6 training prompts, budget 0.8" in stdout
    mixture = Mixture.load(tmp_path / "run")
    assert mixture.router.predictor.linear.in_features == WIDTH
    assert all(0.79 < count(s, 8, 77).ratio <= 0.8 for s in mixture.structures)
    assert set(mixture.route(["a star", "a red house"]).tolist()) <= {0, 1}


# --- route ---


def test_route_prints_the_experts(trained, run, tmp_path):
    out, *_ = trained
    prompts = [scene.caption for scene in SCENES[::20]]
    wanted = Mixture.load(out).route(prompts).tolist()
    assert len(set(wanted)) > 1
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["", *prompts[2:], "  "]))
    code, stdout, stderr = run("route", out, "--prompts", *prompts[:2], "--file", file)
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0].split() == ["expert", "prompt"]
    shown = [line.split(maxsplit=1) for line in lines[1 : 1 + len(prompts)]]
    assert shown == [[str(k), prompt] for k, prompt in zip(wanted, prompts, strict=True)]
    assert [line.split() for line in lines[-3:]] == [[str(k), str(wanted.count(k))] for k in range(3)]


def test_route_refuses(trained, teacher, run, tmp_path):
    out, *_ = trained
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"a red star\n\xff")
    for message, arguments in {
        "no prompts came; --prompts and --file name some": (out,),
        "teacher is not a mixture: mixture.json is missing": (teacher, "--prompts", "a red star"),
        "the mini world has no word for 'purpel'; did you mean 'purple'": (out, "--prompts", "a purpel star"),
        "none.txt does not exist": (out, "--file", tmp_path / "none.txt"),
        "binary.txt is not UTF-8: invalid start byte at byte 11": (out, "--file", binary),
        "this router was trained with the model's own text encoder": (out, "--prompts", "a", "--prompt-encoder", out),
    }.items():
        code, stdout, stderr = run("route", *arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert message in stderr
