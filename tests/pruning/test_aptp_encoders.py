"""Prompt encoders: against the same mean computed one caption at a time, and folders that are not what they say."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.mini import MiniTextEncoder
from bilevel_fast.models.text_encoder import ClipTextEncoder
from bilevel_fast.pruning.aptp.encoders import MpnetPrompts, TextPrompts, centred, encode_all, open_encoder
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.world import SCENES

CAPTIONS = ["a red star", "an orange ring in the style of line art", "", "a blue cross"]
ALL = [scene.caption for scene in SCENES]


@pytest.fixture(scope="module")
def text_encoder():
    return MiniTextEncoder.load(TEACHER)


# --- the model's own text encoder ---


def test_text_is_the_mean_over_words(text_encoder):
    """Begin, words and end, and no padding: the states of a prompt, cut where it ends."""
    centre = torch.linspace(-1, 1, 64)
    encoder = TextPrompts(text_encoder, centre)
    assert encoder.width == 64
    wanted = []
    for caption in CAPTIONS:
        length = len(caption.split()) + 2
        assert text_encoder.mask([caption]).sum() == length
        wanted.append(text_encoder.encode([caption])[0, :length].mean(dim=0) - centre)
    found = encoder.encode(CAPTIONS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-5)
    everything = text_encoder.encode(CAPTIONS).mean(dim=1) - centre
    assert (found - everything).abs().amax(dim=1).gt(1e-3).all()


class Untold:
    """A text encoder that does not tell words from padding."""

    width, length = 3, 2

    def encode(self, prompts):
        return torch.tensor([[[len(p), 1.0, 0.0], [0.0, 3.0, 8.0]] for p in prompts])


def test_text_without_a_mask_is_the_mean_over_all_tokens():
    found = TextPrompts(Untold(), torch.tensor([0.0, 1.0, 1.0])).encode(["ab", "abcd"])
    assert found.tolist() == [[1.0, 1.0, 3.0], [2.0, 1.0, 3.0]]


def test_centre_is_the_mean_of_the_prompts(text_encoder):
    """Around it prompts point everywhere; before, to one side."""
    plain = TextPrompts(text_encoder)
    encoder, embeddings = centred(plain, ALL)
    raw = encode_all(plain, ALL)
    torch.testing.assert_close(encoder.centre, raw.double().mean(dim=0).float())
    assert torch.equal(embeddings, raw - encoder.centre)
    torch.testing.assert_close(encode_all(encoder, ALL), embeddings)

    def mean_cosine(x):
        x = F.normalize(x, dim=1)
        return ((x @ x.T).sum() - len(x)) / (len(x) * (len(x) - 1))

    assert mean_cosine(raw) > 0.4
    assert abs(mean_cosine(embeddings)) < 0.05


def test_clip_tells_words_from_padding(tmp_path):
    """By Stable Diffusion's kind of tokenizer, whose padding is a word, too. A prompt that is cut has none."""
    pytest.importorskip("transformers")
    from sd_folder import _tokenizer

    class Model:
        """Its states are the numbers of their tokens."""

        device = "cpu"
        config = SimpleNamespace(hidden_size=1, max_position_embeddings=77)

        def __call__(self, tokens):
            return SimpleNamespace(last_hidden_state=tokens.float()[..., None])

    clip = ClipTextEncoder(Model(), _tokenizer(tmp_path))
    prompts = ["a red star", "", "house ! " * 90]
    assert clip.mask(prompts).sum(dim=1).tolist() == [5, 2, 77]
    states = clip.encode(prompts)
    wanted = [states[0, :5].mean(dim=0), states[1, :2].mean(dim=0), states[2].mean(dim=0)]
    torch.testing.assert_close(TextPrompts(clip).encode(prompts), torch.stack(wanted))


def test_centre_of_another_encoder_is_refused(text_encoder):
    with pytest.raises(UserError, match=r"centre of the prompts has shape \(9,\), this text encoder wants \(64,\)"):
        TextPrompts(text_encoder, torch.zeros(9))


# --- a sentence encoder ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    from mpnet_folder import make_mpnet_folder

    return make_mpnet_folder(tmp_path_factory.mktemp("mpnet") / "tiny-mpnet")


@pytest.fixture
def broken(folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(folder, tmp_path / "broken")


def ids(caption):
    """By the vocabulary of the test's folder: whole words, an unknown one, the plural s."""
    from mpnet_folder import LENGTH, WORDS

    pieces: list[int] = []
    for word in caption.lower().split():
        if word in WORDS:
            pieces.append(4 + WORDS.index(word))
        elif word[:-1] in WORDS and word.endswith("s"):
            pieces += [4 + WORDS.index(word[:-1]), 4 + len(WORDS)]
        else:
            pieces.append(5 + len(WORDS))
    return [0, *pieces[: LENGTH - 2], 2]


def test_mpnet_is_the_mean_over_words(folder):
    """One caption at a time, without padding, through transformers itself. Long captions are cut, length is left."""
    from transformers import MPNetModel

    from mpnet_folder import WIDTH

    captions = [
        "a red star",
        "A photo of Stars",
        "the ring",
        "a unicorn in the style of waves in the house of a star",
        "",
    ]
    model = MPNetModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        states = [model(input_ids=torch.tensor([ids(c)])).last_hidden_state[0] for c in captions]
    encoder = MpnetPrompts.load(folder)
    found = encoder.encode(captions)
    assert encoder.width == WIDTH
    assert found.shape == (5, WIDTH)
    assert [len(s) for s in states] == [5, 7, 4, 9, 2]
    torch.testing.assert_close(found, torch.stack([s.mean(dim=0) for s in states]), rtol=1e-4, atol=1e-5)
    assert (found.norm(dim=1) - 1).abs().min() > 0.1
    assert centred(encoder, captions)[0] is encoder
    assert encoder.centre.eq(0).all()


def refused(folder):
    with pytest.raises(UserError) as error:
        MpnetPrompts.load(folder)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("modes", "told"),
    [
        ({"pooling_mode_cls_token": True}, "['cls_token']"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "['mean_tokens', 'max_tokens']"),
        ({}, "[]"),
        ({"pooling_mode": "max"}, "['max']"),
    ],
)
def test_other_pooling_is_refused(broken, modes, told):
    from mpnet_folder import write_pooling

    write_pooling(broken, **modes)
    wanted = f"1_Pooling/config.json: pooling is {told}, wanted the mean over all tokens and nothing else"
    assert refused(broken).endswith(wanted)


def test_pooling_as_newer_releases_write_it(broken):
    from mpnet_folder import write_pooling

    write_pooling(broken, pooling_mode="mean")
    assert MpnetPrompts.load(broken).encode(["a star"]).shape == (1, 24)


def test_modules_that_follow_are_refused(broken):
    """A layer on top would be left out without a word."""
    path = broken / "modules.json"
    modules = json.loads(path.read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    path.write_text(json.dumps(modules))
    assert "lists Transformer, Pooling, Dense, wanted Transformer, then Pooling in 1_Pooling" in refused(broken)
    path.write_text("{}")
    assert refused(broken).endswith("modules.json lists nothing, wanted Transformer, then Pooling in 1_Pooling")
    path.write_text("[1]")
    assert refused(broken).endswith("modules.json is not a list of modules with a type and a path")


def test_other_folders_are_refused(broken, tmp_path):
    assert refused(tmp_path / "none").endswith("none is no folder; wanted one in the layout of all-mpnet-base-v2")
    weights = load_file(broken / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in weights.items() if k != name}, broken / "model.safetensors")
    assert refused(broken).endswith(f"1 weight ({name}) missing")
    save_file(weights | {name: torch.zeros(2, 2)}, broken / "model.safetensors")
    assert f"{name} has shape [2, 2], the config wants [24, 48]" in refused(broken)
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    assert "pickle weights are not loaded" in refused(broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert refused(broken).endswith("config.json: model_type is 'bert', wanted 'mpnet'")


# --- found again ---


def test_the_same_encoder_is_found_again(folder, text_encoder, tmp_path):
    """By its fingerprint wherever it lies, and no other."""
    told = json.loads(json.dumps(MpnetPrompts.load(folder).describe()))
    centre, captions = torch.zeros(24), ["a red star"]
    moved = shutil.copytree(folder, tmp_path / "moved")
    wanted = MpnetPrompts.load(folder).encode(captions)
    for place in (None, moved):
        assert torch.equal(open_encoder(told, centre, None, place, "cpu").encode(captions), wanted)
    lost = told | {"folder": str(tmp_path / "gone")}
    with pytest.raises(UserError, match=r"is not in .*gone any more; --prompt-encoder says where it is now"):
        open_encoder(lost, centre, None, None, "cpu")
    weights = load_file(moved / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][0] += 1
    save_file(weights, moved / "model.safetensors")
    with pytest.raises(UserError, match="moved is another prompt encoder"):
        open_encoder(told, centre, None, moved, "cpu")

    centre = torch.arange(64.0)
    found = open_encoder({"kind": "text"}, centre, text_encoder, None, "cpu").encode(captions)
    assert torch.equal(found, TextPrompts(text_encoder, centre).encode(captions))
    with pytest.raises(UserError, match="trained with the model's own text encoder"):
        open_encoder({"kind": "text"}, centre, text_encoder, folder, "cpu")
    with pytest.raises(UserError, match=r"'clap'.* is unknown"):
        open_encoder({"kind": "clap"}, centre, text_encoder, None, "cpu")
