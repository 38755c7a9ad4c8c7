"""What a pipeline of a folder takes from diffusers: LoRAs, on the dense model and on a student, words, schedulers."""

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.folder import load_folder, load_unet, save_student
from bilevel_fast.models.lora import for_structure
from bilevel_fast.models.pipeline import load_pipeline
from bilevel_fast.models.structure import Structure

EVERYWHERE = ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv2", "conv_in"]


def draw(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    x_T = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(5))
    return pipeline("a red star", latents=x_T, num_inference_steps=2, output_type="latent", **options).images


def assert_near(a, b):
    assert (a - b).abs().max() <= 2e-4 * b.abs().max()


def make_lora(unet, path, targets=EVERYWHERE, rank=4):
    """A LoRA of noise for a UNet, ours or diffusers', saved as training scripts save it."""
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(path, unet_lora_layers=get_peft_model_state_dict(unet))
    return path


@pytest.fixture(scope="module")
def lora(sd, tmp_path_factory):
    """Of the dense model."""
    return make_lora(StableDiffusionPipeline.from_pretrained(sd).unet, tmp_path_factory.mktemp("lora") / "dense")


@pytest.fixture(scope="module")
def student(sd, tmp_path_factory):
    """It keeps the last units, where code that took the first ones would be wrong."""
    source = load_folder(sd)
    dropped = [site.name for site in sites(source.config) if site.depth_bit][:2]
    first = Structure.uniform(source.config, 0.6, dropped)
    kept = {
        site.name: {w.name: tuple(range(w.units - len(first.kept[site.name][w.name]), w.units)) for w in site.widths}
        for site in sites(source.config)
        if site.name not in first.dropped
    }
    path = tmp_path_factory.mktemp("lora") / "student"
    save_student(path, source, source.unet().cut(Structure(source.config, kept, first.dropped)))
    return path


def test_on_the_dense_model_as_in_diffusers(sd, lora):
    """Loaded, at another strength, fused, and unloaded again."""
    ours, theirs = load_pipeline(sd), StableDiffusionPipeline.from_pretrained(sd)
    plain = draw(ours)
    for pipeline in (ours, theirs):
        pipeline.load_lora_weights(lora, adapter_name="noise")
    with_lora = draw(ours)
    assert (with_lora - plain).abs().max() > 0.05 * plain.abs().max()
    assert_near(with_lora, draw(theirs))
    half = draw(ours, cross_attention_kwargs={"scale": 0.5})
    assert_near(half, draw(theirs, cross_attention_kwargs={"scale": 0.5}))
    ours.set_adapters("noise", 0.5)
    assert_near(draw(ours), half)
    assert ours.get_active_adapters() == ["noise"]
    ours.disable_lora()
    assert_near(draw(ours), plain)
    ours.enable_lora()
    ours.set_adapters("noise", 1.0)
    ours.fuse_lora()
    assert_near(draw(ours), with_lora)
    ours.unfuse_lora()
    ours.unload_lora_weights()
    assert_near(draw(ours), plain)


def test_a_lora_of_the_dense_model_on_a_student(sd, lora, student, tmp_path):
    """It is cut as the weights were: the student with it is the dense model with it, cut; then saved as a folder."""
    pipeline = load_pipeline(student)
    plain = draw(pipeline)
    pipeline.load_lora_weights(lora)
    found = draw(pipeline)
    assert (found - plain).abs().max() > 0.05 * plain.abs().max()
    fused = load_pipeline(sd)
    fused.load_lora_weights(lora)
    fused.fuse_lora()
    fused.unload_lora_weights()
    wanted = load_pipeline(student)
    wanted.unet.unet.load_state_dict(load_unet(student).structure.slice(fused.unet.state_dict()))
    assert_near(found, draw(wanted))
    tensors, _ = StableDiffusionPipeline.lora_state_dict(lora)
    structure = load_folder(student).structure
    left, _ = for_structure(structure, tensors, None, "unet")
    gone = {name for name in tensors if structure.drops(name.removeprefix("unet."))}
    assert gone
    assert tensors.keys() - left.keys() == gone

    with pytest.raises(UserError, match=r"LoRAs are loaded; call fuse_lora\(\) and unload_lora_weights\(\) before"):
        pipeline.save_pretrained(tmp_path / "out")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "out")
    assert load_folder(tmp_path / "out").structure == load_folder(student).structure
    assert_near(draw(load_pipeline(tmp_path / "out")), found)


def test_a_lora_of_the_students_own_shapes(student, tmp_path):
    pipeline = load_pipeline(student)
    plain = draw(pipeline)
    make_lora(pipeline.unet, tmp_path / "own")
    wanted = draw(pipeline)
    again = load_pipeline(student)
    again.load_lora_weights(tmp_path / "own")
    assert_near(draw(again), wanted)
    again.unload_lora_weights()
    assert torch.equal(draw(again), plain)


def test_names_of_kohya(sd, lora, student):
    """The names that most published LoRAs have, with an alpha for each module."""
    ours, kohya = load_pipeline(student), {}
    tensors, _ = StableDiffusionPipeline.lora_state_dict(lora)
    for name, tensor in tensors.items():
        module, _, factor = name.removeprefix("unet.").rpartition(".lora_")
        if "attn" in module:
            stem = f"lora_unet_{module.replace('.', '_')}"
            kohya[f"{stem}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = tensor
            kohya[f"{stem}.alpha"] = torch.tensor(2.0)
    ours.load_lora_weights(dict(kohya))
    halved = load_pipeline(student)
    halved.load_lora_weights({name: tensor for name, tensor in tensors.items() if "attn" in name})
    halved.set_adapters(halved.get_active_adapters(), 0.5)  # alpha / rank: 2 / 4 against 1, of a file that has none
    assert_near(draw(ours), draw(halved))


@pytest.mark.situation
def test_a_lora_of_another_model(student, lora):
    """A LoRA of another model on a student: refused in one line with the tensor, its size and those wanted."""
    tensors, _ = StableDiffusionPipeline.lora_state_dict(lora)
    structure = load_folder(student).structure
    name = next(name for name in tensors if name.endswith("attn1.to_q.lora_B.weight") and not structure.drops(name[5:]))
    tensors[name] = torch.cat([tensors[name]] * 3)
    with pytest.raises(UserError, match=r"^LoRA: \S+attn1.to_q.lora_B.weight has size \d+ on axis 0, wanted \d+ as of"):
        load_pipeline(student).load_lora_weights(tensors)
    with pytest.raises(UserError, match=r"lora_magnitude_vector.weight is not supported on a pruned UNet"):
        for_structure(structure, {name.replace("lora_B", "lora_magnitude_vector"): tensors[name][:, 0]}, None, "unet")


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_schedulers_of_diffusers(sd, name):
    drawn = []
    for pipeline in (load_pipeline(sd), StableDiffusionPipeline.from_pretrained(sd)):
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        drawn.append(draw(pipeline))
    assert_near(*drawn)


def test_a_textual_inversion(sd, student, tmp_path):
    save_file({"<monet>": torch.randn(32)}, tmp_path / "learned_embeds.safetensors")
    prompts = []
    for pipeline in (load_pipeline(student), StableDiffusionPipeline.from_pretrained(sd)):
        pipeline.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
        prompts.append(pipeline.encode_prompt("a house by <monet>", "cpu", 1, False)[0])
    assert_near(*prompts)
    assert draw(load_pipeline(student)).isfinite().all()
