"""Batches: a pure function of (seed, step), each sample once per epoch, the posterior sampled as it says."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bilevel_fast.base.devices import Ranks
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import LEVEL_STRIDE, TENSORS
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.cache import Index
from bilevel_fast.data.sources import EXACT_LOGVAR, MemorySource, exact_moments
from bilevel_fast.data.writer import CacheWriter
from bilevel_fast.models.conditioning import SIZES, pack, unpack

SAMPLES, SHAPE = 10, (2, 3, 5)


class Spelling:
    """A text encoder whose states spell the prompt, so that a test can read them back."""

    width, length, pooled = 2, 40, 0

    def __init__(self) -> None:
        self.encoded: list[list[str]] = []

    def encode(self, prompts: Sequence[str]) -> Tensor:
        self.encoded.append(list(prompts))
        codes = [[ord(letter) for letter in prompt.ljust(self.length)] for prompt in prompts]
        return torch.tensor(codes, dtype=torch.float32)[..., None].repeat(1, 1, self.width)


def read(states: Tensor) -> list[str]:
    return ["".join(chr(int(code)) for code in row[:, 0]).rstrip() for row in states]


def constant_latents() -> Tensor:
    """(N, C, H, W): sample i is i everywhere."""
    return torch.arange(float(SAMPLES)).view(-1, 1, 1, 1).expand(-1, *SHAPE).clone()


def images() -> MemorySource:
    """Sample i has mean i, and i % 3 + 1 captions."""
    captions = [[f"{i} {letter}" for letter in "abc"[: i % 3 + 1]] for i in range(SAMPLES)]
    return MemorySource(exact_moments(constant_latents()), captions)


def concepts() -> MemorySource:
    captions = [[f"star {i} by X"] for i in range(SAMPLES)]
    return MemorySource(exact_moments(constant_latents()), captions, [f"star {i}" for i in range(SAMPLES)])


def positions(batch) -> list[int]:
    return [round(value) for value in batch.latents[:, 0, 0, 0].tolist()]


def assert_same(a, b) -> None:
    for name in ("latents", "text", "index"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_a_batch_depends_on_seed_and_step_only():
    first, second = (Batches(images(), Spelling(), 4, seed=3, p_uncond=0.3) for _ in range(2))
    for step in (0, 1, 2, 3):
        first(step)
    assert_same(first(7), second(7))
    assert_same(first(0), second(0))
    assert not torch.equal(first(7).latents, Batches(images(), Spelling(), 4, seed=4)(7).latents)


def test_captions_belong_to_their_latents():
    batches = Batches(images(), Spelling(), 4, seed=0)
    for step in range(10):
        batch = batches(step)
        assert [int(text.split()[0]) for text in read(batch.text)] == positions(batch)
        assert list(batch.captions) == read(batch.text)
        assert batch.index.tolist() == list(range(4 * step, 4 * step + 4))
        assert batch.anchor is None


def test_every_sample_comes_once_per_epoch_in_another_order():
    batches = Batches(images(), Spelling(), 4, seed=0)  # 4 does not divide 10: batches lie across epochs
    order = [position for step in range(10) for position in positions(batches(step))]
    epochs = [order[i : i + SAMPLES] for i in range(0, 40, SAMPLES)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_every_caption_and_every_view_is_drawn_evenly():
    views = 3
    moments = exact_moments(torch.arange(views).view(-1, 1, 1, 1).expand(-1, *SHAPE).float())
    source = MemorySource(moments.transpose(0, 1), [["a", "b", "c", "d"]])
    batch = Batches(source, Spelling(), 2400, seed=5)(0)
    texts, seen = read(batch.text), positions(batch)
    # Binomial: four standard deviations of 2400 draws.
    for caption in "abcd":
        assert abs(texts.count(caption) - 600) < 4 * (2400 * 1 / 4 * 3 / 4) ** 0.5
    for view in range(views):
        assert abs(seen.count(view) - 800) < 4 * (2400 * 1 / 3 * 2 / 3) ** 0.5
    together = sum(text == "a" and view == 0 for text, view in zip(texts, seen, strict=True))
    assert abs(together - 200) < 4 * (2400 * 1 / 12 * 11 / 12) ** 0.5  # caption and view are independent


def test_the_posterior_is_sampled_with_its_mean_and_deviation():
    mean, std = 1.5, 0.25
    latents = torch.full((1, *SHAPE), mean)
    moments = torch.cat([latents, torch.full_like(latents, 2 * torch.tensor(std).log().item())], dim=1)
    drawn = Batches(MemorySource(moments[:, None], [["a"]]), Spelling(), 1000, seed=1)(0).latents
    n = drawn.numel()
    assert abs(drawn.mean() - mean) < 4 * std / n**0.5
    assert abs(drawn.std() - std) < 4 * std / (2 * n) ** 0.5
    assert drawn.unique().numel() > 0.99 * n  # one draw per element, not one per sample


def test_dropped_captions_are_the_null_prompt():
    batch = Batches(images(), Spelling(), 2000, seed=1, p_uncond=0.1)(0)
    dropped = read(batch.text).count("")
    assert batch.captions.count("") == dropped
    assert abs(dropped - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    assert set(read(Batches(images(), Spelling(), 20, seed=1, p_uncond=1.0)(0).text)) == {""}
    assert "" not in read(Batches(images(), Spelling(), 200, seed=1)(0).text)


def test_anchors():
    null = Batches(concepts(), Spelling(), 4, seed=0, anchor="null")(2)
    assert read(null.anchor) == [""] * 4
    phrase = Batches(concepts(), Spelling(), 4, seed=0, anchor="phrase")(2)
    assert read(phrase.text) == [f"star {i} by X" for i in positions(phrase)]
    assert read(phrase.anchor) == [f"star {i}" for i in positions(phrase)]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("anchor", ["none", "null", "phrase"])
@pytest.mark.parametrize("max_states", [0, 1024], ids=["each batch", "a table"])
def test_every_tensor_owns_its_memory(anchor, level, max_states):
    """A loader pins them, and torch writes to no tensor whose elements share memory."""
    batch = Batches(concepts(), Spelling(), 4, seed=0, level=level, anchor=anchor, max_states=max_states)(1)
    tensors = {name: getattr(batch.drawn(0, 10), name) for name in TENSORS}
    assert (tensors["anchor"] is None) == (anchor == "none")
    for name, x in tensors.items():
        assert x is None or torch._debug_has_internal_overlap(x) == 0, name
        assert x is None or torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x).equal(x), name


def test_levels_share_no_random_numbers():
    lower, upper = (Batches(images(), Spelling(), 10, seed=0, level=level)(0) for level in (0, 1))
    assert upper.index.tolist() == [LEVEL_STRIDE + i for i in range(10)]
    assert positions(lower) != positions(upper)


@pytest.mark.parametrize("max_states", [0, 100])
def test_states_do_not_depend_on_which_batches_came_before(max_states):
    """A state's last bits may depend on the batch it was encoded in, so what is encoded together must be fixed."""

    class Sensitive(Spelling):
        def encode(self, prompts):
            return super().encode(prompts) + 1e-6 * hash(tuple(prompts)) % 7

    def batches() -> Batches:
        return Batches(concepts(), Sensitive(), 4, seed=0, anchor="phrase", max_states=max_states)

    ran = batches()
    for step in range(5):
        ran(step)
    resumed = batches()
    assert torch.equal(ran(5).text, resumed(5).text)
    assert torch.equal(ran(5).anchor, resumed(5).anchor)


def test_few_captions_are_encoded_once_and_many_are_not_kept():
    encoder = Spelling()
    batches = Batches(concepts(), encoder, 4, seed=0, anchor="phrase", max_states=21)  # 10 + 10 + the null prompt
    for step in range(5):
        batches(step)
    wanted = ["", *(f"star {i}{end}" for i in range(10) for end in ("", " by X"))]
    assert sorted(prompt for prompts in encoder.encoded for prompt in prompts) == sorted(wanted)
    encoder = Spelling()
    batches = Batches(concepts(), encoder, 4, seed=0, anchor="phrase", max_states=20)
    for step in range(5):
        batches(step)
    assert [len(prompts) for prompts in encoder.encoded] == [4, 4] * 5


def test_a_cache_on_disk_gives_the_same_batches(tmp_path):
    memory = concepts()
    writer = CacheWriter(tmp_path, Index("concepts", SHAPE, vae="", dtype="float32"), shard_samples=3)
    for i in range(SAMPLES):
        writer.add(memory.moments([i], [0]), memory.captions(i), memory.anchor(i))
    pair = [Batches(source, Spelling(), 4, seed=2, anchor="phrase") for source in (memory, writer.finish())]
    for step in range(4):
        from_memory, from_disk = (batches(step) for batches in pair)
        assert_same(from_memory, from_disk)
        assert torch.equal(from_memory.anchor, from_disk.anchor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch size is 0"),
        ({"p_uncond": 1.5}, "p_uncond is 1.5"),
        ({"anchor": "nul"}, "anchor 'nul' does not exist; did you mean 'null'"),
        ({"anchor": "phrase"}, "wants a bank of concepts"),
        ({"anchor": "null", "p_uncond": 0.1}, "p_uncond is 0.1, but"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Batches(images(), Spelling(), **{"batch_size": 4, "seed": 0, **settings})


class Counting(Spelling):
    """States that depend on how many texts were encoded at once, as their last bits may."""

    def encode(self, prompts):
        return super().encode(prompts) + len(prompts)


@pytest.mark.parametrize("few", [0, 100])
def test_leaves_are_the_same_whoever_makes_them(few):
    """Of a batch of 8 in four leaves: what 1, 2 and 4 ranks make, side by side."""
    settings = {"level": 1, "anchor": "phrase", "max_states": few, "leaves": 4}
    for step in range(3):
        whole = Batches(concepts(), Counting(), 8, 3, **settings)(step)
        for world in (2, 4):
            parts = [
                Batches(concepts(), Counting(), 8, 3, **settings, ranks=Ranks(r, world))(step) for r in range(world)
            ]
            for name in ("latents", "text", "anchor", "index"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
            assert sum((part.captions for part in parts), ()) == whole.captions
    one = Batches(concepts(), Spelling(), 8, 3, level=1, anchor="phrase")(0)
    other = Batches(concepts(), Spelling(), 8, 3, **settings)(0)
    assert_same(one, other)


class Packed(Spelling):
    """As a text encoder of Stable Diffusion XL: a pooled state of one number, and sizes of -1."""

    pooled = 1

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return pack(super().encode(prompts), torch.ones(len(prompts), 1), torch.full((len(prompts), SIZES), -1.0))


def test_size_numbers_are_those_of_the_view_that_is_shown(tmp_path):
    writer = CacheWriter(tmp_path, Index("images", SHAPE, vae="", views=3, dtype="float32", sizes=True))
    for i in range(SAMPLES):
        views = torch.stack([torch.full(SHAPE, 10.0 * i + view) for view in range(3)])
        moments = torch.cat([views, torch.full_like(views, EXACT_LOGVAR)], dim=1)
        writer.add(moments, [f"picture {i}"], sizes=[[10 * i + view] * SIZES for view in range(3)])
    cache = writer.finish()
    for p_uncond in (0.0, 1.0):
        batch = Batches(cache, Packed(), 7, seed=3, p_uncond=p_uncond)(1)
        states, extra = unpack(batch.text, Packed.pooled)
        assert read(states) == (["" if p_uncond else f"picture {round(n) // 10}" for n in extra.sizes[:, 0].tolist()])
        torch.testing.assert_close(extra.sizes, batch.latents[:, 0, 0, :1].expand(-1, SIZES), rtol=0, atol=1e-4)
        assert torch.equal(extra.pooled, torch.ones(7, 1))
    bank = Batches(concepts(), Packed(), 3, seed=3, anchor="phrase")(0)
    for text in (bank.text, bank.anchor):
        assert (unpack(text, Packed.pooled)[1].sizes == -1).all(), "a bank is of the model's own size"
