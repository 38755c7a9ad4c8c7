"""Words to ids and states: every caption has its own, and what is unknown is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.mini import MiniTextEncoder, WordTokenizer
from bilevel_fast.worlds.mini.world import SCENES, WORDS


@pytest.fixture
def encoder() -> MiniTextEncoder:
    return MiniTextEncoder(WordTokenizer(WORDS))


def test_every_caption_fits_and_has_ids_of_its_own():
    tokenizer = WordTokenizer(WORDS)
    ids = tokenizer(["", *(scene.caption for scene in SCENES)])
    assert ids.shape == (217, 12)
    assert len(ids.unique(dim=0)) == 217
    assert ids.max() < tokenizer.size
    assert ids[0].tolist() == [0, 1] + [2] * 10


def test_case_and_spacing_do_not_matter():
    tokenizer = WordTokenizer(WORDS)
    assert torch.equal(tokenizer(["  A red\tSTAR "]), tokenizer(["a red star"]))


def test_unknown_words_are_named_with_their_neighbours():
    with pytest.raises(UserError, match=r"'a gren sta'.*'gren'; did you mean 'green'.*'sta'; did you mean 'star'"):
        WordTokenizer(WORDS)(["a red star", "a gren sta"])


def test_a_long_prompt_is_refused_with_its_length():
    WordTokenizer(WORDS)(["a " * 10])
    with pytest.raises(UserError, match="11 words; the mini world takes 10"):
        WordTokenizer(WORDS)(["a " * 11])


def test_states_tell_captions_apart_and_do_not_depend_on_the_batch(encoder):
    prompts = ["a red star", "a blue star", ""]
    states = encoder.encode(prompts)
    assert states.shape == (3, encoder.length, encoder.width) == (3, 12, 64)
    assert not states.requires_grad
    assert (states[0] - states[1]).abs().max() > 0.1
    torch.testing.assert_close(states[2:], encoder.encode([""]), rtol=1e-5, atol=1e-5)


def test_every_token_reads_every_other(encoder):
    """The first state depends on the last word: attention is not causal."""
    first = encoder.encode(["a red star", "a red ring"])[:, 0]
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_word_order_is_read(encoder):
    """The end token would be the same if words were a bag."""
    end = encoder.encode(["red star", "star red"])[:, 3]
    assert (end[0] - end[1]).abs().max() > 1e-3


def test_saved_and_loaded_is_the_same(encoder, tmp_path):
    encoder.half().float().save(tmp_path)  # stored in fp16
    loaded = MiniTextEncoder.load(tmp_path)
    assert torch.equal(loaded.encode(["a red star"]), encoder.encode(["a red star"]))
    assert loaded.tokenizer == encoder.tokenizer
    assert not any(p.requires_grad for p in loaded.parameters())
    vocab = json.loads((tmp_path / "tokenizer" / "vocab.json").read_text())["vocab"]
    assert vocab["<bos>"] == 0
    assert len(vocab) == encoder.tokenizer.size


def break_class(folder):
    (folder / "text_encoder" / "config.json").write_text('{"_class_name": "CLIPTextModel"}')


def break_weights(folder):
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    save_file({k: v[:4] if k == "position" else v for k, v in weights.items()}, path)


def break_field(folder):
    (folder / "text_encoder" / "config.json").write_text('{"_class_name": "MiniTextEncoder", "width": 64}')


def break_vocab(folder):
    (folder / "tokenizer" / "vocab.json").write_text(
        '{"_class_name": "WordTokenizer", "length": 12, "vocab": {"a": 0}}'
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_class, "config.json: _class_name is 'CLIPTextModel', wanted 'MiniTextEncoder'"),
        (break_weights, "text_encoder.*size mismatch for position"),
        (break_field, "config.json: 'layers' is missing"),
        (break_vocab, "vocab.json: ids 0 to 2 must be <bos>, <eos>, <pad>"),
    ],
)
def test_a_broken_folder_is_named_in_one_line(encoder, tmp_path, damage, message):
    encoder.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        MiniTextEncoder.load(tmp_path)
    assert "\n" not in str(caught.value)
