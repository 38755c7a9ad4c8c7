"""Every command on a small Stable Diffusion XL, one after the other: from pictures to a pipeline without a concept."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("diffusers")
from diffusers import StableDiffusionXLPipeline

from bilevel_fast import load_pipeline, sample, train
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, write_json
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.cache import Cache
from bilevel_fast.data.stream import ImageStream, open_images
from bilevel_fast.models.conditioning import unpack
from bilevel_fast.models.folder import load_folder
from bilevel_fast.sampling.samplers import guided
from bilevel_fast.sampling.samplers import sample as walk
from commands import run_command
from sd_folder import make_sd_folder
from sdxl_chain import PROMPTS, SIZES, done
from sdxl_folder import SIDE


@pytest.fixture(scope="module")
def world(sdxl_chain) -> Path:
    return sdxl_chain


def test_the_cache_keeps_size_and_corner_of_every_view(world, sdxl):
    cache = Cache.open(world / "cache")
    assert (len(cache), cache.views, cache.index.sizes) == (6, 2, True)
    found = torch.cat([cache.sizes(range(6), [view] * 6) for view in range(2)])
    width, height = torch.tensor(SIZES * 2, dtype=torch.float32).T
    assert torch.equal(found[:, :2], torch.stack([height, width], dim=1))
    assert (found[:, 4:] == SIDE).all()
    corner = found[:, 2:4]
    longer = torch.stack([height, width], dim=1) * (SIDE / torch.minimum(height, width))[:, None]
    assert (corner >= 0).all()
    assert (corner + SIDE <= longer.ceil()).all()
    assert corner.any(0).all()
    encoder = load_folder(sdxl).text_encoder
    batch = Batches(cache, encoder, 4, seed=0)(0)
    sizes = unpack(batch.text, encoder.pooled)[1].sizes
    numbers = [int(caption.split()[-1]) for caption in batch.captions]
    assert [row[:2] for row in sizes.int().tolist()] == [[*reversed(SIZES[number])] for number in numbers]


def test_a_list_of_images_knows_the_same_sizes(world, sdxl):
    stream, cache = open_images(world / "list", load_folder(sdxl)), Cache.open(world / "cache")
    assert isinstance(stream, ImageStream)
    rows, views = [3, 0, 4, 3], [1, 0, 0, 0]
    assert torch.equal(stream.sizes(rows, views), cache.sizes(rows, views))
    stream.moments(rows, views)
    assert torch.equal(stream.sizes(rows, views), cache.sizes(rows, views))


def test_both_levels_train(world):
    records = [json.loads(line) for line in (world / "run/stats.jsonl").read_text().splitlines()]
    assert ["upper/suppression" in record for record in records] == [False, False, True, False, False, True]
    summary = read_json(world / "run/summary.json")
    assert (summary["lower_steps"], summary["upper_steps"]) == (6, 2)
    assert summary["macs"]["ratio"] < 1
    before, after = (load_folder(path).unet() for path in (world / "pruned", world / "run/student"))
    assert before.structure == after.structure
    moved = dict(after.named_parameters())
    still = [name for name, p in before.named_parameters() if torch.equal(p, moved[name])]
    assert not [name for name in still if "attn1" not in name], "the embedding of sizes and pooled state among them"
    assert read_json(world / "esd/summary.json")["upper_steps"] == 1


def test_uce_edits_every_block_and_nothing_else(world):
    before, after = (load_folder(path).unet().state_dict() for path in (world / "run/student", world / "erased"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    wanted = {name for name in before if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))}
    assert changed == wanted
    assert any(".transformer_blocks.1." in name for name in wanted)
    for part in ("text_encoder_2/model.safetensors", "tokenizer_2/vocab.json"):
        assert (world / "erased" / part).is_file()


def test_the_erased_student_is_sampled(world):
    model = ["--model", world / "erased", "--steps", 2]
    done(sample.main, *model, "--prompts", "a star", "--out", world / "grid.png")
    (world / "prompts.txt").write_text("a star\na house\n")
    done(sample.main, *model, "--prompts-file", world / "prompts.txt", "--folder", world / "drawn")
    assert "text_encoder_2" in (world / "drawn/settings.json").read_text()
    assert len(list((world / "drawn").glob("*.png"))) == 2


def draw(pipeline, x_T):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS, latents=x_T.clone(), num_inference_steps=3, guidance_scale=5.0, output_type="latent"
    ).images


@pytest.mark.parametrize("zeros", [True, False])
def test_pipelines_draw_as_diffusers_and_as_our_sampler(world, sdxl, tmp_path, zeros):
    """The dense folder against stock diffusers; it and the erased student against our sampler."""
    ddim = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
    for name, path in {"dense": sdxl, "erased": world / "erased"}.items():
        copied = shutil.copytree(path, tmp_path / name)
        for file, fields in {
            "model_index.json": {"scheduler": ["diffusers", "DDIMScheduler"], "force_zeros_for_empty_prompt": zeros},
            "scheduler/scheduler_config.json": ddim,
        }.items():
            write_json(copied / file, read_json(copied / file) | fields)
        folder, x_T = load_folder(copied), torch.randn(2, 4, 8, 8)
        latents = draw(load_pipeline(copied), x_T)
        text, null = folder.text_encoder.encode(PROMPTS), folder.text_encoder.encode([""])
        ours = walk(guided(folder.unet(), text, null, 5.0), x_T, folder.schedule, 3, "ddim")
        assert (latents - ours).abs().max() <= 1e-4 * ours.abs().max()
        if name == "dense":
            stock = draw(StableDiffusionXLPipeline.from_pretrained(copied), x_T)
            assert (latents - stock).abs().max() <= 1e-4 * stock.abs().max()


def test_the_pipeline_of_the_folder_as_it_is(world):
    pipeline = load_pipeline(world / "erased", dtype=torch.bfloat16)
    assert type(pipeline) is StableDiffusionXLPipeline
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    images = pipeline(PROMPTS[0], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, SIDE, SIDE, 3)
    x, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, 64)
    with pytest.raises(UserError, match="lacks time_ids, which this UNet reads"):
        pipeline.unet(x, 5, text, added_cond_kwargs={"text_embeds": torch.zeros(1, 40)})
    with pytest.raises(UserError, match="takes no image_embeds"):
        pipeline.unet(x, 5, text, added_cond_kwargs={"image_embeds": text})


def without_sizes(world: Path, out: Path) -> list[str | Path]:
    cache = shutil.copytree(world / "cache", out / "cache")
    index = read_json(cache / "index.json")
    del index["sizes"]
    write_json(cache / "index.json", index | {"version": 2})
    return ["--data", cache]


def of_another_family(world: Path, out: Path) -> list[str | Path]:
    bank = shutil.copytree(world / "bank", out / "bank")
    index = read_json(bank / "index.json")
    del index["recipe"]["text_encoder_2"]
    write_json(bank / "index.json", index)
    return ["--concepts", bank]


def of_stable_diffusion(world: Path, out: Path) -> list[str | Path]:
    return ["--student", make_sd_folder(out / "sd")]


REFUSED = {
    "a cache without size numbers": (without_sizes, "cache has no size numbers of its pictures, which "),
    "a bank of another family": (of_another_family, "bank was drawn by a model with text_encoder, "),
    "a student of Stable Diffusion 2.1": (of_stable_diffusion, "sd was not made from "),
}


@pytest.mark.situation
@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_a_teacher_of_xl(world, sdxl, tmp_path, spoil, message):
    """An SDXL teacher with a cache without size numbers, or another family's bank or student: refused in one line."""
    given = {"--teacher": sdxl, "--student": world / "pruned", "--data": world / "cache", "--concepts": world / "bank"}
    given |= dict([spoil(world, tmp_path)])
    flags = [word for pair in given.items() for word in pair]
    result = run_command(train.main, *flags, "--lower.steps", 1, "--out", tmp_path / "run")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (result.returncode, len(errors)) == (2, 1), result.stderr
    assert message in errors[0]
