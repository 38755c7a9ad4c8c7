"""The names under which weights are published: variants, shards, both, and folders of old and new libraries."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.weights import find_weights, fingerprint

pytestmark = pytest.mark.situation

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


@pytest.fixture
def found(sd, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(sd, tmp_path / "model")


def states(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What is read of each component, in fp32."""
    folder = load_folder(path)
    models = {"unet": folder.unet(), "vae": folder.vae.model, "text_encoder": folder.text_encoder.model}
    return {name: dict(model.state_dict()) for name, model in models.items()}


def assert_same(came, wanted, dtype=torch.float32):
    for part, tensors in wanted.items():
        assert came[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            expected = tensor.to(dtype).float() if tensor.is_floating_point() else tensor
            assert torch.equal(came[part][name], expected), (part, name)


@pytest.fixture(scope="module")
def wanted(sd):
    return states(sd)


@pytest.mark.parametrize(
    ("variant", "dtype", "size"),
    [
        ("bf16", torch.bfloat16, "10GB"),
        ("non_ema", torch.float32, "10GB"),
        ("fp16", torch.float16, "20KB"),
        (None, torch.float32, "20KB"),
    ],
)
def test_every_way_to_save_a_component(found, wanted, variant, dtype, size):
    """Weights as a variant (fp16, bf16, non_ema), in shards, or both, of UNet, VAE and text encoder: all are read."""
    for part, kind in CLASSES.items():
        model = kind.from_pretrained(found / part).to(dtype)
        (found / part / f"{STEMS[part]}.safetensors").unlink()
        model.save_pretrained(found / part, variant=variant, max_shard_size=size)
        assert (len(find_weights(found / part, STEMS[part]).files) > 1) == (size == "20KB"), part
    assert_same(states(found), wanted, dtype)


def rename(folder: Path, *variants: str) -> None:
    """Leave the weights of a component under the names of variants alone."""
    plain = folder / "diffusion_pytorch_model.safetensors"
    for variant in variants:
        shutil.copy(plain, folder / f"diffusion_pytorch_model.{variant}.safetensors")
    plain.unlink()


def test_several_variants(found):
    """Several variants and no file without one: fp16 is read where it is, else the folder is refused, naming them."""
    unet = found / "unet"
    rename(unet, "bf16", "fp16", "non_ema")
    assert [file.name for file in find_weights(unet, STEMS["unet"]).files] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    (unet / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(UserError, match=r"unet has weights of the variants bf16, non_ema and none without a variant"):
        load_folder(found)


def test_shards_without_their_list(found):
    """Shards whose index was not downloaded: the index is named, not a file that nobody published."""
    model = UNet2DConditionModel.from_pretrained(found / "unet")
    (found / "unet/diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(found / "unet", max_shard_size="20KB")
    (found / "unet/diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"model-00001-of-.*, and diffusion_pytorch_model.safetensors.index.json"):
        load_folder(found)


def test_shards_as_diffusers_named_them_once(found, wanted):
    """Shards of a variant as diffusers named them before 0.32: the UNet's are read."""
    folder, stem = found / "unet", "diffusion_pytorch_model"
    UNet2DConditionModel.from_pretrained(folder).save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    (folder / f"{stem}.safetensors").unlink()
    (folder / f"{stem}.safetensors.index.fp16.json").rename(folder / f"{stem}.safetensors.fp16.index.json")
    assert_same(states(found), wanted)


def test_a_sharded_copy_beside_the_weights(found):
    """A sharded half-precision copy laid beside the VAE: caches made before and after are of the same VAE."""
    before = fingerprint(found / "vae")
    vae = AutoencoderKL.from_pretrained(found / "vae")
    vae.half().save_pretrained(found / "vae", variant="fp16", max_shard_size="20KB")
    assert len(list((found / "vae").glob("*.fp16-*.safetensors"))) > 1
    assert fingerprint(found / "vae") == before


def test_a_folder_of_an_old_library(found, wanted):
    """Configs as the first diffusers wrote them, and its names of a VAE's attention: read to the same bits."""
    keep = {
        "unet": {"attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types", "in_channels",
                 "layers_per_block", "norm_num_groups", "out_channels", "sample_size", "up_block_types",
                 "use_linear_projection"},
        "vae": {"block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
                "norm_num_groups", "out_channels", "sample_size", "up_block_types"},
    }  # fmt: skip
    for part, fields in keep.items():
        config = found / part / "config.json"
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k in fields}))
    file = found / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(file).items():
        for new, past in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{past}.")
        renamed[name] = tensor
    save_file(renamed, file)
    assert "encoder.mid_block.attentions.0.query.weight" in renamed
    assert_same(states(found), wanted)


def test_fields_of_a_newer_library(found, wanted):
    """Configs with fields that the installed libraries do not know: read to the same bits."""
    for part in CLASSES:
        config = found / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"of_tomorrow": [1, None]}))
    assert_same(states(found), wanted)
