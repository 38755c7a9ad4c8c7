"""Pairs of texts: how they are read, put into sentences, and refused."""

import pytest

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.pairs import Frame, Pair, check, framed, last_words, make_pairs, read_pairs
from bilevel_fast.models.mini import MiniTextEncoder, WordTokenizer
from bilevel_fast.worlds.mini.world import WORDS


@pytest.fixture(scope="module")
def encoder():
    return MiniTextEncoder(WordTokenizer(WORDS), width=16)


def test_one_guide_serves_all_and_lists_go_together():
    assert make_pairs(["waves", "mosaic"]) == (Pair("waves", "", 1.0), Pair("mosaic", "", 1.0))
    assert make_pairs(["waves", "mosaic"], ["art"]) == (Pair("waves", "art"), Pair("mosaic", "art"))
    assert make_pairs(["waves", "mosaic"], ["a", "b"], [1, 3]) == (Pair("waves", "a", 1), Pair("mosaic", "b", 3))


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([],), "there is nothing to erase; --erase or --pairs names texts"),
        ((["a", "b", "c"], ["x", "y"]), "2 guides came for 3 texts to erase; wanted one each, or one for all"),
        ((["a"], ["x", "y"]), "2 guides came for 1 texts to erase; wanted one each, or one for all"),
        ((["a", "b"], ["x"], [1.0]), "1 weights came for 2 texts to erase; wanted one each"),
        (([" "],), "erase ' ' is empty; wanted a text"),
        ((["a"], ["x"], [0.0]), "erase 'a' has weight 0.0; wanted a positive number"),
        ((["a"], ["x"], [float("nan")]), "erase 'a' has weight nan; wanted a positive number"),
    ],
)
def test_lists_that_do_not_fit(lists, message):
    with pytest.raises(UserError) as error:
        make_pairs(*lists)
    assert str(error.value) == message


def test_a_file_of_pairs(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('\ufeffguide,erase,weight,note\n,"by X, late",2.5,x\nart,by Y,,\n', encoding="utf-8")
    assert read_pairs(path) == (Pair("by X, late", "", 2.5), Pair("by Y", "art", 1.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"erased,guide\nx,y\n", "has no column 'erase'; did you mean 'erased'?"),
        (b"erase\nx\n", "has no column 'guide'"),
        (b"", "has no column 'erase'"),
        (b"erase,guide\n", "holds no pair"),
        (b"erase,guide\nx,y\n ,y\n", "line 3: erase '' is empty; wanted a text"),
        (b"erase,guide,weight\nx,y,much\n", "line 2: weight 'much' is no number"),
        (b"erase,guide,weight\nx,y,-1\n", "line 2: erase 'x' has weight -1.0; wanted a positive number"),
        (b"erase,guide\n\xff,y\n", "is not UTF-8"),
    ],
)
def test_a_file_that_is_none_of_pairs(content, message, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"pair file {path}")
    assert message in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        read_pairs(tmp_path / "nowhere.csv")


def test_sentences():
    pairs = [Pair("by X", "by a painter", 2.0), Pair("by Y")]
    frames = [Frame.of("a star"), Frame.of("painting {}, oil"), Frame("a {} man", "photo of a {} man")]
    assert framed(pairs, frames) == (
        Pair("a star by X", "a star by a painter", 2.0),
        Pair("painting by X, oil", "painting by a painter, oil", 2.0),
        Pair("a by X man", "photo of a by a painter man", 2.0),
        Pair("a star by Y", "a star"),
        Pair("painting by Y, oil", "painting, oil"),
        Pair("a by Y man", "photo of a man"),
    )


def test_last_words(encoder):
    assert last_words(encoder, ["", "star", "a red star", "a a a a a a a a a a"]) == [0, 1, 3, 10]


@pytest.mark.parametrize(
    ("pairs", "preserve", "message"),
    [
        ([Pair("a Red  star", "a red star")], [], "has itself as its guide"),
        ([Pair("a star"), Pair("A star", "a ring")], [], "erase 'A star' is there twice"),
        ([Pair("a star")], ["a ring", "a  STAR"], "'a star' is to be erased and preserved"),
    ],
)
def test_contradictions(pairs, preserve, message, encoder):
    with pytest.raises(UserError, match=message):
        check(pairs, preserve, encoder)


def test_a_text_of_no_tokens(encoder, monkeypatch):
    """A byte-pair tokenizer has such texts; this one would refuse the word."""
    ids = {"star": [0, 5, 1] + [2] * 9, "zz": [0, 1] + [2] * 10, "": [0, 1] + [2] * 10}
    monkeypatch.setattr(WordTokenizer, "_ids", lambda _, text: ids[text])
    check([Pair("star")], [], encoder)
    with pytest.raises(UserError, match="erase 'zz' has no tokens for the text encoder"):
        check([Pair("star"), Pair("zz", "star")], [], encoder)
