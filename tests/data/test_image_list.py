"""The lines of an `images.jsonl`, which may come from somebody else."""

import json

import pytest

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.stream import read_list

GOOD = {"key": 3, "file": "a/b.jpg", "bytes": 9, "captions": ["a star", "b"]}


def test_what_is_read(tmp_path):
    (tmp_path / "images.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"key": 4}) + "\n")
    entries, sizes = read_list(tmp_path / "images.jsonl")
    assert [(e.key, e.file, e.captions) for e in entries] == [(key, "a/b.jpg", ("a star", "b")) for key in (3, 4)]
    assert sizes == [9, 9]


@pytest.mark.situation
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../../etc/passwd"}, "leads out of the folder of images: '../../etc/passwd'"),
        ({"file": "/etc/passwd"}, "leads out of the folder of images"),
        ({"file": "a\0.jpg"}, "not valid Unicode"),
        ({"file": 3}, "wanted a text"),
        ({"captions": []}, "wanted a list of texts"),
        ({"captions": "a"}, "wanted a list of texts"),
        ({"key": -1}, "key is -1, wanted a whole number from 0"),
        ({"key": 2**40}, "wanted a whole number"),
        ({"bytes": None}, "bytes is None, wanted a whole number"),
    ],
)
def test_a_line_that_leads_elsewhere_or_holds_something_else(tmp_path, change, message):
    """A list of images names a file outside its folder, or no image at all: refused by line, and nothing is opened."""
    (tmp_path / "images.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(UserError, match=message) as refusal:
        read_list(tmp_path / "images.jsonl")
    assert "images.jsonl line 2" in str(refusal.value)
