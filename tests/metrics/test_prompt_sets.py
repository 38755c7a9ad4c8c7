"""Prompt sets with the columns that their authors publish."""

import pytest

from bilevel_fast.base.errors import UserError
from bilevel_fast.metrics.prompt_sets import read_prompt_set

ARTISTS = """case_number,prompt,evaluation_seed,artist,evaluation_guidance
0,"The Starry Night, by Vincent van Gogh",2219,Vincent van Gogh,7.5
7,"Irises by Vincent van Gogh",4965,Vincent van Gogh,7.5
"""
I2P = (
    "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,sd_safety_percentage,"
    "prompt_toxicity,lexica_url,evaluation_seed,evaluation_guidance,evaluation_width,evaluation_height,"
    "evaluation_model,case_number\n"
    '"a ""quoted"" prompt,\nover two lines","hate, violence",0,43.7,0.0,43.7,0.0,0.1,http://x,2723184019,7.5,512,512,m,0\n'
    "another,sexual,1,1,1,1,1,0.2,http://y,1,7.5,512,512,m,4702\n"
)
MMA = "target_prompt,adv_prompt,sanitized_adv_prompt\nplain,zq! words,words\nplain two,more zq,more\n"
COCO_30K = "image_id,source,prompt,evaluation_seed\n139,coco,a room,99\n285,coco,a bear,100\n"


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_artists(tmp_path):
    found = read_prompt_set(written(tmp_path / "test_Van Gogh.csv", ARTISTS), seeds=True)
    assert found.name == "test_Van Gogh"
    assert found.ids == ["0", "7"]
    assert found.texts == ["The Starry Night, by Vincent van Gogh", "Irises by Vincent van Gogh"]
    assert [row.seed for row in found.rows] == [2219, 4965]
    assert found.groups == ("Vincent van Gogh",) * 2


def test_artists_of_one_file_are_apart_and_one_without_a_name_goes_by_the_file(tmp_path):
    text = "prompt,artist\na,Monet\nb,\nc,Monet\nd,Dali\n"
    assert read_prompt_set(written(tmp_path / "mixed.csv", text)).groups == ("Monet", "mixed", "Monet", "Dali")


def test_a_row_without_a_prompt_moves_no_artist(tmp_path):
    text = "prompt,artist\na,Monet\n,Dali\nc,Klee\n"
    found = read_prompt_set(written(tmp_path / "gap.csv", text))
    assert list(zip(found.ids, found.texts, found.groups, strict=True)) == [("0", "a", "Monet"), ("2", "c", "Klee")]


def test_i2p(tmp_path):
    found = read_prompt_set(written(tmp_path / "unsafe-prompts4703.csv", I2P), seeds=True)
    assert found.ids == ["0", "4702"]
    assert found.texts[0] == 'a "quoted" prompt,\nover two lines'
    assert [row.seed for row in found.rows] == [2723184019, 1]


def test_mma_goes_by_its_adversarial_column(tmp_path):
    found = read_prompt_set(written(tmp_path / "mma.csv", MMA))
    assert found.texts == ["zq! words", "more zq"]
    assert found.ids == ["0", "1"]
    assert [row.seed for row in found.rows] == [None, None]


def test_ring_a_bell_has_a_prompt_per_line(tmp_path):
    found = read_prompt_set(written(tmp_path / "ring.txt", "first, with a comma\n\nsecond\n"))
    assert (found.ids, found.texts, found.groups) == (["0", "1"], ["first, with a comma", "second"], ("ring", "ring"))


def test_coco(tmp_path):
    assert read_prompt_set(written(tmp_path / "coco_30k.csv", COCO_30K), seeds=True).ids == ["139", "285"]
    text = '{"annotations": [{"image_id": 139, "caption": "old"}, {"image_id": 139, "caption": "last"}]}'
    assert read_prompt_set(written(tmp_path / "captions_val2017.json", text)).texts == ["last"]


@pytest.mark.parametrize(
    ("name", "text", "seeds", "message"),
    [
        ("a.csv", "promt,seed\nx,1\n", False, "has no column 'prompt' or 'adv_prompt'; did you mean 'promt'"),
        ("a.csv", "prompt,evaluation_sed\nx,1\n", True, "no column 'evaluation_seed'; did you mean 'evaluation_sed'"),
        ("a.csv", MMA, True, "no column 'evaluation_seed'"),
        ("a.txt", "one\n", True, "only a .csv has columns"),
        ("a.csv", "prompt,evaluation_seed\nx,many\n", False, "'many'"),
        ("a.csv", "case_number,prompt\n3,x\n3,y\n", False, "'3' is there twice"),
        ("a.csv", "", False, "no column 'prompt'"),
        ("a.csv", "prompt\n", False, "holds no prompt"),
        ("a.txt", "\n \n", False, "holds no prompt"),
    ],
)
def test_what_is_missing_gets_one_line(tmp_path, name, text, seeds, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as refusal:
        read_prompt_set(written(tmp_path / name, text), seeds=seeds)
    assert "\n" not in str(refusal.value)
    assert name in str(refusal.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.csv does not exist"):
        read_prompt_set(tmp_path / "nowhere.csv")
