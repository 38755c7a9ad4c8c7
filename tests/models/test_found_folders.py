"""Model folders as they are found in the wild: what is read, what is written of them, and what is refused."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from bilevel_fast import erase, prune, sample
from bilevel_fast.base import files
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.bank import make_bank
from bilevel_fast.data.cache import check_latents
from bilevel_fast.erasing.pairs import Pair, check
from bilevel_fast.models import folder as folders
from bilevel_fast.models.folder import load_folder, load_unet, save_student
from bilevel_fast.models.text_encoder import indistinct
from bilevel_fast.models.weights import _digest, fingerprint, same_component
from bilevel_fast.runs.session import _check_anchors
from mini_folder import make_mini_folder
from sd_folder import make_sd_folder

pytestmark = pytest.mark.situation

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
LONG = "a photo of a house in the style of the red star " * 8


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    return make_sd_folder(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def found(sd, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(sd, tmp_path / "model")


def change(path: Path, name: str, value: float) -> None:
    weights = load_file(path)
    weights[name].view(-1)[-1] = value
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("file", "name"),
    [
        (UNET, "mid_block.resnets.0.conv1.weight"),
        (TEXT, "text_model.embeddings.token_embedding.weight"),
        (VAE, "decoder.conv_in.weight"),
    ],
)
def test_a_number_that_is_none(found, file, name, value):
    """One weight of any component is NaN or infinite: refused where it is read, with file and tensor."""
    change(found / file, name, value)
    with pytest.raises(UserError, match=rf"{file}: {name} is not finite"):
        load_folder(found).unet(mapped=True)


def test_a_number_that_is_none_ends_every_command(tmp_path, command):
    """One NaN in a UNet: `prune`, `erase` and `sample` refuse it, and write nothing."""
    model = make_mini_folder(tmp_path / "model")
    name = "up_blocks.2.resnets.0.conv1.bias"
    change(model / UNET, name, float("nan"))
    out = tmp_path / "out"
    for main, arguments in {
        prune.main: ["uniform", "--teacher", model, "--out", out],
        erase.main: ["uce", "--erase", "star", "--model", model, "--out", out],
        sample.main: ["--prompts", "a red star", "--model", model, "--out", out.with_suffix(".png"), "--device", "cpu"],
    }.items():
        code, _, err = command(main, *arguments)
        assert code == 2
        assert err.endswith(f"error: {model / UNET}: {name} is not finite: its numbers go from nan to nan\n")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_empty_tensor(found):
    """A text encoder with an empty tensor: one line with file and tensor, not another library's table."""
    weights = load_file(found / TEXT)
    weights["text_model.final_layer_norm.bias"] = torch.empty(0)
    save_file(weights, found / TEXT, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{TEXT}: text_model.final_layer_norm.bias is empty: its shape is \[0\]$"):
        load_folder(found)


def test_a_concept_behind_the_last_token(sd, tmp_path):
    """A concept beyond the 77th token: a bank of it and an erasure are refused, as nothing would be suppressed."""
    folder = load_folder(sd)
    encoder = folder.text_encoder
    assert indistinct(encoder, ["a red star", LONG + "by monet", "a house", LONG], ["a star", LONG, "a star", ""]) == [
        1
    ]
    with pytest.raises(UserError, match=r"and its anchor '.*' are the same to the text encoder, and so are 1 of 2 in"):
        make_bank(folder, ["a star by monet", LONG + "by monet"], ["a star", LONG], 2, 0, 7.5, 2, 2, tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    with pytest.raises(UserError, match=r"are the same to the text encoder; wanted texts that differ within its 77"):
        check([Pair("a star", "a house"), Pair(LONG + "by monet", LONG)], (), encoder)


class Bank:
    """Captions and anchors."""

    path = Path("bank")

    def __init__(self, *pairs: tuple[str, str]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def captions(self, index: int) -> tuple[str, ...]:
        return (self.pairs[index][0],)

    def anchor(self, index: int) -> str:
        return self.pairs[index][1]


def test_a_bank_of_the_past_with_concepts_behind_the_last_token(sd, caplog):
    """A bank that was made so: `train` warns of the captions by which nothing is suppressed; if it is all, it stops."""
    encoder, bad = load_folder(sd).text_encoder, (LONG + "by monet", LONG)
    _check_anchors(Bank(("a star by monet", "a star")), encoder)
    assert not caplog.messages
    _check_anchors(Bank(bad, ("a star by monet", "a star"), bad), encoder)
    assert caplog.messages[0].startswith(
        "1 of 2 captions of bank are to the text encoder the same as their anchors, su"
    )
    with pytest.raises(UserError, match=r"1 of 1 captions of bank .*: the concept is behind its 77 tokens"):
        _check_anchors(Bank(bad), encoder)


def test_fields_that_we_do_not_read(found, tmp_path, command):
    """A config with fields that only others read (`upcast_attention`): they are all there in what `erase` writes."""
    path = found / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"upcast_attention": True, "of_tomorrow": [1, None]}))
    before = {str(p.relative_to(found)): json.loads(p.read_text()) for p in found.rglob("*.json")}
    out = tmp_path / "out"
    assert command(erase.main, "uce", "--erase", "monet", "--guide", "a", "--model", found, "--out", out)[0] == 0
    after = {str(p.relative_to(out)): json.loads(p.read_text()) for p in out.rglob("*.json")}
    assert set(after) - set(before) == {"erased.json", "unet/structure.json"}
    assert {name: after[name] for name in before} == before
    unet = StableDiffusionPipeline.from_pretrained(out).unet
    assert unet.config.upcast_attention is True
    assert torch.equal(unet.conv_in.weight, load_unet(out).conv_in.weight)


def with_safety_checker(path: Path) -> dict[str, torch.Tensor]:
    """Give a folder one whose weights are a pickle, as the first published ones are."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**sizes, "image_size": 8, "patch_size": 4}, text_config=sizes, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    (path / "safety_checker").mkdir()
    config.save_pretrained(path / "safety_checker")
    torch.save(checker.state_dict(), path / "safety_checker" / "pytorch_model.bin")
    CLIPImageProcessor().save_pretrained(path / "feature_extractor")
    index = json.loads((path / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (path / "model_index.json").write_text(json.dumps(index))
    return checker.state_dict()


@pytest.mark.parametrize("writer", ["erase", "prune"])
def test_what_we_write_loads_in_diffusers(found, tmp_path, command, writer):
    """A safety checker that is only a pickle: copied with its weights, and diffusers loads what is written."""
    weights = with_safety_checker(found)
    (found / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"beside the same in safetensors: nobody needs it")
    out = tmp_path / "out"
    if writer == "erase":
        code, _, err = command(erase.main, "uce", "--erase", "monet", "--guide", "a", "--model", found, "--out", out)
        parts = {}
    else:
        code, _, err = command(prune.main, "uniform", "--budget", "0.8", "--teacher", found, "--out", out)
        parts = {"unet": None}  # which has other widths than its config says: `load_pipeline` puts it there
    assert code == 0, err
    assert not (out / "vae" / "diffusion_pytorch_model.bin").exists()
    loaded = StableDiffusionPipeline.from_pretrained(out, **parts)
    for name, tensor in loaded.safety_checker.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert json.loads((out / "model_index.json").read_text()) == json.loads((found / "model_index.json").read_text())


def test_half_precision_alone(found, tmp_path):
    """A folder that holds only the fp16 variant: what is written loads in diffusers as that variant."""
    for file in (UNET, TEXT, VAE):
        half = {name: t.half() if t.is_floating_point() else t for name, t in load_file(found / file).items()}
        save_file(half, (found / file).with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        (found / file).unlink()
    folder = load_folder(found)
    save_student(tmp_path / "out", folder, folder.unet())
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out", variant="fp16")
    assert torch.equal(loaded.unet.conv_in.weight, folder.unet().conv_in.weight)
    assert isinstance(loaded.unet, UNet2DConditionModel)


def test_a_second_copy_of_the_weights(found):
    """A second-precision copy laid beside the VAE: caches made before and after are of the same VAE."""
    config, before = load_folder(found).config, fingerprint(found / "vae")
    half = {name: tensor.half() for name, tensor in load_file(found / VAE).items()}
    save_file(half, (found / VAE).with_suffix(".fp16.safetensors"))
    (found / "vae" / "diffusion_pytorch_model.bin.index.json").write_text("{}")
    after = fingerprint(found / "vae")
    assert after == before
    past = _digest(found / "vae", ())
    assert past != after  # a cache of the past, made beside both
    check_latents(found, (4, 8, 8), past, config, after)
    assert same_component(past, after)
    change(found / VAE, "decoder.conv_in.weight", 7.0)
    assert fingerprint(found / "vae") != before
    with pytest.raises(UserError, match=f"latents of VAE {past}, the model has VAE"):
        check_latents(found, (4, 8, 8), past, config, fingerprint(found / "vae"))


def test_a_file_that_may_not_be_read(found, monkeypatch):
    """A weights file without permission to read it: the permission is named, and not that the file is missing."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def deny(*_, **__):
        raise FileNotFoundError("No such file or directory")  # as safetensors says it

    monkeypatch.setattr(files, "safe_open", deny)
    monkeypatch.setattr(files.Path, "open", refuse)
    with pytest.raises(UserError, match=rf"{VAE} cannot be read: Permission denied"):
        files.open_safetensors(found / VAE)


@pytest.mark.parametrize("at", ["copy_file", "write_tensors", "sync"])
def test_a_full_disk(found, tmp_path, monkeypatch, at):
    """A disk that is full while a model is written: the path is named, and nothing is left that keeps it full."""
    folder = load_folder(found)
    unet = folder.unet()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (monkeypatch.setattr(files.os, "fsync", full) if at == "sync" else monkeypatch.setattr(folders, at, full))
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_student(tmp_path / "out", folder, unet)
    assert str(caught.value.filename).startswith(str(tmp_path / "out"))
    assert ".tmp" not in str(caught.value.filename)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
