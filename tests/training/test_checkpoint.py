"""Checkpoints: the same bits back, whatever kills the process, fills the disk or damages a file."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import saving
from bilevel_fast.base.errors import UserError
from bilevel_fast.training.checkpoint import Checkpoint, GracefulStop, latest, save
from forked import processes
from saving import content

FILES = ("manifest.json", "model.safetensors", "optimizer.json", "optimizer.safetensors", "state.json")


def assert_is(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    tensors, optimizers, state = content(step)
    assert checkpoint.step == step
    torch.testing.assert_close(checkpoint.tensors, tensors, rtol=0, atol=0)
    torch.testing.assert_close(checkpoint.optimizers["lower"]["state"], optimizers["lower"]["state"], rtol=0, atol=0)
    assert checkpoint.optimizers["lower"]["param_groups"] == optimizers["lower"]["param_groups"]
    assert checkpoint.state == state


def start(work: Callable[..., None], folder: Path, *args: int) -> tuple[BaseProcess, Connection]:
    """A process that does `work(folder, events, *args)`, and the end of `events` to receive from."""
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=work, args=(folder, sender, *args))
    child.start()
    sender.close()  # so that the end of the child is the end of the events
    return child, receiver


def received(events: Connection) -> Iterator[Any]:
    """What is still to come until the child ends."""
    with suppress(EOFError):
        while True:
            yield events.recv()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    losses = []
    for step in steps:
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def fresh_run(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    model = model.to(memory_format=torch.channels_last)  # safetensors takes contiguous tensors only
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def test_fused_adamw_resumes_to_the_same_bits(tmp_path: Path) -> None:
    model, optimizer = fresh_run(seed=0)
    train(model, optimizer, range(3))
    save(tmp_path, 3, model.state_dict(), {"lower": optimizer.state_dict()}, {"images": 6})
    losses = train(model, optimizer, range(3, 6))

    resumed, optimizer = fresh_run(seed=1)
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    resumed.load_state_dict(checkpoint.tensors)
    moments = checkpoint.optimizers["lower"]
    for state, p in zip(moments["state"].values(), resumed.parameters(), strict=True):
        # torch's fused kernel takes moments for laid out as their parameter is, and a checkpoint has no such order
        state |= {name: torch.empty_like(p).copy_(state[name]) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(moments)
    assert checkpoint.state == {"images": 6}
    assert torch.equal(optimizer.state_dict()["state"][0]["step"], torch.tensor(3.0))
    assert torch.equal(torch.stack(train(resumed, optimizer, range(3, 6))), torch.stack(losses))
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert latest(tmp_path) is not None, "what was made of the mapped file has not changed it"


def test_layout_and_the_last_two_stay(tmp_path: Path) -> None:
    for step in (1, 2, 1_000_000):
        path = save(tmp_path, step, *content(step))
    assert names(tmp_path) == ["step-000002", "step-1000000"]
    assert path == tmp_path / "step-1000000"
    assert names(path) == sorted(FILES)
    files = json.loads((path / "manifest.json").read_text())["files"]
    for name in FILES[1:]:
        data = (path / name).read_bytes()
        assert files[name] == {"size": len(data), "sha256": sha256(data).hexdigest()}
    torch.testing.assert_close(load_file(path / "model.safetensors"), content(1_000_000)[0], rtol=0, atol=0)
    moments = {f"lower/state/0/{name}": value for name, value in content(1_000_000)[1]["lower"]["state"][0].items()}
    torch.testing.assert_close(load_file(path / "optimizer.safetensors"), moments, rtol=0, atol=0)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert latest(tmp_path / "missing") is None
    assert latest(tmp_path) is None


@pytest.mark.parametrize("how", [0, 1], ids=["at once", "by a thread"])
def test_sigkill_at_any_moment_leaves_what_was_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: int
) -> None:
    """25 saving processes, each killed at a random moment: what `save` returned from is never lost."""
    rng = random.Random(0)
    for _ in range(25):
        child, events = start(saving.save_for_ever, tmp_path, how)
        last = dict([events.recv(), events.recv()])  # one save at least, then a random moment of the next ones
        time.sleep(rng.uniform(0, 0.06))
        child.kill()
        last.update(received(events))
        child.join()
        assert child.exitcode == -signal.SIGKILL
        checkpoint = latest(tmp_path)
        assert checkpoint is not None
        assert_is(checkpoint, checkpoint.step)
        assert last["ended"] <= checkpoint.step <= last["began"]
    assert not caplog.records, "a folder named step-* is whole"


def test_leftovers_of_a_killed_save_are_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1, *content(1))
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".tmp-step-000002")
    assert_is(latest(tmp_path), 1)
    save(tmp_path, 3, *content(3))
    assert names(tmp_path) == ["step-000001", "step-000003"]


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip_bit,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_falls_back_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    save(tmp_path, 1, *content(1))
    DAMAGES[damage](save(tmp_path, 2, *content(2)) / name)
    assert_is(latest(tmp_path), 1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    line = record.getMessage()
    # A flipped bit in the manifest may show as the mismatch of a file that it describes.
    assert "step-000002" in line
    assert name in line or (name == "manifest.json" and damage == "flipped")
    assert "\n" not in line


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_bit(save(tmp_path, step, *content(step)) / "optimizer.safetensors")
    with pytest.raises(UserError, match=r"^all 2 checkpoints in .* are damaged; [^\n]*$"):
        latest(tmp_path)


def test_another_format_is_said_and_nothing_older_taken_in_its_place(tmp_path: Path) -> None:
    save(tmp_path, 1, *content(1))
    manifest = save(tmp_path, 2, *content(2)) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 7}))
    with pytest.raises(UserError, match=r"^checkpoint .*step-000002 has format 7, this release reads 1 to 2$"):
        latest(tmp_path)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_damaged_step_is_saved_again_and_makes_no_room_for_itself(tmp_path: Path) -> None:
    save(tmp_path, 1, *content(1))
    flip_bit(save(tmp_path, 2, *content(2)) / "model.safetensors")
    assert_is(latest(tmp_path), 1)
    save(tmp_path, 2, *content(2))
    assert names(tmp_path) == ["step-000001", "step-000002.1"]
    assert_is(latest(tmp_path), 2)


def test_a_truncated_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    save(tmp_path, 1, *content(1))
    os.truncate(save(tmp_path, 2, *content(2)) / "optimizer.safetensors", 10)
    save(tmp_path, 3, *content(3))
    assert names(tmp_path) == ["step-000001", "step-000003"]


def save_format_1(folder: Path, step: int, optimizers: Any = None) -> Path:
    """A checkpoint as releases before format 2 wrote it."""
    tensors, moments, state = content(step)
    path = folder / f"step-{step:06d}"
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    torch.save(moments if optimizers is None else optimizers, path / "optimizer.pt")
    (path / "state.json").write_text(json.dumps(state))
    files = {file.name: {"size": file.stat().st_size, "sha256": digest(file)} for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files}))
    return path


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def test_checkpoints_of_format_1_are_read_and_followed(tmp_path: Path) -> None:
    save_format_1(tmp_path, 1)
    assert_is(latest(tmp_path), 1)
    save(tmp_path, 2, *content(2))
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert_is(latest(tmp_path), 2)


class Exploit:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def test_pickled_code_is_refused_even_with_a_true_manifest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_format_1(tmp_path, 1)
    save_format_1(tmp_path, 2, {"lower": Exploit(tmp_path / "proof")})
    assert_is(latest(tmp_path), 1)
    assert not (tmp_path / "proof").exists()
    assert "optimizer.pt: holds more than tensors and plain values" in caplog.text


# The write that fails is the model's, or, with few weights and a large optimizer state, the optimizer's.
@pytest.mark.parametrize(("weights", "moments"), [(100_000, 1), (1, 100_000)], ids=["model", "optimizer"])
@pytest.mark.parametrize("how", [0, 1], ids=["at once", "by a thread"])
def test_a_write_that_fails_leaves_the_earlier_ones(tmp_path: Path, weights: int, moments: int, how: int) -> None:
    """A real failing write: in a process with a limit on the size of its files."""
    for step in (1, 2):
        save(tmp_path, step, *content(step))
    child, events = start(saving.save_with_small_files, tmp_path, weights, moments, how)
    line = events.recv()
    child.join()
    assert "\n" not in line
    assert str(tmp_path) in line
    assert "File too large" in line
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert_is(latest(tmp_path), 2)


def test_a_full_disk_leaves_the_earlier_ones(tmp_path: Path) -> None:
    """A real full disk: 200 KiB of tmpfs in a mount namespace of its own, where the system allows one."""
    mount = f"mount -t tmpfs -o size=200k tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    code = f"""
import os, torch
from pathlib import Path
from bilevel_fast.training.checkpoint import latest, save
from bilevel_fast.training.saver import Pinned, Saver
def behind(*content):
    with Saver(folder, Pinned(torch.device("cpu"))) as saver:
        saver.save(*content[1:])
folder = Path({str(tmp_path)!r}) / "checkpoints"
save(folder, 1, {{"w": torch.ones(10)}}, {{}}, {{}})
for tensors, optimizers in (({{"w": torch.ones(100_000)}}, {{}}), ({{}}, {{"m": torch.ones(100_000)}})):
    for how in (save, behind):
        try:
            how(folder, 2, tensors, optimizers, {{}})
        except ValueError as error:
            print(error, os.listdir(folder), latest(folder).step)
"""
    command = ["unshare", "-Urm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(out) == 4
    for line in out:
        assert "No space left on device" in line
        assert line.endswith("earlier ones are untouched ['step-000001'] 1")


def test_graceful_stop_sets_a_flag_and_puts_the_handlers_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with GracefulStop() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)  # the first SIGINT, so it asks only
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("ends", [False, True])
def test_sigterm_does_not_end_a_process_that_an_error_ends(ends: bool) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(RuntimeError), GracefulStop(ends=ends):
            raise RuntimeError("a collective has failed")
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        assert (after == before) != ends
        assert after[0] == before[0], "Ctrl-C ends it at once"
        if ends:
            os.kill(os.getpid(), signal.SIGTERM)  # it would end this process
        with GracefulStop(ends=ends):
            pass
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == after
    finally:
        signal.signal(signal.SIGTERM, before[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_process_finishes_its_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    child, events = start(saving.step_until_stopped, tmp_path)
    assert events.recv() == 1
    time.sleep(0.05)
    assert child.pid is not None
    os.kill(child.pid, number)
    steps = max(received(events))
    child.join()
    assert child.exitcode == 0
    assert_is(latest(tmp_path), steps)
