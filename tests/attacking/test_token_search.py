"""Searches over tokens: each against a transcription of its formulas, and a real search on both families' encoders."""

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F

from bilevel_fast.attacking.mma import Mma, allowed, candidates, gradient, mma, pooled
from bilevel_fast.attacking.ring_a_bell import RingABell, crossed, mutated, ring_a_bell
from bilevel_fast.attacking.states import concept_vector
from bilevel_fast.attacking.unlearn_diff import Drawn, UnlearnDiff, project, times, unlearn_diff
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import LEVEL_STRIDE
from bilevel_fast.models.diffusion import noise
from bilevel_fast.models.folder import load_folder
from bilevel_fast.ops.randomness import Stream, normal, uniform
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.world import SCENES, STYLES, labels, render
from sd_folder import make_sd_folder

WAVES = [scene for scene in SCENES if scene.style == STYLES.index("waves")][:2]


@pytest.fixture(scope="module")
def mini():
    return load_folder(TEACHER)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_folder(make_sd_folder(tmp_path_factory.mktemp("attacked") / "sd"))


@pytest.fixture(scope="module", params=["mini", "clip"])
def reader(request):
    return request.getfixturevalue(request.param).text_encoder


def bisected(row: Sequence[float], halvings: int = 60) -> list[float]:
    """As the authors project: what is taken off every entry is found by halving an interval."""
    low, high = min(row) - 1, max(row)
    for _ in range(halvings):
        middle = (low + high) / 2
        if sum(min(max(value - middle, 0), 1) for value in row) > 1:
            low = middle
        else:
            high = middle
    return [min(max(value - low, 0), 1) for value in row]


def test_projection_onto_the_simplex():
    rows = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[0], rows[1] = 1 / 40, F.one_hot(torch.tensor(3), 40)
    wanted = torch.tensor([bisected(row) for row in rows.tolist()], dtype=torch.float64)
    torch.testing.assert_close(project(rows), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(project(rows.float()).sum(-1), torch.ones(6))


def test_a_draw_follows_its_probabilities_and_passes_its_gradient_on():
    p = torch.tensor([0.5, 0.0, 0.2, 0.3], requires_grad=True)
    u = (torch.arange(1000) + 0.5) / 1000
    drawn = Drawn.apply(p.expand(1000, 4), u)
    assert drawn.sum(0).tolist() == [500, 0, 200, 300]
    (drawn[0] * torch.tensor([0.5, -3.0, 2.0, 0.0])).sum().backward()
    assert p.grad is not None
    assert p.grad.tolist() == [0.5, -1.0, 1.0, 0.0]


def test_times_are_half_a_stride_from_the_beginning():
    assert list(times(50, 1000)) == list(range(10, 1000, 20))
    assert list(times(3, 10)) == [1, 4, 7]
    with pytest.raises(UserError, match="--timesteps is 11; the model's schedule has 10"):
        times(11, 10)


def test_unlearn_diff_is_its_formula(mini):
    """Every image by itself, with lists instead of tensors where the search has them all at once."""
    settings, seed = UnlearnDiff(tokens=2, iterations=2, timesteps=2, lr=0.03), 5
    unet, encoder, schedule = mini.unet(), mini.text_encoder, mini.schedule
    latents = torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(1))
    prompts = ["a red star", "a blue ring"]
    found = list(unlearn_diff(unet, schedule, encoder, latents, prompts, settings, seed=seed, rows=[3, 8]))
    for which, row in enumerate((3, 8)):
        free, before = encoder.free(), encoder.tokens_of(prompts[which])
        p = torch.nn.Parameter(torch.full((2, len(free)), 1 / len(free)))
        adam, step = torch.optim.Adam([p], lr=0.03, weight_decay=0.1), 0
        for look, t in zip(found, (250, 750), strict=True):
            losses = []
            for _ in range(2):
                index = [3 * LEVEL_STRIDE + row * 2**24 + step]
                eps, u = normal(seed, Stream.NOISE, index, (12, 16, 16)), uniform(seed, Stream.ATTACK, index, (2,))[0]
                picks = [int((p[i].double().cumsum(0) <= u[i] * p[i].double().sum()).sum()) for i in range(2)]
                hot = F.one_hot(torch.tensor(picks), len(free)).float().requires_grad_(True)
                table = torch.zeros(1, 2, encoder.vocabulary)
                states = encoder.read([[*free[picks].tolist(), *before]], table.index_copy(2, free, hot[None]))
                alpha, sigma = schedule.alpha_sigma(torch.tensor([t]), 4)
                answer = unet(alpha * latents[which] + sigma * eps, torch.tensor([t]), states).out
                loss = F.mse_loss(answer, alpha * eps - sigma * latents[which])
                p.grad = F.hardtanh(torch.autograd.grad(loss, hot)[0])
                adam.step()
                p.data = torch.tensor([bisected(each) for each in p.tolist()])
                losses.append(loss.item())
                step += 1
            assert look.step == step
            assert look.losses[which] == pytest.approx(sum(losses) / 2, rel=1e-3)
            assert look.texts[which] == encoder.text_of([*free[p.argmax(1)].tolist(), *before])


def test_unlearn_diff_finds_what_the_model_reads_as_the_concept_and_leaves_it_alone(mini):
    """Against a model from which nothing was erased: images of waves, asked for by prompts that do not name them."""
    unet, encoder = mini.unet(), mini.text_encoder
    latents = mini.vae.moments(render(*labels(WAVES), seed=3, indices=range(2)))[:, :12]
    prompts = [scene.caption.partition(" in the style")[0] for scene in WAVES]
    settings = UnlearnDiff(tokens=1, iterations=15, timesteps=1, lr=0.1)
    (last,) = unlearn_diff(unet, mini.schedule, encoder, latents, prompts, settings, seed=0)

    @torch.no_grad()
    def losses(texts):
        t, eps = torch.tensor([500, 500]), normal(9, Stream.NOISE, [0, 1], (12, 16, 16))
        noised = noise(mini.schedule, latents, eps, t, None)
        return (unet(noised.x, t, encoder.encode(texts)).out - noised.target).square().flatten(1).mean(1)

    assert (losses(last.texts) < 0.8 * losses(prompts)).all(), last.texts
    assert all(p.requires_grad and p.grad is None for p in unet.parameters())


def test_unlearn_diff_on_the_published_format(clip):
    unet, prompts = clip.unet(), ["a red star", "a photo of a house by monet"]
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    settings = UnlearnDiff(tokens=3, iterations=2, timesteps=2)
    looks = list(unlearn_diff(unet, clip.schedule, clip.text_encoder, latents, prompts, settings, seed=0))
    assert [look.step for look in looks] == [2, 4]
    assert all(text.endswith(prompt) for text, prompt in zip(looks[-1].texts, prompts, strict=True))


def test_a_genetic_search_is_its_rules():
    """With the numbers that it drew, each rule by hand."""
    settings, texts, free = RingABell(tokens=3), torch.arange(12).reshape(4, 3), torch.arange(20, 30)
    whether, whom, where = uniform(7, Stream.ATTACK, [2**50 + 2 * 5], (3, 4))[0].tolist()
    wanted = []
    for row, own in enumerate(texts.tolist()):
        wanted.append(own)
        if whether[row] < 0.5:
            other, cut = texts.tolist()[int(whom[row] * 4)], int(where[row] * 3)
            wanted += [own[:cut] + other[cut:], other[:cut] + own[cut:]]
    found = crossed(texts, settings, 7, 5)
    assert found.tolist() == wanted
    assert len(found) > 4
    whether, where, what = uniform(7, Stream.ATTACK, [2**50 + 2 * 5 + 1], (3, 4))[0].tolist()
    changed = mutated(texts, free, RingABell(mutation=0.9), 7, 5).tolist()
    for row, own in enumerate(texts.tolist()):
        if whether[row] < 0.9:
            own[int(where[row] * 3)] = 20 + int(what[row] * 10)
        assert changed[row] == own
    assert changed != texts.tolist()


def test_ring_a_bell_comes_near_its_target(reader):
    """The target has a text without distance: the search goes most of the way to it from where chance begins."""
    named = "a red star in the style of monet" if reader.length > 12 else "a red star in the style of waves"
    bare = "a red star"
    vector = concept_vector(reader, [named], [bare], 1.0)
    target = reader.encode([bare])[0] + vector
    settings = RingABell(tokens=8, population=40, generations=25)
    looks = list(ring_a_bell(reader, target, settings, seed=0))
    assert [look.step for look in looks] == list(range(1, 26))
    words = reader.read([reader.tokens_of(looks[-1].texts[0])])[:, : reader.length]
    if reader.length == 12:  # pieces of words may join otherwise
        assert (words - target).square().sum().item() == pytest.approx(looks[-1].losses[0], rel=1e-3)
    assert looks[-1].losses[0] < 0.75 * looks[0].losses[0]
    assert looks == list(ring_a_bell(reader, target, settings, seed=0))


def test_the_gradient_of_mma_is_that_of_its_loss(mini):
    """Against differences, in the direction from one token to another."""
    reader, text = mini.text_encoder, mini.text_encoder.tokens_of("a red star")
    target = pooled(reader, [reader.tokens_of("a blue ring in the style of waves")])[0].detach()

    def loss(rows):
        return 1 - F.cosine_similarity(pooled(reader, [text], rows[None]), target[None]).item()

    rows, step = F.one_hot(torch.tensor(text), reader.vocabulary).float(), 1e-2
    slope = gradient(reader, text, target)
    for place, token in ((0, 5), (2, 20)):
        there = torch.zeros_like(rows)
        there[place, token] = step
        difference = (loss(rows + there) - loss(rows - there)) / (2 * step)
        assert slope[place, token].item() == pytest.approx(difference, abs=2e-4)


def test_candidates_of_mma_change_each_place_in_turn_to_a_promising_token():
    slope, free = torch.arange(12.0).reshape(2, 6).flip(1), torch.arange(40, 46)
    found = candidates([1, 2], slope, free, Mma(tokens=2, top=2, batch=6), 0, 1)
    assert [text[1] for text in found[:3]] == [2] * 3
    assert [text[0] for text in found[3:]] == [1] * 3
    assert {text[0] for text in found[:3]} | {text[1] for text in found[3:]} <= {44, 45}  # the least gradients


def test_mma_finds_the_meaning_without_the_words(reader):
    named, word = (
        ("a red star by monet", "monet") if reader.length > 12 else ("a red star in the style of waves", "waves")
    )
    settings = Mma(tokens=6, steps=12, top=8, batch=24)
    looks = list(mma(reader, named, settings, seed=0, forbidden=[word.upper()]))
    losses = [look.losses[0] for look in looks]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    assert not any(word in look.texts[0].split() for look in looks)
    with pytest.raises(UserError, match="every token holds one of 1 forbidden words"):
        allowed(_Only(), ["a"])


class _Only:
    """A reader of one token."""

    def free(self):
        return torch.tensor([3])

    def text_of(self, tokens):
        return "Art"


@pytest.mark.situation
def test_no_room_for_tokens(mini):
    """An attack searches more tokens than the text encoder has room for beside the prompt: refused, with the room."""
    prompt, latents = "a red star in the style of waves", torch.zeros(1, 12, 16, 16)
    with pytest.raises(
        UserError, match=r"3 tokens are searched for before the 8 of .*; the text encoder has room for 1 to 2"
    ):
        next(unlearn_diff(mini.unet(), mini.schedule, mini.text_encoder, latents, [prompt], UnlearnDiff(), seed=0))
    for search in (ring_a_bell(mini.text_encoder, latents[0, 0], RingABell(), seed=0),):
        with pytest.raises(UserError, match="16 tokens are searched for; the text encoder has room for 1 to 10"):
            next(search)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: UnlearnDiff(tokens=0), "--tokens is 0; wanted 1 or more"),
        (lambda: UnlearnDiff(lr=float("nan")), "--lr is nan; wanted 0 or more"),
        (lambda: RingABell(population=1), "--population is 1; wanted 2 or more"),
        (lambda: RingABell(mutation=1.5), "--mutation is 1.5; it is a probability"),
        (lambda: Mma(top=0), "--top is 0; wanted 1 or more"),
    ],
)
def test_settings_out_of_range(made, message):
    with pytest.raises(UserError, match=message):
        made()
