"""Checkpoints by a thread: what the tensors held at the call is saved, whatever training does meanwhile."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.targets import Guidance
from bilevel_fast.scale.team import ALONE
from bilevel_fast.training.checkpoint import latest
from bilevel_fast.training.levels import Editing
from bilevel_fast.training.optim import LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.saver import Pinned, Saver, as_it_is, snapshots_for
from bilevel_fast.training.sharded import ShardedParameters
from bilevel_fast.training.student import StudentTraining
from world import make_models

CPU = torch.device("cpu")


class Held:
    """A snapshot whose copies are not there before `gate` is set."""

    def __init__(self):
        self.snapshot, self.gate, self.copies = Pinned(CPU), threading.Event(), []

    def __call__(self, tensors):
        copies, _ = self.snapshot(tensors)
        self.copies.append(copies)
        return copies, lambda: self.gate.wait(60)


@pytest.fixture
def state():
    """A student's buffers and an optimizer's, with numbers in them."""
    flat = FlatParameters(make_models()[1])
    optimizer = LevelOptimizer(flat, 1e-3, 1)
    optimizer.rule.first.normal_()
    optimizer.rule.done.add_(3)
    return flat, optimizer


def given(flat, optimizer):
    return flat.state_dict(), {"lower": optimizer.state_dict(), "pace": {"every": 7, "last": None}}, {"images": 4}


def test_what_is_saved_is_what_was_there(tmp_path, state):
    flat, optimizer = state
    wanted, snapshot = copy.deepcopy(given(*state)), Held()
    with Saver(tmp_path, snapshot) as saver:
        saver.save(1, *given(*state))
        for buffer in (flat.master, optimizer.rule.first, optimizer.rule.done, optimizer.steps):
            buffer.add_(1)  # training goes on
        assert latest(tmp_path) is None
        snapshot.gate.set()
        saver.wait()
        found = latest(tmp_path)
        assert found is not None
        torch.testing.assert_close((found.tensors, found.optimizers, found.state), wanted, rtol=0, atol=0)
        saver.save(2, *given(*state))
    found = latest(tmp_path)
    assert found is not None
    torch.testing.assert_close((found.tensors, found.optimizers, found.state), given(*state), rtol=0, atol=0)
    first, second = ([copy.data_ptr() for copy in copies] for copies in snapshot.copies)
    assert first == second, "buffers are made once"


def test_a_storage_is_copied_once(state):
    flat, optimizer = state
    tensors = [*flat.state_dict().values(), *flat.state_dict(optimizer.rule.first).values(), optimizer.steps]
    copies, _ = (snapshot := Pinned(CPU))(tensors)
    assert [b.numel() for b in snapshot._buffers] == [flat.master.nbytes, optimizer.rule.first.nbytes, 4]
    for mine, theirs in zip(copies, tensors, strict=True):
        assert mine.stride() == theirs.stride()
        assert torch.equal(mine, theirs)


def test_a_save_waits_for_the_one_before_it(tmp_path):
    w, snapshot = torch.zeros(4), Held()
    with Saver(tmp_path, snapshot) as saver:
        saver.save(1, {"w": w}, {}, {})
        second = threading.Thread(target=lambda: saver.save(2, {"w": w}, {}, {}))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert len(snapshot.copies) == 1, "the buffers of the first are not written over"
        snapshot.gate.set()
        second.join()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000001", "step-000002"]


def test_a_failed_write_is_said_once_by_whoever_comes_next(tmp_path):
    (tmp_path / "file").touch()
    bad, w = tmp_path / "file" / "checkpoints", {"w": torch.zeros(4)}
    message = r"^checkpoint 1 not saved in .*: Not a directory; earlier ones are untouched$"
    saver = Saver(bad, Pinned(CPU))
    saver.save(1, w, {}, {})
    with pytest.raises(UserError, match=message):
        saver.save(2, w, {}, {})
    saver.wait()
    with pytest.raises(UserError, match=message), Saver(bad, Pinned(CPU)) as saver:
        saver.save(1, w, {}, {})
    saver = Saver(bad)
    with pytest.raises(UserError, match=message):
        saver.save(1, w, {}, {})


def test_a_failed_write_does_not_hide_why_the_run_ended(tmp_path, caplog):
    (tmp_path / "file").touch()

    def run():
        with Saver(tmp_path / "file" / "x", Pinned(CPU)) as saver:
            saver.save(1, {"w": torch.zeros(4)}, {}, {})
            raise KeyError("why")

    with pytest.raises(KeyError, match="why"):
        run()
    assert "checkpoint 1 not saved" in caplog.text


def test_only_a_gpu_is_copied():
    unet = make_models()[1]
    flat, shared = FlatParameters(unet), ShardedParameters(make_models()[1], team=ALONE, leaves=2)
    assert snapshots_for(flat) is None
    assert snapshots_for(shared) is as_it_is
    on_gpu = SimpleNamespace(copies=False, master=SimpleNamespace(device=torch.device("cuda", 1)))
    assert isinstance(snapshots_for(on_gpu), Pinned)


class Remembers(Guidance):
    """An eraser whose state lives."""

    def __init__(self):
        super().__init__(1.0)
        self.mask = torch.zeros(3)

    def state_dict(self):
        return {"mask": self.mask}


def test_what_ranks_have_gathered_is_written_while_they_go_on(tmp_path):
    """Parameters, moments, average, counters, and what an eraser keeps: nothing that is written moves."""
    flat = ShardedParameters(make_models()[1], average=True, team=ALONE, leaves=2)
    optimizer, eraser = LevelOptimizer(flat, 1e-3, 1), Remembers()
    lower = SimpleNamespace(name="lower", optimizer=optimizer, means=None)
    training = StudentTraining(lower, Editing(eraser), 1, CPU, graphs=False)
    gate = threading.Event()

    def written():
        return flat.state_dict(), {"lower": optimizer.state_dict()} | training.extras(), {"images": 4}

    wanted = copy.deepcopy(written())
    with Saver(tmp_path, lambda tensors: (tensors, lambda: gate.wait(60))) as saver:
        saver.save(1, *written())
        rule = optimizer.rule
        for live in (flat.master, flat.average, rule.first, rule.second, rule.done, optimizer.steps, eraser.mask):
            live.add_(1)
        gate.set()
    found = latest(tmp_path)
    assert found is not None
    torch.testing.assert_close((found.tensors, found.optimizers, found.state), wanted, rtol=0, atol=0)
