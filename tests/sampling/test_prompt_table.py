"""Prompt files as people write them: every command reads the same, and what is ambiguous is refused with its line."""

import json
import os
import re

import pytest

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.pairs import Pair, read_pairs
from bilevel_fast.metrics.prompt_sets import read_prompt_set
from bilevel_fast.sampling.prompts import read_prompts, read_rows

pytestmark = pytest.mark.situation

READERS = {
    "sample": lambda path: [row.prompt for row in read_rows(path)],
    "evaluate": lambda path: read_prompt_set(path).texts,
    "prepare, erase, prune": read_prompts,
}
reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())


def refusal(read, path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@reader
def test_a_comma_without_quotes(tmp_path, reader):
    """A prompt with a comma and no quotes in a .csv: refused with its line, instead of drawn up to the comma."""
    path = tmp_path / "a.csv"
    path.write_text("case_number,prompt\n0,a house\n1,a red star, in the style of monet\n")
    assert refusal(reader, path) == (
        f"prompt file {path}, line 3: found 3 cells, wanted 2 (case_number, prompt); a text that holds a comma wants "
        "quotes"
    )


@reader
def test_too_few_cells(tmp_path, reader):
    """A row of a .csv with fewer cells than the header: refused with its line."""
    path = tmp_path / "a.csv"
    path.write_text("case_number,prompt\n0,a house\n1\n")
    assert refusal(reader, path).endswith("line 3: found 1 cells, wanted 2 (case_number, prompt)")


@reader
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt\na house\n"a red star\na ring\na moon\n', "line 3: a quote that opens here is never closed"),
        ('prompt,x\n"a red star\n1,"blue, sky"\n', "line 2: ',' expected after '\"'"),
    ],
)
def test_a_quote_that_is_not_closed(tmp_path, reader, text, message):
    """A quote that is never closed: refused with the line where it opens, instead of three rows as one prompt."""
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert refusal(reader, path) == f"prompt file {path}, {message}"


@reader
def test_blanks_after_commas(tmp_path, reader):
    """A header and cells with a blank after each comma: read by every command, and quotes behind a blank are quotes."""
    path = tmp_path / "a.csv"
    path.write_text('case_number, prompt\n0, "a red star, by monet"\n\n1, a "blue" house\n')
    assert reader(path) == ["a red star, by monet", 'a "blue" house']


@reader
@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "a.yaml"])
def test_other_suffixes(tmp_path, reader, name):
    """A .tsv, .jsonl or any other file: refused, instead of each line drawn as a prompt."""
    (tmp_path / name).write_text("prompt\ta\n")
    wanted = r"wanted \.csv \(a table with a header\), \.json \(COCO's captions\) or \.txt \(a prompt per line\)"
    assert re.search(rf"{name} ends in '\.\w+'; {wanted}", refusal(reader, tmp_path / name))


@reader
def test_a_pipe(tmp_path, reader):
    """A pipe, which can be read once only, as a prompt file: refused by name, and not waited for."""
    os.mkfifo(tmp_path / "a.csv")
    assert refusal(reader, tmp_path / "a.csv") == f"{tmp_path / 'a.csv'} is no regular file"


@reader
def test_coco_captions(tmp_path, reader):
    """A captions_*.json of COCO: taken by every command; where nothing is drawn, all captions of an image count."""
    path = tmp_path / "captions.json"
    rows = [{"image_id": 3, "caption": text} for text in ("a red star ", "a star in red")]
    path.write_text(json.dumps({"annotations": rows}))
    assert reader(path) == (["a red star", "a star in red"] if reader is read_prompts else ["a star in red"])


@reader
def test_a_column_that_is_there_twice(tmp_path, reader):
    """Two columns of the same name: refused, instead of one of them taken."""
    path = tmp_path / "a.csv"
    path.write_text("prompt,prompt\na,b\n")
    assert refusal(reader, path) == f"prompt file {path} has 2 columns 'prompt'"


def test_adversarial_prompts_are_held_out(tmp_path):
    """A table whose prompts are in `adv_prompt`: read as prompts where no column can be named."""
    path = tmp_path / "mma.csv"
    path.write_text("target_prompt,adv_prompt\nplain,zq! words\n")
    assert read_prompts(path) == read_prompt_set(path).texts == ["zq! words"]


def test_pairs_with_commas(tmp_path):
    """A line of pairs with two commas: refused with its line, instead of a guide that ends at the comma."""
    path = tmp_path / "pairs.csv"
    path.write_text("erase, guide\nby monet,by a painter\nby dali,a painting, in oil\n")
    assert refusal(read_pairs, path) == (
        f"pair file {path}, line 3: found 3 cells, wanted 2 (erase, guide); a text that holds a comma wants quotes"
    )
    path.write_text('erase, guide\nby monet, "a painting, in oil"\n')
    assert read_pairs(path) == (Pair("by monet", "a painting, in oil"),)


def test_rows_without_a_prompt(tmp_path, caplog):
    """Rows without a prompt: left out by every command, and a warning says which."""
    path = tmp_path / "a.csv"
    path.write_text("prompt,x\na,1\n,2\n")
    for read in READERS.values():
        caplog.clear()
        assert read(path) == ["a"]
        assert [record.getMessage() for record in caplog.records] == [
            f"prompt file {path}: lines 3 have no prompt and are left out"
        ]
