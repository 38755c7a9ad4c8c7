"""Attacks in the space of text states, on the mini world's own encoder and teacher."""

import pytest
import torch
from torch.nn import functional as F

from bilevel_fast.attacking.states import Shifted, concept_vector, inverting
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.sources import MemorySource, exact_moments
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.text_encoder_xl import XlTextEncoder
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.world import SCENES, STYLES, is_held_out, labels, render

STYLE = STYLES.index("pointillism")


@pytest.fixture(scope="module")
def folder():
    return load_folder(TEACHER)


@pytest.fixture(scope="module")
def scenes():
    return [scene for scene in SCENES if scene.style == STYLE and not is_held_out(scene)]


def plain(scene):
    return scene.caption.partition(" in the style")[0]


def test_concept_vector_is_a_mean_of_differences(folder):
    encoder = folder.text_encoder
    pairs = [("a red star in the style of waves", "a red star"), ("a blue ring in the style of waves", "a blue ring")]
    wanted = sum(encoder.encode([a])[0] - encoder.encode([b])[0] for a, b in pairs) * 0.75 / 2
    found = concept_vector(encoder, *zip(*pairs, strict=True), 0.75)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_null_prompt_is_not_shifted(folder):
    encoder = folder.text_encoder
    shifted = Shifted(encoder, torch.full((encoder.length, encoder.width), 2.0))
    prompts = ["a red star", "", "  ", "a blue ring"]
    moved = shifted.encode(prompts) - encoder.encode(prompts)
    assert moved.flatten(1).abs().amax(1).tolist() == pytest.approx([2.0, 0.0, 0.0, 2.0])
    assert (shifted.width, shifted.length) == (encoder.width, encoder.length)
    assert torch.equal(shifted.mask(prompts), encoder.mask(prompts))


def test_inversion_learns_the_concept_and_leaves_the_model_alone(folder, scenes):
    """From nothing, a few steps go a good part of the way from the plain prompts' loss to the named ones'."""
    unet = folder.unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    images = render(*labels(scenes), seed=3, indices=range(len(scenes)))
    source = MemorySource(
        folder.vae.moments(images)[:, None], [[s.caption] for s in scenes], [plain(s) for s in scenes]
    )
    encoder = folder.text_encoder
    shift = torch.zeros(encoder.length, encoder.width)
    *_, learnt = inverting(unet, folder.schedule, encoder, source, shift, steps=12, batch=6, lr=0.1, seed=0)

    @torch.no_grad()
    def loss(states):
        latents, generator = folder.vae.moments(images).chunk(2, dim=1)[0], torch.Generator().manual_seed(5)
        t = torch.full((len(latents),), 600)
        eps = torch.randn(latents.shape, generator=generator)
        alpha, sigma = folder.schedule.alpha_sigma(t, 4)
        out = unet(alpha * latents + sigma * eps, t, states).out
        return F.mse_loss(out, alpha * eps - sigma * latents).item()

    bare = encoder.encode([plain(scene) for scene in scenes])
    named = encoder.encode([scene.caption for scene in scenes])
    assert not torch.equal(learnt, shift)
    assert loss(named) < loss(bare)
    assert loss(bare + learnt) < loss(bare) - 0.3 * (loss(bare) - loss(named))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in unet.parameters())


def test_inversion_is_a_function_of_its_seed(folder, scenes):
    latents = torch.randn(4, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    some = scenes[:4]
    source = MemorySource(exact_moments(latents), [[s.caption] for s in some], [plain(s) for s in some])
    shift = torch.zeros(folder.text_encoder.length, folder.text_encoder.width)

    def learn(seed):
        *_, learnt = inverting(
            folder.unet(), folder.schedule, folder.text_encoder, source, shift, steps=2, batch=2, lr=0.1, seed=seed
        )
        return learnt

    assert torch.equal(learn(0), learn(0))
    assert not torch.equal(learn(0), learn(1))


def test_pairs_must_fit(folder):
    with pytest.raises(UserError, match="1 prompts without the concept came for 2 with it"):
        concept_vector(folder.text_encoder, ["a red star", "a blue ring"], ["a red star"], 1.0)


def test_what_lies_behind_the_states_is_left_alone(sdxl):
    """Of Stable Diffusion XL: pooled state and size numbers."""
    encoder = XlTextEncoder.load(sdxl)
    prompts, length = ["a red star", ""], encoder.length
    vector = concept_vector(encoder, ["a red star by monet"], ["a red star"], 1.0)
    assert vector.shape == (length, encoder.width)
    before, after = encoder.encode(prompts), Shifted(encoder, vector).encode(prompts)
    assert torch.equal(after[0, :length], before[0, :length] + vector)
    assert torch.equal(after[:, length:], before[:, length:])
    assert torch.equal(after[1], before[1])
