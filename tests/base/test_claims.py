"""Who holds the place of an output, and what is left of it afterwards."""

import fcntl
import os

import pytest

from bilevel_fast.base import claims
from bilevel_fast.base.claims import claimed, locked
from bilevel_fast.base.errors import UserError


def test_a_place_is_held_and_left_as_it_was(tmp_path):
    path = tmp_path / "new" / "deep" / "out"
    with claimed(path) as left:
        assert not left
        in_use = rf"{path} is in use by process {os.getpid()} on .*; wait for it"
        with pytest.raises(UserError, match=in_use), claimed(path):
            pass
        with claimed(path.with_name("other")):
            pass
    assert list(tmp_path.iterdir()) == []
    with claimed(path):
        path.write_bytes(b"done")
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match=f"{path} exists already"), claimed(path):
        pass
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.situation
def test_a_place_that_cannot_be(tmp_path):
    """An output is to lie in a file, or a link is planted where its lock is: refused, and the link is not followed."""
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match="mine is a file, wanted a folder"), claimed(mine / "deep" / "out"):
        pass
    (tmp_path / ".out.lock").symlink_to(mine)
    with pytest.raises(OSError, match="symbolic links") as refusal, claimed(tmp_path / "out"):
        pass
    assert refusal.value.filename == str(tmp_path / ".out.lock")
    assert mine.read_bytes() == b"mine"


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    path = tmp_path / ".lock"
    path.write_text("123 on nowhere")
    with locked(path, "it") as left:
        assert left
        assert path.read_text().startswith(f"{os.getpid()} on ")
    assert not path.exists()


def test_a_lock_that_is_gone_is_no_lock(tmp_path, monkeypatch):
    """Its holder deletes it between the opening and the locking of the next process."""
    path, opened, real = tmp_path / ".lock", list[int](), fcntl.flock

    def flock(number: int, how: int) -> None:
        if not opened:
            path.unlink()
        opened.append(number)
        real(number, how)

    monkeypatch.setattr(claims.fcntl, "flock", flock)
    with locked(path, "it"):
        assert len(opened) == 2
        assert path.exists()


def test_without_locks_nothing_is_locked(tmp_path, monkeypatch):
    def flock(number: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(claims.fcntl, "flock", flock)
    with locked(tmp_path / ".lock", "it"), locked(tmp_path / ".lock", "it"):
        pass
    assert list(tmp_path.iterdir()) == []
