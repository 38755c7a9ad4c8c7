"""Files that several processes write, and what killed ones leave; JSON from outside."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from bilevel_fast.base import files
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import (
    aside_of,
    is_name,
    parse_json,
    read_file,
    read_json,
    read_json_lines,
    replacing,
    sweep,
    whole,
    write_atomic,
    write_json,
)  # fmt: skip

_MANY = """
import sys
from pathlib import Path
from bilevel_fast.base.files import write_json
for number in range(40):
    write_json(Path(sys.argv[1]), {"writer": int(sys.argv[2]), "number": number, "text": "x" * 5000})
"""
_KILLED = """
import os, signal, sys
from pathlib import Path
from bilevel_fast.base.files import aside_of, replacing
aside_of(Path(sys.argv[1])).mkdir()
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(code: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.situation
def test_processes_that_write_the_same_file(tmp_path):
    """Four processes write the same file 40 times each: none fails, one's whole content stays, and nothing else."""
    path = tmp_path / "out.json"
    writers = [start(_MANY, path, number) for number in range(4)]
    assert [writer.communicate()[1] for writer in writers] == [""] * 4
    assert [writer.returncode for writer in writers] == [0] * 4
    assert read_json(path)["number"] == 39
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_the_same_file(tmp_path):
    path, failed = tmp_path / "out", list[BaseException]()

    def write(text: bytes) -> None:
        try:
            for _ in range(20):
                write_atomic(path, text)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(bytes([n]) * 999,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(set(path.read_bytes())) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.situation
def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Somebody plants links where a file is written before it gets its name: what they lead to stays as it was."""
    path, mine = tmp_path / "out", tmp_path / "mine"
    mine.write_bytes(b"mine")
    (tmp_path / ".out.tmp").symlink_to(mine)
    monkeypatch.setattr(files, "_numbers", itertools.count(7))
    aside_of(path).symlink_to(mine)
    monkeypatch.setattr(files, "_numbers", itertools.count(7))
    write_atomic(path, b"new")
    assert (path.read_bytes(), mine.read_bytes()) == (b"new", b"mine")
    assert not path.is_symlink()


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path):
    path, mine = tmp_path / "out", tmp_path / "mine"
    mine.write_bytes(b"mine")
    path.symlink_to(mine)
    write_atomic(path, b"new")
    assert (path.read_bytes(), mine.read_bytes()) == (b"new", b"mine")


@pytest.mark.situation
def test_what_a_killed_process_left(tmp_path):
    """A process is killed while it writes: the next one sweeps away what it left, and nothing that may be in use."""
    path = tmp_path / "out"
    write_atomic(path, b"old")
    killed = start(_KILLED, path)
    assert killed.wait() == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    left = set(tmp_path.iterdir()) - {path}
    assert {entry.is_dir() for entry in left} == {True, False}
    others = [tmp_path / name for name in (".notes.tmp", ".a.0123456789ab-1-0.tmp", ".out.tmp", "x.tmp")]
    for other in others:
        other.write_bytes(b"kept")
    with replacing(path) as file:
        file.write(b"new")
        ours = set(tmp_path.iterdir()) - left - {path, *others}
        sweep(tmp_path)
        assert set(tmp_path.iterdir()) == {path, *others, *ours}
    assert path.read_bytes() == b"new"
    assert set(tmp_path.iterdir()) == {path, *others}


def test_a_write_that_fails_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "out"
    write_atomic(path, b"old")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as refusal:
            write_atomic(path, b"new")
    assert refusal.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError) as refusal:
        write_atomic(tmp_path / "none" / "out", b"new")
    assert refusal.value.filename == str(tmp_path / "none" / "out")


def test_long_names(tmp_path):
    for name in ("a" * 255, "\u4e2d" * 85):
        write_atomic(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 2


# --- JSON ---


@pytest.mark.situation
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "nested too deeply"),
        ('{"a": "\\ud800"}', "text that is no Unicode"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ("[1]", "wanted a JSON object, found list"),
        ("\ufeff{}", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_is_refused(tmp_path, text, message):
    """A JSON file is nested 100,000 deep, holds half a character or is no object: refused in one line."""
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    for read in (lambda: read_json(path), lambda: list(read_json_lines(path))):
        if text:
            with pytest.raises(UserError, match=message) as refusal:
                read()
            assert str(path) in str(refusal.value)
            assert len(str(refusal.value).splitlines()) == 1


def test_json_that_is_taken(tmp_path):
    path = tmp_path / "config.json"
    value = {"a": [{"b": "\u2028 \U0001f600"}] * 3, "c": {}}
    for ascii_only in (False, True):
        path.write_text(json.dumps(value, ensure_ascii=ascii_only) + "\n\n", encoding="utf-8")
        assert read_json(path) == value
        assert list(read_json_lines(path)) == [(1, value)]
    assert parse_json('["\\ud800"]', "here", surrogates=True) == ["\ud800"]
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.situation
def test_what_is_no_regular_file(tmp_path):
    """A config is a pipe, or a link to itself: refused, and not waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (("pipe", "no regular file"), ("loop", "no regular file"), ("none", "is missing")):
        with pytest.raises(UserError, match=message):
            read_json(tmp_path / name)
    (tmp_path / "large").write_bytes(bytes(101))
    assert len(read_file(tmp_path / "large", 101)) == 101
    with pytest.raises(UserError, match="has 101 bytes, wanted at most 100"):
        read_file(tmp_path / "large", 100)


def test_whole_numbers_and_names():
    assert (whole(3, "x", 1, 9), whole(3.0, "x", 1, 9)) == (3, 3)
    for bad in (0, 10, 3.5, float("inf"), float("nan"), "3", None, True, [3], 10**40):
        with pytest.raises(UserError, match=r"x is .*, wanted a whole number from 1 to 9"):
            whole(bad, "x", 1, 9)
    assert is_name("shard-00000.safetensors")
    for bad in ("", ".", "..", "a/b", "../a", "a\\b", "a\0", "\ud800", None, 3, ["a"]):
        assert not is_name(bad)


@pytest.mark.situation
def test_control_characters_do_not_reach_the_terminal():
    """A tensor is named so that a terminal would obey it: the message shows the characters instead."""
    assert str(UserError("weight \x1b[2Jgone\nerror: \u202e")) == r"weight \x1b[2Jgone\nerror: \u202e"
    assert str(UserError("plain \u00e9\u4e2d")) == "plain \u00e9\u4e2d"
    assert str(UserError("first", "second\nthird")) == "first\nsecond\nthird"
