"""The concept bank: anchors, prompt files, and latents that are the teacher's samples, killed run or not."""

import shutil

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data import bank
from bilevel_fast.data.bank import Concept, anchor_for, make_bank, prompts_for, without
from bilevel_fast.data.cache import PARTIAL, Cache
from bilevel_fast.models.folder import load_folder
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.sampling.prompts import read_prompts
from bilevel_fast.sampling.samplers import guided, sample
from mini_folder import make_mini_folder

DOTS = Concept("in the style of pointillism")


@pytest.mark.parametrize(
    ("caption", "concept", "anchor"),
    [
        ("a red star in the style of pointillism", DOTS, "a red star"),
        ("A red star, In The  Style\tof Pointillism.", DOTS, "A red star."),
        ("in the style of pointillism, a red star", DOTS, "a red star"),
        ("a red star in the style of pointillism, at night", DOTS, "a red star, at night"),
        ("a red star, in the style of pointillism at night", DOTS, "a red star, at night"),
        ("a red star, in the style of pointillism, at night", DOTS, "a red star, at night"),
        ("in the style of pointillism", DOTS, ""),
        ("a star by X and a moon by X", Concept("by X"), "a star and a moon"),
        ("a star by X, by X", Concept("by X"), "a star"),
        ("a naked man , laughing .", Concept("naked"), "a man , laughing ."),
        ("a naked man", Concept("naked", "dressed"), "a dressed man"),
        ("a star by X, at night", Concept("by X", "by a painter"), "a star by a painter, at night"),
        ("a star by M. (C) [x]", Concept("by M. (C)"), "a star [x]"),
        (r"a star by X", Concept("by X", r"\1"), r"a star \1"),
        ("梵高风格 的星夜", Concept("梵高风格"), "的星夜"),
    ],
)
def test_an_anchor_is_the_caption_without_the_concept(caption, concept, anchor):
    assert anchor_for(caption, concept) == anchor


@pytest.mark.parametrize(
    "caption", ["a red star", "a star in the style of pointillisms", "a star xin the style of pointillism", ""]
)
def test_a_caption_without_the_concept_has_no_anchor(caption):
    with pytest.raises(UserError, match="does not hold the concept's phrase 'in the style of pointillism'"):
        anchor_for(caption, DOTS)


def test_an_empty_phrase_is_refused():
    with pytest.raises(UserError, match="phrase is empty"):
        Concept("  ")


def test_prompts_and_anchors_are_each_others_inverse():
    subjects = ["a red star", "a blue house"]
    prompts = prompts_for(subjects, DOTS)
    assert prompts == [f"{subject} in the style of pointillism" for subject in subjects]
    assert [anchor_for(prompt, DOTS) for prompt in prompts] == subjects
    assert prompts_for(["a photo of a {} man"], Concept("naked")) == ["a photo of a naked man"]


def test_held_out_prompts_are_left_out_whatever_their_case():
    assert without(["a star", "A  House", "a moon"], ["a house", "a sun"]) == ["a star", "a moon"]
    with pytest.raises(UserError, match="every prompt of the concept bank is held out"):
        without(["a star"], ["A star"])


def test_prompt_files(tmp_path):
    lines, table = tmp_path / "prompts.txt", tmp_path / "prompts.CSV"
    lines.write_bytes("a star, by X\r\n\n  a house\u2028by X \n".encode())
    assert read_prompts(lines) == ["a star, by X", "a house\u2028by X"]
    table.write_text('\ufeffcase_number,prompt,artist\n0,"a star, by X",X\n1,,X\n2,"two\nlines",X\n', encoding="utf-8")
    assert read_prompts(table) == ["a star, by X", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "a.txt does not exist"),
        ("a.txt", b"\n \n", "a.txt holds no prompt"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8"),
        ("a.csv", b"case,prompts\n0,a star\n", "no column 'prompt' or 'adv_prompt'; did you mean 'prompts'"),
        ("a.csv", b"", "no column 'prompt'"),
        ("a.csv", b"prompt\n\n", "a.csv holds no prompt"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)


SUBJECTS = ["a red star", "a blue square", "a green circle"]
PROMPTS = prompts_for(SUBJECTS, DOTS)
RECIPE = {"count": 11, "seed": 5, "guidance": 3.0, "steps": 3, "batch": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_folder(make_mini_folder(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher):
    return make_bank(teacher, PROMPTS, SUBJECTS, out=tmp_path_factory.mktemp("bank"), **RECIPE)


def test_the_bank_holds_what_the_teacher_draws(teacher, whole):
    cache = whole
    assert (len(cache), cache.index.kind, cache.latent_shape) == (11, "concepts", (12, 8, 8))
    assert [cache.captions(i) for i in range(4)] == [(PROMPTS[i % 3],) for i in range(4)]
    assert [cache.anchor(i) for i in range(4)] == [SUBJECTS[i % 3] for i in range(4)]
    cache.verify()
    cache.check_model(teacher.config, teacher.vae_fingerprint)

    unet, index = teacher.unet(), [4, 7]  # prompts 1 and 1, alone
    text = teacher.text_encoder.encode([PROMPTS[1]] * 2)
    predict = guided(unet, text, teacher.text_encoder.encode([""]), 3.0)
    x_T = normal(5, Stream.BANK, index, (12, 8, 8))
    expected = sample(predict, x_T, teacher.schedule, steps=3, method="pndm")
    # fp16 storage rounds to 11 bits.
    mean, logvar = cache.moments(index, [0, 0]).chunk(2, dim=1)
    torch.testing.assert_close(mean, expected, rtol=2**-11, atol=1e-4)
    assert (logvar == -30).all()


@pytest.mark.parametrize("killed_at", [2, 8, 9, 10])
def test_a_killed_bank_goes_on_to_the_same_bits(tmp_path, teacher, whole, killed_at):
    """Shards hold 8 samples, so a kill at 10 draws two again and one at 8 loses nothing."""

    class Killed(Exception):
        pass

    def kill(done, _):
        if done >= killed_at:
            raise Killed

    with pytest.raises(Killed):
        make_bank(teacher, PROMPTS, SUBJECTS, out=tmp_path / "killed", progress=kill, **RECIPE)
    calls = []
    resumed = make_bank(
        teacher, PROMPTS, SUBJECTS, out=tmp_path / "killed", progress=lambda *p: calls.append(p), **RECIPE
    )
    assert calls == [(done, 11) for done in (2, 4, 6, 8, 10, 11) if done > (8 if killed_at >= 8 else 0)]
    assert resumed.index == whole.index  # with the checksums of all shards


def test_a_finished_bank_is_not_drawn_again(teacher, whole, monkeypatch):
    monkeypatch.setattr(bank, "generate", None)
    assert make_bank(teacher, PROMPTS, SUBJECTS, out=whole.path, **RECIPE).index == whole.index
    for change in ({"seed": 6}, {"guidance": 7.5}, {"count": 12}):
        name, value = next(iter(change.items()))
        with pytest.raises(UserError, match=f"made with recipe.{name} {RECIPE[name]}, not {value}"):
            make_bank(teacher, PROMPTS, SUBJECTS, out=whole.path, **RECIPE | change)
    with pytest.raises(UserError, match=r"recipe\.prompts"):
        make_bank(teacher, PROMPTS[:1], SUBJECTS[:1], out=whole.path, **RECIPE)


def test_ranks_read_a_finished_bank_at_a_time(tmp_path, teacher, whole, monkeypatch):
    """Each of them asks for it when the first one has made it: none may find that another has it in hand."""
    path = shutil.copytree(whole.path, tmp_path / "bank")
    with monkeypatch.context() as patch:
        patch.setattr(bank, "at_work", None)
        assert make_bank(teacher, PROMPTS, SUBJECTS, out=path, **RECIPE).index == whole.index
        with pytest.raises(UserError, match="seed"):
            make_bank(teacher, PROMPTS, SUBJECTS, out=path, **RECIPE | {"seed": 99})
    (path / PARTIAL).write_text("{}")  # of one that was killed before it could clear away
    assert make_bank(teacher, PROMPTS, SUBJECTS, out=path, **RECIPE).index == whole.index
    assert not (path / PARTIAL).exists()


def test_another_teacher_is_another_recipe(tmp_path, teacher):
    make_bank(teacher, PROMPTS, SUBJECTS, out=tmp_path / "bank", **RECIPE | {"count": 1})
    other = load_folder(make_mini_folder(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match=r"recipe\.unet"):
        make_bank(other, PROMPTS, SUBJECTS, out=tmp_path / "bank", **RECIPE | {"count": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchors": ["a star"]}, "1 anchors came for 3 prompts"),
        ({"prompts": [], "anchors": []}, "0 anchors came for 0 prompts"),
        ({"count": 0}, "count is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"size": 6}, "latent size is 6; it must be a multiple of the UNet's stride 4"),
        ({"prompts": ["a red stra"] * 3}, "no word for 'stra'; did you mean"),
    ],
)
def test_bad_banks(tmp_path, teacher, change, message):
    with pytest.raises(UserError, match=message):
        make_bank(teacher, **{"prompts": PROMPTS, "anchors": SUBJECTS, "out": tmp_path / "bank", **RECIPE, **change})
    with pytest.raises(UserError):
        Cache.open(tmp_path / "bank")
