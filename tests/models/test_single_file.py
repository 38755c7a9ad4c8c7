"""Checkpoints in one file: converted to the bits of the folder that they were made of, or named by what they are."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from bilevel_fast import convert, erase, prune, reproduce, sample, train
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.single_file import convert_file
from sd_folder import make_sd_folder
from single_file import TEXT, UNET, VAE, averaged, original

pytestmark = pytest.mark.situation

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}

ONE = torch.ones(1)
FOUR = {f"{UNET}input_blocks.0.0.weight": torch.ones(8, 4, 3, 3)}


def without_weights(source: Path, path: Path) -> Path:
    """What `hf download --include "*.json" "*.txt"` brings; with the config of a safety checker, as 1.5 has one."""
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.safetensors"))
    (path / "safety_checker").mkdir()
    (path / "safety_checker/config.json").write_text("{}")
    index = json.loads((path / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """A folder of 1.5, its tensors as in one file, and what is online of it without its weights."""
    place = tmp_path_factory.mktemp("sd15")
    folder = make_sd_folder(place / "folder", linear=False, prediction_type="epsilon", heads=(4, 4, 4, 4))
    return folder, original(folder, open_clip=False), without_weights(folder, place / "configs")


@pytest.fixture(scope="module")
def sd21(tmp_path_factory):
    place = tmp_path_factory.mktemp("sd21")
    folder = make_sd_folder(place / "folder", text_layers=23)
    return folder, original(folder, open_clip=True), without_weights(folder, place / "configs")


def assert_same(out: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    for part, file in FILES.items():
        came, wanted = load_file(out / part / file), load_file(folder / part / file)
        wanted.pop("text_model.embeddings.position_ids", None)
        assert came.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(came[name], tensor.to(dtype)), (part, name)


def test_a_checkpoint_of_15(tmp_path, sd15, command):
    """A 1.5 checkpoint in one file, with a moving average: `convert` writes that one's folder, to the bit."""
    folder, tensors, configs = sd15
    save_file(averaged(tensors), tmp_path / "model.safetensors")
    flags = ["--file", tmp_path / "model.safetensors", "--config-from", configs, "--out", tmp_path / "out"]
    code, said, err = command(convert.main, *flags)
    assert (code, err) == (0, "")
    assert said.endswith(f"out holds the model of {flags[1]}: the moving average of its weights\n")
    assert_same(tmp_path / "out", folder)
    for name in ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "vae/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "out").safety_checker is None
    assert load_folder(tmp_path / "out").schedule.prediction_type == "epsilon"


def test_a_pruned_checkpoint(tmp_path, sd15):
    """A 1.5 checkpoint that a tool has pruned: half precision, positions as well, names without `text_model`."""
    folder, tensors, configs = sd15
    half = {name.replace(".text_model.", "."): tensor.half() for name, tensor in tensors.items()}
    assert half[f"{TEXT}transformer.embeddings.position_ids"].dtype == torch.float16
    save_file(half, tmp_path / "model.safetensors")
    assert convert_file(tmp_path / "model.safetensors", configs, tmp_path / "out") is False
    assert_same(tmp_path / "out", folder, torch.float16)


def test_a_checkpoint_of_21(tmp_path, sd21):
    """A 2.1 checkpoint in one file, whose text encoder is OpenCLIP's: its folder, in the precision of the file."""
    folder, tensors, configs = sd21
    wide = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(wide, tmp_path / "model.safetensors", metadata={"modelspec.prediction_type": "v"})
    convert_file(tmp_path / "model.safetensors", configs, tmp_path / "out")
    assert_same(tmp_path / "out", folder, torch.bfloat16)
    assert load_folder(tmp_path / "out").schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (prune.main, ["uniform", "--teacher"]),
        (train.main, ["--preset", "smoke", "--teacher"]),
        (erase.main, ["uce", "--erase", "star", "--model"]),
        (sample.main, ["--prompts", "a red star", "--model"]),
        (reproduce.main, ["table1", "--run.teacher"]),
    ],
)
def test_a_checkpoint_as_a_teacher(tmp_path, command, main, flags):
    """A checkpoint in one file where a model folder is wanted: the command that writes its folder is named."""
    file = tmp_path / "model.safetensors"
    save_file(FOUR, file)
    code, _, err = command(main, *flags, file, "--out", tmp_path / "out.png")
    assert code == 2
    assert f"once: python -m bilevel_fast.convert --file {file} --config-from FOLDER --out FOLDER\n" in err


OTHERS = {
    "kohya LoRA": ({"lora_unet_mid_block.lora_down.weight": torch.ones(4, 8)}, r"is a LoRA; merge it .* and peft"),
    "LoRA": ({"unet.mid_block.attn1.to_q.lora_A.weight": torch.ones(4, 8)}, r"is a LoRA; merge it .*fuse_lora"),
    "textual inversion": ({"<star>": torch.ones(32)}, r"is the embeddings of a textual inversion; put"),
    "SDXL": (FOUR | {"conditioner.embedders.1.model.ln_final.bias": ONE}, r"is a checkpoint of Stable Diffusion XL;"),
    "refiner": (FOUR | {"conditioner.embedders.0.model.ln_final.bias": ONE}, r"is the refiner of Stable Diffusion XL;"),
    "inpainting": (
        {f"{UNET}input_blocks.0.0.weight": torch.ones(8, 9, 3, 3)},
        r"is an inpainting model \(its UNet reads 9 channels\); supported are",
    ),
    "depth": ({f"{UNET}input_blocks.0.0.weight": torch.ones(8, 5, 3, 3)}, r"is a depth-to-image model"),
    "unCLIP": (FOUR | {f"{UNET}label_emb.0.0.weight": ONE}, r"is an unCLIP model or an upscaler"),
    "ControlNet": ({"control_model.time_embed.0.weight": ONE}, r"is a ControlNet; supported are"),
    "Flux": ({f"{UNET}double_blocks.0.img_attn.proj.weight": ONE}, r"is a transformer such as .* without a UNet"),
    "a VAE": ({"encoder.conv_in.weight": torch.ones(8, 3, 3, 3)}, r"is one component of a model"),
    "anything": ({"a": torch.ones(1, 1, 1)}, r"is no checkpoint of a model that is known here; supported are"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_a_file_that_is_no_checkpoint_of_ours(tmp_path, sd15, tensors, message):
    """A LoRA, embeddings, SDXL, inpainting, depth, a ControlNet or Flux in one file: named as what it is."""
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    for read in (lambda: convert_file(file, sd15[2], tmp_path / "out"), lambda: load_folder(file)):
        with pytest.raises(UserError, match=rf"^{file} {message}") as refusal:
            read()
        assert "\n" not in str(refusal.value)


def drop(*starts: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(starts)}


def add(name: str, tensor: torch.Tensor = ONE):
    return lambda tensors: tensors | {name: tensor}


LACKING = {
    "no VAE": (drop(VAE), r"holds no VAE \(first_stage_model\.\*\); wanted"),
    "no text encoder": (drop(TEXT), r"holds no text encoder \(cond_stage_model"),
    "half an average": (add("model_ema.diffusion_modelout0weight"), r"moving average of its weights without model_ema"),
    "a UNet cut short": (drop(f"{UNET}out.2"), r"does not fit the configs of .*: unet: 2 weights \(conv_out"),
    "no number": (add(f"{VAE}encoder.conv_in.bias", torch.full((8,), torch.nan)), r"conv_in.bias is not finite"),
    "v-prediction": (add("v_pred"), r"is marked as v_prediction, and prediction_type in .*config.json is epsilon"),
    "zero SNR": (add("ztsnr"), r"is marked as of zero terminal SNR, and .* lacks rescale_betas_zero_snr"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), LACKING.values(), ids=LACKING.keys())
def test_a_checkpoint_that_does_not_fit(tmp_path, sd15, change, message):
    """A checkpoint without a VAE, cut short, or of another kind than the folder: one line, and nothing is written."""
    file = tmp_path / "model.safetensors"
    save_file(change(sd15[1]), file)
    with pytest.raises(UserError, match=message) as refusal:
        convert_file(file, sd15[2], tmp_path / "out")
    assert str(refusal.value).startswith(str(file))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_folder_of_another_version(tmp_path, sd15, sd21):
    """A 1.5 checkpoint with the folder of 2.1: refused by what does not fit; and a folder that is there."""
    file = tmp_path / "model.safetensors"
    save_file(sd15[1], file)
    with pytest.raises(UserError, match=r"does not fit the configs of .*: text_encoder: .* missing"):
        convert_file(file, sd21[2], tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        convert_file(file, sd15[2], tmp_path / "out")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_a_pickle(tmp_path, sd15, name):
    """A `.ckpt`: refused unread, with what to do."""
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    message = (
        rf"{name} is a pickle, and reading one can run code; write its tensors to a .safetensors file .*bilevel_fast"
    )
    for read in (
        lambda: convert_file(tmp_path / name, sd15[2], tmp_path / "out"),
        lambda: load_folder(tmp_path / name),
    ):
        with pytest.raises(UserError, match=message):
            read()


def test_what_the_page_says_of_pickles(tmp_path, monkeypatch):
    """The command of docs/formats.md that writes the tensors of a `.ckpt` to safetensors: it does."""
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    (code,) = re.findall(r'^python -c "(.*?)"$', page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": FOUR | {"same": FOUR[next(iter(FOUR))]}, "epoch": 3}, "model.ckpt")
    exec(code, {})
    assert load_file("model.safetensors").keys() == {*FOUR, "same"}


def edit(file: str, **fields):
    def apply(path: Path) -> None:
        (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | fields))

    return apply


def alone(file: str, text: str = "{}"):
    def apply(path: Path) -> None:
        shutil.rmtree(path)
        path.mkdir()
        (path / file).write_text(text)

    return apply


FOLDERS = {
    "inpainting": (edit("unet/config.json", in_channels=9), r"is an inpainting model \(its UNet reads 9"),
    "depth": (edit("unet/config.json", in_channels=5), r"is a depth-to-image model"),
    "upscaler": (edit("unet/config.json", in_channels=7), r"is an upscaler"),
    "unCLIP": (edit("unet/config.json", class_embed_type="projection"), r"is an unCLIP model"),
    "LCM": (edit("unet/config.json", time_cond_proj_dim=256), r"is a latent consistency model \(LCM\)"),
    "LCM by scheduler": (edit("model_index.json", scheduler=["diffusers", "LCMScheduler"]), r"is a latent consistency"),
    "refiner": (
        edit("unet/config.json", addition_embed_type="text_time", cross_attention_dim=1280), r"is the refiner of"
    ),
    "Flux": (alone("model_index.json", '{"transformer": ["diffusers", "FluxTransformer2DModel"]}'), r"is a trans"),
    "ControlNet": (alone("config.json", '{"_class_name": "ControlNetModel"}'), r"is a ControlNet; wanted the"),
    "a UNet": (alone("config.json", '{"_class_name": "UNet2DConditionModel"}'), r"is a UNet2DConditionModel al"),
    "LoRA": (alone("adapter_config.json"), r"is a LoRA; merge it into its model with diffusers and peft"),
    "embeddings": (alone("learned_embeds.safetensors"), r"is the embeddings of a textual inversion; put them into"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FOLDERS.values(), ids=FOLDERS.keys())
def test_a_folder_that_is_no_model_of_ours(tmp_path, sd15, change, message):
    """A folder of an inpainting, depth, unCLIP, LCM or refiner model, a ControlNet, a LoRA: named as what it is."""
    path = shutil.copytree(sd15[2], tmp_path / "model")
    change(path)
    with pytest.raises(UserError, match=rf"model {message}") as refusal:
        load_folder(path)
    assert "\n" not in str(refusal.value)


def test_a_textual_inversion_that_diffusers_has_put_in(tmp_path, sd):
    """A model into which diffusers has put a textual inversion's token: read, and the token is one of its words."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    save_file({"<star>": torch.arange(32.0)}, tmp_path / "learned_embeds.safetensors")
    pipeline.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    pipeline.save_pretrained(tmp_path / "model")
    encoder = load_folder(tmp_path / "model").text_encoder
    ids = encoder.tokenizer(["a <star>"]).input_ids[0]
    assert len(ids) == 4  # and the two ends
    assert torch.equal(encoder.model.get_input_embeddings().weight[ids[2]], torch.arange(32.0))


def test_a_lora_of_a_model(tmp_path, sd, lora):
    """A LoRA that diffusers has saved: named as what it is, file and folder; merged as docs/formats.md says, read."""
    for path in (lora, lora / "pytorch_lora_weights.safetensors"):
        with pytest.raises(UserError, match=rf"^{path} is a LoRA; merge it into its model with diffusers and peft"):
            load_folder(path)
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "model")
    merged, plain = (load_folder(path).unet().state_dict() for path in (tmp_path / "model", sd))
    assert {name for name in plain if not torch.equal(merged[name], plain[name])} == {
        name for name in plain if name.endswith("attn2.to_q.weight")
    }


@pytest.fixture(scope="module")
def lora(tmp_path_factory, sd):
    peft = pytest.importorskip("peft", reason="peft, which merges a LoRA, is no dependency of this package")
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, target_modules=r".*attn2\.to_q", init_lora_weights=False))
    path = tmp_path_factory.mktemp("lora")
    layers = peft.get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(path, unet_lora_layers=layers)
    return path
