"""The pipeline of a model folder equals stock diffusers where that can load it, and our own sampler everywhere."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.folder import load_folder, save_student
from bilevel_fast.models.pipeline import load_pipeline
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.sampling.samplers import guided, sample
from mini_folder import make_mini_folder
from sd_folder import make_sd_folder

PROMPTS = ["a red star", "a blue house by monet"]
STEPS, GUIDANCE = 3, 7.5


def draw(pipeline, x_T, output="latent"):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        latents=x_T.clone(),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type=output,
    ).images


def ours(folder, x_T, method="pndm"):
    text, null = folder.text_encoder.encode(PROMPTS), folder.text_encoder.encode([""])
    return sample(guided(folder.unet(), text, null, GUIDANCE), x_T, folder.schedule, STEPS, method)


def assert_near(a, b):
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize(
    ("scheduler", "method", "prediction_type"),
    [
        ("PNDMScheduler", "pndm", "v_prediction"),
        ("DDIMScheduler", "ddim", "v_prediction"),  # as Stable Diffusion 2.1 is published
        ("PNDMScheduler", "pndm", "epsilon"),  # as 1.5 is
    ],
)
def test_a_dense_folder_draws_as_diffusers_and_as_our_sampler(tmp_path, scheduler, method, prediction_type):
    path = make_sd_folder(tmp_path, scheduler=scheduler, prediction_type=prediction_type)
    x_T = torch.randn(2, 4, 8, 8)
    latents = draw(load_pipeline(path), x_T)
    assert_near(latents, draw(StableDiffusionPipeline.from_pretrained(path), x_T))
    assert_near(latents, ours(load_folder(path), x_T, method))


def test_a_student_draws_as_our_sampler(tmp_path):
    source = load_folder(make_sd_folder(tmp_path / "teacher"))
    dropped = [site.name for site in sites(source.config) if site.depth_bit][:2]
    structure = Structure.uniform(source.config, 0.6, dropped)
    unet = UNet(source.config, structure)
    unet.load_state_dict(structure.slice(source.unet().state_dict()))
    save_student(tmp_path / "student", source, unet)

    x_T = torch.randn(2, 4, 8, 8)
    pipeline = load_pipeline(str(tmp_path / "student"))
    latents = draw(pipeline, x_T)
    assert_near(latents, ours(load_folder(tmp_path / "student"), x_T))
    images = draw(pipeline, x_T, output="np")
    expected = source.vae.decode(latents).permute(0, 2, 3, 1) / 2 + 0.5
    torch.testing.assert_close(torch.from_numpy(images), expected, rtol=0, atol=1e-5)
    assert pipeline.device.type == "cpu"
    assert [image.size for image in draw(pipeline, x_T, output="pil")] == [(64, 64)] * 2


def test_the_dtype_reaches_every_component(tmp_path):
    pipeline = load_pipeline(make_sd_folder(tmp_path), dtype=torch.bfloat16)
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.bfloat16
    latents = draw(pipeline, torch.randn(2, 4, 8, 8).bfloat16())
    assert latents.dtype == torch.bfloat16
    assert latents.isfinite().all()


def test_conditions_that_the_unet_has_no_input_for_are_refused(tmp_path):
    pipeline = load_pipeline(make_sd_folder(tmp_path))
    with pytest.raises(UserError, match="takes no added_cond_kwargs"):
        pipeline.unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 32), added_cond_kwargs={"image_embeds": 1})
    out = pipeline.unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 77, 32))
    assert torch.equal(out.sample, out[0])


def test_a_mini_world_model_has_no_pipeline(tmp_path):
    with pytest.raises(UserError, match=r"holds a model of the mini world.*python -m bilevel_fast\.sample"):
        load_pipeline(make_mini_folder(tmp_path))
