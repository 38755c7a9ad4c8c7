"""Sizes and signs in configs: what nobody can build is refused at once, by file, field and value."""

import json
import time

import pytest

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, write_json
from bilevel_fast.models.architecture import SD21, UNetConfig
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.mini import MiniTextEncoder, PixelUnshuffleVAE
from mini_folder import make_mini_folder

UNET = [
    ("layers_per_block", 10**9, "layers_per_block is 1000000000, wanted a whole number from 1 to 32"),
    ("layers_per_block", -1, "layers_per_block is -1, wanted"),
    ("layers_per_block", [2, 2, 2, 2], r"layers_per_block is \[2, 2, 2, 2\], wanted a whole number"),
    ("sample_size", -16, "sample_size is -16, wanted"),
    ("sample_size", [8, 12], r"sample_size is \[8, 12\], wanted a whole number"),
    ("sample_size", 10**6, "sample_size is 1000000, wanted"),
    ("norm_num_groups", 0, "norm_num_groups is 0, wanted"),
    ("norm_num_groups", None, "norm_num_groups is None, wanted"),
    ("in_channels", float("inf"), "in_channels is inf, wanted"),
    ("in_channels", float("nan"), "in_channels is nan, wanted"),
    ("out_channels", 4.5, "out_channels is 4.5, wanted"),
    ("in_channels", True, "in_channels is True, wanted"),
    ("attention_head_dim", 0, "attention_head_dim is 0, wanted"),
    ("attention_head_dim", [5, 10, 20, -20], "attention_head_dim is -20, wanted"),
    ("attention_head_dim", None, "attention_head_dim is None, wanted"),
    ("num_attention_heads", 0, "num_attention_heads is 0, wanted a whole number from 1 to 65536"),
    ("attention_head_dim", "DELETE", "field 'attention_head_dim' is missing"),
    ("block_out_channels", [], r"block_out_channels is \[\], wanted a list of 1 to 16"),
    ("block_out_channels", 320, "block_out_channels is 320, wanted a list"),
    ("block_out_channels", [320] * 1000, "wanted a list of 1 to 16"),
    ("block_out_channels", [320, 640, 1280, 10**12], "block_out_channels is 1000000000000, wanted"),
    ("block_out_channels", [320, "640", 1280, 1280], "block_out_channels is '640', wanted a whole number"),
    ("cross_attention_dim", [32, 32], r"cross_attention_dim is \[32, 32\], wanted"),
    ("cross_attention_dim", 10**30, "cross_attention_dim is 1000000000000000000000000000000, wanted"),
    ("norm_eps", float("nan"), "norm_eps is nan, wanted a number > 0 and < 1"),
    ("norm_eps", 0, "norm_eps is 0, wanted"),
    ("norm_eps", "1e-5", "norm_eps is '1e-5', wanted"),
    ("down_block_types", 3, r"down_block_types is 3, wanted a list of \('CrossAttnDownBlock2D', 'DownBlock2D'\)"),
    ("down_block_types", None, "down_block_types is None, wanted a list of"),
]


@pytest.mark.situation
@pytest.mark.parametrize(("field", "value", "message"), UNET, ids=[f"{field} {value}"[:40] for field, value, _ in UNET])
def test_a_unet_that_cannot_be(tmp_path, field, value, message):
    """A UNet's config has a size that is negative, infinite, a list or beyond all sense: refused at once."""
    fields = SD21.to_dict() | {field: value}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v != "DELETE"}))
    start = time.perf_counter()
    with pytest.raises(UserError, match=message) as refusal:
        UNetConfig.load(tmp_path)
    assert time.perf_counter() - start < 1
    assert str(refusal.value).startswith(str(tmp_path / "config.json"))
    assert len(str(refusal.value)) < 400


def test_what_is_good_stays_good(tmp_path):
    """One number for all levels, numbers that JSON wrote as 4.0, and the name that newer releases give to heads."""
    write_json(tmp_path / "config.json", SD21.to_dict() | {"in_channels": 4.0, "num_attention_heads": None})
    assert UNetConfig.load(tmp_path) == SD21
    fields = SD21.to_dict() | {"num_attention_heads": [5, 10, 20, 20], "attention_head_dim": 8}
    write_json(tmp_path / "config.json", fields)
    assert UNetConfig.load(tmp_path) == SD21
    write_json(tmp_path / "config.json", SD21.to_dict() | {"attention_head_dim": 5})
    assert UNetConfig.load(tmp_path).num_heads == (5, 5, 5, 5)


@pytest.mark.situation
@pytest.mark.parametrize(
    ("file", "field", "value", "message"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**12, "num_train_timesteps is 1000000000000"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", -5, "num_train_timesteps is -5"),
        ("text_encoder/config.json", "width", 10**9, "width is 1000000000, wanted"),
        ("text_encoder/config.json", "width", 0, "width is 0, wanted"),
        ("text_encoder/config.json", "layers", -2, "layers is -2, wanted"),
        ("text_encoder/config.json", "heads", 0, "heads is 0, wanted"),
        ("text_encoder/config.json", "heads", 3, "width 64 is no multiple of heads 3"),
        ("tokenizer/vocab.json", "length", 10**12, "length is 1000000000000, wanted"),
        ("tokenizer/vocab.json", "length", [3], r"length is \[3\], wanted"),
        ("vae/config.json", "block", 10**9, "block is 1000000000, wanted"),
        ("vae/config.json", "scaling_factor", 0, "must be finite, the first not 0"),
        ("vae/config.json", "shift_factor", float("inf"), "must be finite"),
    ],
)
def test_a_mini_model_that_cannot_be(tmp_path, file, field, value, message):
    """A config of the built-in family has such a size: refused in one line, and no memory is made room for."""
    model = make_mini_folder(tmp_path / "model")
    write_json(model / file, read_json(model / file) | {field: value})

    def read():
        Schedule.load(model)
        MiniTextEncoder.load(model)
        PixelUnshuffleVAE.load(model / "vae")

    with pytest.raises(UserError, match=message) as refusal:
        read()
    assert str(model / file) in str(refusal.value)
