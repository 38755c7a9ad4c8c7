"""Prompt sets: ids, prompts and seeds as the files have them, and one clear line about what they cannot be."""

import json
import logging
import re

import pytest

from bilevel_fast.base.errors import UserError
from bilevel_fast.sampling.prompts import Row, RowFlags, read_rows


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def coco(path, *captions):
    images = [{"id": image, "file_name": f"{image:012}.jpg"} for image, _ in captions]
    annotations = [{"id": 900 + n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)]
    return write(path, json.dumps({"images": images, "annotations": annotations}))


CAPTIONS = [
    (139, "A room. "),
    (285, "A bear\n"),
    (139, "a room with a TV"),
    (139, "a house, 梵高\u2028"),
    (285, "bears"),
]


@pytest.mark.parametrize(
    ("duplicates", "expected"),
    [
        (None, [Row("139", "a house, 梵高"), Row("285", "bears")]),
        ("first", [Row("139", "A room."), Row("285", "A bear")]),
        (
            "all",
            [
                *(Row(f"139-{n}", text) for n, text in enumerate(["A room.", "a room with a TV", "a house, 梵高"])),
                *(Row(f"285-{n}", text) for n, text in enumerate(["A bear", "bears"])),
            ],
        ),
    ],
)
def test_coco_has_the_last_caption_of_each_image(tmp_path, duplicates, expected):
    path = coco(tmp_path / "captions_val2017.json", *CAPTIONS)
    assert read_rows(path, duplicates=duplicates) == expected
    assert read_rows(path, duplicates=duplicates, limit=1) == [row for row in expected if row.id.startswith("139")]


ARTIST = 'case_number,prompt,evaluation_seed,artist\n0,"Star, by X",2219,X\n7,House by X,13,X\n'


def test_tables(tmp_path):
    path = write(tmp_path / "artist.CSV", "\ufeff" + ARTIST)
    assert read_rows(path) == [Row("0", "Star, by X"), Row("7", "House by X")]
    assert [row.seed for row in read_rows(path, seed_column="evaluation_seed")] == [2219, 13]
    assert [row.prompt for row in read_rows(path, prompt_column="artist")] == ["X", "X"]
    path = write(tmp_path / "mma.csv", 'n,adv_prompt,seed\nx,"two\nlines",7.0\ny,naked,8\n')
    flags = RowFlags(prompt_column="adv_prompt", seed_column="seed")
    assert flags.read(path) == [Row("0", "two\nlines", 7), Row("1", "naked", 8)]
    assert [row.id for row in read_rows(path, prompt_column="adv_prompt", id_column="n", limit=1)] == ["x"]


def test_lines(tmp_path):
    """Ring-A-Bell's file is named like a table and has no header."""
    path = write(tmp_path / "ring.csv", "a, b\r\n\n c\u2028d \n")
    assert read_rows(path, layout="lines") == [Row("0", "a, b"), Row("1", "c\u2028d")]
    assert read_rows(path.rename(tmp_path / "ring.txt")) == [Row("0", "a, b"), Row("1", "c\u2028d")]


def test_rows_without_a_prompt_are_named(tmp_path, caplog):
    """The others keep their numbers."""
    path = write(tmp_path / "a.csv", "prompt,x\na,1\n  ,2\nc,3\n")
    with caplog.at_level(logging.WARNING):
        assert read_rows(path) == [Row("0", "a"), Row("2", "c")]
        assert [row.id for row in read_rows(coco(tmp_path / "a.json", (3, "a"), (4, " ")))] == ["3"]
    assert [record.getMessage() for record in caplog.records] == [
        f"prompt file {path}: lines 3 have no prompt and are left out",
        f"prompt file {tmp_path / 'a.json'}: annotations 1 have no prompt and are left out",
    ]


def test_an_id_that_is_there_twice(tmp_path):
    path = write(tmp_path / "a.csv", "image_id,prompt\n3,a\n4,b\n3,c\n")
    with pytest.raises(
        UserError, match=re.escape("a.csv: id '3' is there twice, line 2 and line 4; wanted another id")
    ):
        read_rows(path)
    assert read_rows(path, duplicates="last") == [Row("3", "c"), Row("4", "b")]
    assert [row.id for row in read_rows(path, duplicates="all")] == ["3-0", "3-1", "4-0"]


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.txt", None, {}, "a.txt does not exist"),
        ("a.txt", "\n \n", {}, "a.txt holds no prompt"),
        ("a.txt", b"caf\xe9", {}, "a.txt is not UTF-8"),
        ("a.txt", "a\n", {"seed_column": "seed"}, "is read as lines, which has no columns"),
        ("a.txt", "a\n", {"layout": "cvs"}, "prompt layout 'cvs' does not exist; did you mean 'csv'?"),
        ("a.txt", "a\n", {"duplicates": "lats"}, "duplicates 'lats' does not exist; did you mean 'last'?"),
        ("a.txt", "a\n", {"limit": 0}, "limit is 0"),
        ("a.csv", "case,prompts\n0,a\n", {}, "no column 'prompt'; did you mean 'prompts'"),
        ("a.csv", "", {}, "no column 'prompt'"),
        ("a.csv", ARTIST, {"seed_column": "seed"}, "no column 'seed'; "),
        ("a.csv", ARTIST, {"id_column": "case_numbr"}, "no column 'case_numbr'; did you mean 'case_number'"),
        ("a.csv", "prompt,seed\na,x\n", {"seed_column": "seed"}, "a.csv, line 2: seed 'x' is no integer"),
        ("a.csv", "prompt,seed\na,\n", {"seed_column": "seed"}, "a.csv, line 2: seed '' is no integer"),
        ("a.csv", "prompt,seed\na,-1\n", {"seed_column": "seed"}, "a.csv, line 2: seed is -1"),
        ("a.csv", "id,prompt\n../x,a\n", {}, "a.csv, line 2: id '../x' cannot name a file"),
        ("a.csv", "id,prompt\n.x,a\n", {}, "a.csv, line 2: id '.x' cannot name a file"),
        ("a.csv", "id,prompt\n,a\n", {}, "a.csv, line 2: id '' cannot name a file"),
        ("a.json", "{", {}, "a.json is not JSON"),
        ("a.json", "[]", {}, "a.json: wanted a JSON object, found list"),
        ("a.json", '{"images": []}', {}, "a.json: wanted COCO captions, a list of 'annotations'"),
        ("a.json", '{"annotations": [{"image_id": 3}]}', {}, "annotation 0: wanted 'image_id' and 'caption'"),
        ("a.json", '{"annotations": []}', {}, "a.json holds no prompt"),
    ],
)
def test_bad_files(tmp_path, name, content, settings, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        read_rows(tmp_path / name, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
