"""Stable Diffusion XL: its text tensor equals what diffusers hands to its UNet; its relatives are refused by name."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, write_json
from bilevel_fast.models.conditioning import unpack
from bilevel_fast.models.family import FAMILIES, family_of
from bilevel_fast.models.text_encoder import indistinct, token_states
from bilevel_fast.models.text_encoder_xl import XlTextEncoder
from sdxl_folder import PROJECTED, SIDE, WIDTHS

PROMPTS = ["a red star", "A blue HOUSE by monet, xyz! " * 30]


@pytest.fixture(scope="module")
def encoder(sdxl) -> XlTextEncoder:
    return XlTextEncoder.load(sdxl)


@pytest.fixture
def broken(sdxl, tmp_path):
    """A copy to break."""
    return shutil.copytree(sdxl, tmp_path / "model")


def change(file, **fields):
    write_json(file, read_json(file) | fields)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_text_tensor_equals_encode_prompt(broken, zeros):
    change(broken / "model_index.json", force_zeros_for_empty_prompt=zeros)
    pipeline = StableDiffusionXLPipeline.from_pretrained(broken)
    wanted = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    sizes = pipeline._get_add_time_ids(
        (SIDE, SIDE), (0, 0), (SIDE, SIDE), dtype=torch.float32, text_encoder_projection_dim=PROJECTED
    )
    encoder = XlTextEncoder.load(broken)
    text, null = encoder.encode(PROMPTS), encoder.encode([""] * 2)
    assert (text.shape, text.dtype, text.requires_grad) == ((2, 78, sum(WIDTHS)), torch.float32, False)
    assert (encoder.width, encoder.length, encoder.pooled) == (sum(WIDTHS), 77, PROJECTED)
    for ours, (states, pooled) in zip((text, null), (wanted[::2], wanted[1::2]), strict=True):
        found, extra = unpack(ours, PROJECTED)
        torch.testing.assert_close(found, states, rtol=0, atol=1e-5)
        torch.testing.assert_close(extra.pooled, pooled, rtol=0, atol=1e-5)
        assert torch.equal(extra.sizes, sizes.expand(2, -1))
    assert unpack(null, PROJECTED)[0].any() != zeros
    assert torch.equal(encoder.encode(["", PROMPTS[0]])[1], encoder.encode(["a", PROMPTS[0]])[1])


def test_masks_and_tokens_have_no_further_rows(encoder):
    mask = encoder.mask(["a red star", ""])
    assert mask.shape == (2, 78)
    assert mask.sum(1).tolist() == [5, 2]
    states = token_states(encoder, ["a red star", ""])
    assert states.shape == (2, 77, sum(WIDTHS))
    assert states[1].any(), "a text without words, where the null prompt is zeros"
    assert indistinct(encoder, ["a red star", "a star"], ["a RED star", "a house"]) == [0]


def test_the_family_is_told_by_its_text_encoders(sdxl):
    family = family_of(sdxl)
    assert family is FAMILIES["stable-diffusion-xl"]
    assert family.text_encoders == ("text_encoder", "text_encoder_2")
    assert FAMILIES["stable-diffusion"].text_encoders == ("text_encoder",)


@pytest.mark.parametrize(("upcast", "wanted"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_vae_computes_in_fp32_where_its_config_says_so(broken, upcast, wanted):
    change(broken / "vae/config.json", force_upcast=upcast)
    vae = FAMILIES["stable-diffusion-xl"].vae(broken, "cpu", torch.bfloat16)
    assert vae.model.dtype == wanted
    assert vae.moments(torch.zeros(1, 3, SIDE, SIDE)).dtype == torch.float32


REFUSED = {
    "a refiner": (
        {"requires_aesthetics_score": True, "text_encoder": [None, None], "tokenizer": [None, None]},
        {},
        "is the refiner of Stable Diffusion XL; supported are",
    ),
    "inpainting": (
        {"_class_name": "StableDiffusionXLInpaintPipeline"},
        {},
        r"is an inpainting model \(StableDiffusionXLInpaintPipeline\)",
    ),
    "turbo": (
        {"scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"]},
        {"timestep_spacing": "trailing"},
        "is a turbo model of Stable Diffusion XL, which is distilled to few steps",
    ),
    "no second text encoder": ({"text_encoder_2": None}, {}, "model_index.json: text_encoder_2 is missing"),
    "no first text encoder": ({"text_encoder": None}, {}, "model_index.json: text_encoder is missing"),
    "another second one": (
        {"text_encoder_2": ["transformers", "T5EncoderModel"]},
        {},
        "text_encoder_2 'T5EncoderModel' is not supported",
    ),
}


@pytest.mark.situation
@pytest.mark.parametrize(("index", "scheduler", "message"), REFUSED.values(), ids=REFUSED)
def test_relatives_of_stable_diffusion_xl(broken, index, scheduler, message):
    """A teacher is a refiner, an inpainting or turbo model, or lacks one text encoder of two: refused as what it is."""
    change(broken / "model_index.json", **index)
    change(broken / "scheduler/scheduler_config.json", **scheduler)
    with pytest.raises(UserError, match=message) as refusal:
        family_of(broken)
    assert "\n" not in str(refusal.value)


@pytest.mark.situation
def test_a_text_encoder_whose_files_are_missing(broken):
    """The index names two text encoders and one has no files: the first one that is missing is named."""
    shutil.rmtree(broken / "text_encoder_2")
    with pytest.raises(UserError, match=r"text_encoder_2/config\.json is missing"):
        XlTextEncoder.load(broken)


def test_towers_that_do_not_fit_each_other(encoder, sdxl, monkeypatch):
    monkeypatch.setattr(encoder.second.model.config, "max_position_embeddings", 60)
    towers = iter([(encoder.first.model, encoder.first.tokenizer), (encoder.second.model, encoder.second.tokenizer)])
    monkeypatch.setattr("bilevel_fast.models.text_encoder_xl.load_clip", lambda *_: next(towers))
    with pytest.raises(UserError, match="text_encoder reads 77 tokens, text_encoder_2 60"):
        XlTextEncoder.load(sdxl)
