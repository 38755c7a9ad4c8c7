"""Model folders: parity with diffusers and transformers, every way to store weights, students written and read."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, write_json
from bilevel_fast.models import folder as folder_module
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.family import FAMILIES
from bilevel_fast.models.folder import load_folder, load_unet, save_student
from bilevel_fast.models.mini import MiniTextEncoder
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from mini_folder import make_mini_folder
from sd_folder import WORDS, make_sd_folder

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
PROMPTS = ["a red star", "", "A blue HOUSE by monet, xyz! " * 30]


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    return make_sd_folder(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> Path:
    return make_mini_folder(tmp_path_factory.mktemp("mini"))


@pytest.fixture
def broken(sd, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(sd, tmp_path / "model")


def inputs(folder):
    shape = (2, folder.config.in_channels, folder.config.sample_size, folder.config.sample_size)
    return torch.randn(shape), torch.tensor([3, 700]), folder.text_encoder.encode(["a red star", ""])


# --- parity ---


def test_the_text_encoder_equals_transformers(sd):
    encoder = load_folder(sd).text_encoder
    reference = CLIPTextModel.from_pretrained(sd / "text_encoder")
    tokens = encoder.tokenizer(
        PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = reference(tokens)[0]
    states = encoder.encode(PROMPTS)
    assert (states.shape, states.dtype, states.requires_grad) == ((3, 77, encoder.width), torch.float32, False)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)
    # After the final LayerNorm, which starts with weight 1 and bias 0: every state is standardised.
    torch.testing.assert_close(states.mean(-1), torch.zeros(3, 77), rtol=0, atol=1e-5)
    assert tokens[2, -1] == encoder.tokenizer.eos_token_id  # the long prompt was cut, not wrapped


def test_the_tokenizer_knows_words_and_spells_the_rest(sd):
    tokenizer = load_folder(sd).text_encoder.tokenizer
    assert [tokenizer.tokenize(word) for word in WORDS] == [[f"{word}</w>"] for word in WORDS]
    assert tokenizer.tokenize("RED rose") == ["red</w>", "r", "o", "s", "e</w>"]
    ids = tokenizer([""], padding="max_length", max_length=4).input_ids[0]
    assert ids == [tokenizer.bos_token_id, tokenizer.eos_token_id, 0, 0]  # Stable Diffusion 2 pads with "!", id 0


def test_the_vae_equals_diffusers(sd):
    vae, reference = load_folder(sd).vae, AutoencoderKL.from_pretrained(sd / "vae")
    images = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        posterior = reference.encode(images).latent_dist
        mean, logvar = vae.moments(images).chunk(2, dim=1)
        scaled = posterior.sample(torch.Generator().manual_seed(0)) * 0.18215
        eps = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(mean + (0.5 * logvar).exp() * eps, scaled, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mean, posterior.mean * 0.18215, rtol=1e-5, atol=1e-7)
        expected = reference.decode(scaled / 0.18215).sample.clamp(-1, 1)
        torch.testing.assert_close(vae.decode(scaled), expected, rtol=0, atol=1e-5)
    assert vae.channels == 4


def test_the_unet_equals_diffusers(sd):
    folder = load_folder(sd)
    x, t, text = inputs(folder)
    reference = UNet2DConditionModel.from_pretrained(sd / "unet")
    with torch.no_grad():
        expected = reference(x, t, text).sample
        ours = folder.unet()(x, t, text).out
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert folder.structure is None


def test_half_precision_computes_in_half_and_returns_float32(sd):
    full, half = load_folder(sd), load_folder(sd, dtype=torch.bfloat16)
    assert half.text_encoder.model.dtype == half.vae.model.dtype == torch.bfloat16
    states = half.text_encoder.encode(["a red star"])
    assert states.dtype == torch.float32
    torch.testing.assert_close(states, full.text_encoder.encode(["a red star"]), rtol=0, atol=0.1)
    images = torch.rand(1, 3, 64, 64)
    assert half.vae.moments(images).dtype == half.vae.decode(torch.randn(1, 4, 8, 8)).dtype == torch.float32


def test_the_vae_of_a_gpu_reads_and_writes_channels_last(sd):
    """On the CPU the weights stay as they were written; convolutions elsewhere would copy them and their inputs."""
    for device, wanted in (("cpu", False), ("meta", True)):
        vae = load_folder(sd, device, torch.bfloat16).vae
        found = [p.is_contiguous(memory_format=torch.channels_last) for p in vae.model.parameters() if p.dim() == 4]
        assert all(found) == wanted, device


def test_threads_take_turns_with_the_tokenizer(sd):
    """A tokenizer that another thread is in the middle of raises."""
    encoder, inside = load_folder(sd).text_encoder, []

    class Tokenizer:
        def __init__(self, real):
            self.real = real

        def __call__(self, *args, **settings):
            inside.append(1)
            time.sleep(0.01)
            assert len(inside) == 1, "already borrowed"
            inside.pop()
            return self.real(*args, **settings)

    encoder.tokenizer = Tokenizer(encoder.tokenizer)
    with ThreadPoolExecutor(2) as threads:
        masks = list(threads.map(encoder.mask, [["a red star"]] * 4))
    assert all(torch.equal(mask, masks[0]) for mask in masks)


def test_a_mini_folder(mini):
    folder = load_folder(str(mini))
    assert isinstance(folder.text_encoder, MiniTextEncoder)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, _ = folder.vae.moments(images).chunk(2, dim=1)
    torch.testing.assert_close(folder.vae.decode(mean), images)
    out = folder.unet()(*inputs(folder)).out
    assert out.shape == (2, 12, 8, 8)
    assert folder.family is FAMILIES["mini"]
    assert not folder.schedule.set_alpha_to_one


# --- how weights may be stored ---


def test_shards_and_half_precision_files_give_the_same_unet(sd, broken):
    expected = load_unet(sd).state_dict()
    weights = load_file(broken / UNET)
    (broken / UNET).unlink()
    half = {name: tensor.half() for name, tensor in weights.items()}
    save_file(half, broken / "unet/diffusion_pytorch_model.fp16.safetensors")
    for name, tensor in load_unet(broken).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].half().float()), name
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, broken / "unet" / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = broken / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, tensor in load_unet(broken).state_dict().items():
        assert torch.equal(tensor, expected[name]), name

    (broken / "unet/b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b.safetensors is missing"):
        load_folder(broken)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../b.safetensors"}}))
    with pytest.raises(UserError, match="is not the name of a file beside it"):
        load_folder(broken)
    index.write_text("{}")
    with pytest.raises(UserError, match="weight_map is missing"):
        load_folder(broken)


def test_half_precision_variants_of_the_other_components(sd, broken):
    for file in (UNET, TEXT, VAE):
        half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(broken / file).items()}
        save_file(half, (broken / file).with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        (broken / file).unlink()
    config = broken / "text_encoder/config.json"
    write_json(config, read_json(config) | {"dtype": "float16"})
    full, half = load_folder(sd), load_folder(broken)
    assert half.text_encoder.model.dtype == torch.float32
    ours, theirs = (folder.text_encoder.encode(["a red star"]) for folder in (half, full))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)
    assert half.vae_fingerprint != full.vae_fingerprint


def test_loaded_weights_do_not_hang_on_the_file(broken):
    unet = load_unet(broken)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with (broken / UNET).open("r+b") as file:
        file.seek(1 << 16)
        file.write(b"\xff" * (1 << 16))
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_the_fingerprint_knows_weights_and_ignores_notes(sd, broken):
    original = load_folder(sd).vae_fingerprint
    config = json.loads((broken / "vae/config.json").read_text())
    (broken / "vae/config.json").write_text(json.dumps(config | {"_diffusers_version": "0.1"}))
    assert load_folder(broken).vae_fingerprint == original
    weights = load_file(broken / VAE)
    weights["quant_conv.bias"][0] += 1e-3
    save_file(weights, broken / VAE, metadata={"format": "pt"})
    assert load_folder(broken).vae_fingerprint != original


# --- students ---


def student(source: Path, align: int = 1) -> UNet:
    dense = load_unet(source)
    drop = [site.name for site in sites(dense.config) if site.depth_bit and site.kind == "transformer"][:1]
    structure = Structure.uniform(dense.config, 0.6, drop)
    unet = UNet(dense.config, structure, align)
    unet.load_state_dict(structure.slice(dense.state_dict()))
    return unet


def test_a_student_that_keeps_everything_is_a_dense_model(tmp_path, mini):
    """As one whose weights were edited: it may be pruned."""
    folder = load_folder(mini)
    save_student(tmp_path / "edited", folder, folder.unet())
    assert (tmp_path / "edited" / "unet" / "structure.json").is_file()
    assert load_folder(tmp_path / "edited").structure is None


@pytest.mark.parametrize("make", [make_sd_folder, make_mini_folder])
def test_a_student_comes_back_as_it_was(tmp_path, make):
    source = load_folder(make(tmp_path / "teacher"))
    padded = student(source.path, align=8)
    save_student(tmp_path / "runs" / "student", source, padded)
    folder = load_folder(tmp_path / "runs" / "student")
    assert folder.structure == padded.structure
    assert folder.vae_fingerprint == source.vae_fingerprint
    x, t, text = inputs(folder)
    with torch.no_grad():
        expected = padded.eval()(x, t, text).out
        for align in (1, 8):
            torch.testing.assert_close(folder.unet(align)(x, t, text).out, expected, rtol=1e-5, atol=1e-6)
    stored = load_file(tmp_path / "runs/student" / UNET)
    site = next(site for site in sites(folder.config) if site.kind == "resnet")
    inner = folder.structure.count(site, site.widths[0]) * site.widths[0].unit_size
    assert stored[f"{site.name}.conv1.weight"].shape[0] == inner  # without the padding
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name != "student"]


def test_a_student_is_whole_or_not_there(tmp_path, sd, monkeypatch):
    source, unet = load_folder(sd), student(sd)
    path = tmp_path / "student"

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_unet", full_disk)
        with pytest.raises(OSError, match="No space"):
            save_student(path, source, unet)
    assert not path.exists()
    save_student(path, source, unet)  # over what the failed one left aside
    before = {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_unet", full_disk)
        with pytest.raises(OSError, match="No space"):
            save_student(path, source, unet, overwrite=True)
    assert {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_only_a_student_is_overwritten_and_only_when_asked(tmp_path, broken):
    source, unet = load_folder(broken), student(broken)
    path = tmp_path / "student"
    save_student(path, source, unet)
    with pytest.raises(UserError, match="student exists already"):
        save_student(path, source, unet)
    with torch.no_grad():
        unet.conv_in.bias += 1
    save_student(path, source, unet, overwrite=True)
    assert torch.equal(load_unet(path).conv_in.bias, unet.conv_in.bias)
    (tmp_path / "notes").mkdir()
    for precious in (tmp_path / "notes", broken, tmp_path):
        with pytest.raises(UserError, match="is not a student's folder; it is not replaced"):
            save_student(precious, source, unet, overwrite=True)
    with pytest.raises(UserError, match="is not a student's folder"):  # a student, but the one it is made from
        save_student(path, load_folder(path), unet, overwrite=True)


def test_pickles_are_not_copied(tmp_path, broken):
    (broken / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (broken / "notes").mkdir()
    save_student(tmp_path / "student", load_folder(broken), student(broken))
    names = {str(path.relative_to(tmp_path / "student")) for path in (tmp_path / "student").rglob("*")}
    assert {"tokenizer/merges.txt", "scheduler/scheduler_config.json", "unet/structure.json", VAE, TEXT} <= names
    assert not {"vae/diffusion_pytorch_model.bin", "notes"} & names


def test_links_of_a_download_cache_become_files(tmp_path, broken):
    blob = shutil.move(broken / VAE, tmp_path / "blob")
    (broken / VAE).symlink_to(blob)
    save_student(tmp_path / "student", load_folder(broken), student(broken))
    assert not (tmp_path / "student" / VAE).is_symlink()


@pytest.mark.situation
@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda part, secret: (part / "notes.json").symlink_to(secret), r"vae/notes.json is a link out of the model"),
        (lambda part, secret: (part / "more.safetensors").symlink_to(secret), r"secret.*not a safetensors file"),
        (lambda part, secret: (part / "all").symlink_to(secret.parent), r"vae/all is no regular file"),
        (lambda part, secret: (part / "up").symlink_to(".."), r"vae/up is no regular file"),
        (lambda part, secret: (part / "loop").symlink_to(part / "loop"), r"vae/loop is a link that leads nowhere"),
        (lambda part, secret: (part / "gone").symlink_to("nothing"), r"vae/gone is a link that leads nowhere"),
        (lambda part, secret: os.mkfifo(part / "pipe"), r"vae/pipe is no regular file"),
    ],
)
def test_what_is_not_copied_into_a_student(tmp_path, broken, plant, message):
    """A teacher has a link to a file of yours, or a pipe: the student is refused, and nothing is left aside."""
    secret = tmp_path / "home" / "secret"
    secret.parent.mkdir()
    secret.write_text('{"token": 1}')
    source, unet = load_folder(broken), student(broken)
    plant(broken / "vae", secret)
    with pytest.raises(UserError, match=message):
        save_student(tmp_path / "out" / "student", source, unet)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.situation
def test_a_component_that_is_a_link_out_of_the_folder(tmp_path, broken):
    """A component of a teacher is a link to a folder of yours: refused; one within the teacher is copied."""
    shutil.copytree(broken / "tokenizer", tmp_path / "home")
    source, unet = load_folder(broken), student(broken)
    shutil.move(broken / "tokenizer", broken / "words")
    (broken / "tokenizer").symlink_to("words")
    save_student(tmp_path / "within", source, unet)
    assert (tmp_path / "within/tokenizer/merges.txt").is_file()
    assert not (tmp_path / "within/tokenizer").is_symlink()
    (broken / "tokenizer").unlink()
    (broken / "tokenizer").symlink_to(tmp_path / "home")
    with pytest.raises(UserError, match="tokenizer is a link out of the model folder"):
        save_student(tmp_path / "student", source, unet)


@pytest.mark.situation
def test_a_model_in_a_download_cache(tmp_path, broken):
    """A teacher lies in Hugging Face's cache, all its files links to blobs: its student has files of its own."""
    blobs, model = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/main"
    model.parent.mkdir(parents=True)
    blobs.mkdir()
    shutil.copytree(broken, model)
    for number, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        shutil.move(file, blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    save_student(tmp_path / "student", load_folder(model), student(model))
    assert not [path for path in (tmp_path / "student").rglob("*") if path.is_symlink()]
    assert load_folder(tmp_path / "student").vae_fingerprint == load_folder(broken).vae_fingerprint


def test_a_structure_must_fit_config_and_weights(tmp_path, broken):
    path = tmp_path / "student"
    save_student(path, load_folder(broken), student(broken))
    wider = Structure.uniform(load_folder(broken).config, 0.8)
    wider.save(path / "unet" / "structure.json")
    with pytest.raises(UserError, match=r"unet: .* missing"):  # the dropped site
        load_unet(path)
    drop = student(broken).structure.dropped
    Structure.uniform(wider.config, 0.8, drop).save(path / "unet" / "structure.json")
    with pytest.raises(UserError, match=r"ff.net.0.proj.bias has shape .*, the structure wants"):
        load_unet(path)
    write_json(path / "unet/config.json", replace(wider.config, norm_eps=1e-6).to_dict())
    with pytest.raises(UserError, match=r"structure.json describes another UNet than"):
        load_folder(path)
