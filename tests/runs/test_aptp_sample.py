"""`sample --mixture`: every prompt is drawn by its expert, whatever else is asked for."""

import re

import pytest
import torch

from bilevel_fast import sample
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder, load_unet, save_student
from bilevel_fast.models.structure import Structure
from bilevel_fast.pruning.aptp.encoders import TextPrompts, centred, encode_all
from bilevel_fast.pruning.aptp.mixture_folder import Mixture, write_mixture
from bilevel_fast.pruning.aptp.router import Router
from bilevel_fast.pruning.aptp.sampling import expert_by_expert, one_batch
from bilevel_fast.pruning.budget import MacBudget
from bilevel_fast.sampling import to_grid
from bilevel_fast.sampling.generate import generate
from bilevel_fast.worlds.mini.world import SCENES
from mini_folder import TINY, make_mini_folder

CAPTIONS = [scene.caption for scene in SCENES]
STRUCTURES = (
    Structure.uniform(TINY, 0.3),
    Structure.uniform(TINY, 0.6, ["up_blocks.2.attentions.1", "up_blocks.0.resnets.0"]),
    Structure.uniform(TINY, 0.9),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_folder(make_mini_folder(tmp_path_factory.mktemp("models") / "teacher"))


@pytest.fixture(scope="module")
def mixture(teacher, tmp_path_factory):
    encoder, embeddings = centred(TextPrompts(teacher.text_encoder), CAPTIONS)
    router = Router(TINY, encoder.width, 3, seed=1).requires_grad_(False)
    router.predictor.linear.bias += torch.linspace(-3, 3, len(router.predictor.linear.bias))
    router.rebalance(embeddings)
    path = tmp_path_factory.mktemp("mixtures") / "mixture"
    write_mixture(path, teacher, teacher.unet(), router, encoder, STRUCTURES, MacBudget(0.7, 8, 12), {})
    return Mixture.load(path)


@pytest.fixture(scope="module")
def prompts(mixture):
    """Five, of all experts, in no order: the captions that are the most clearly theirs. The codes of a router that has
    learned nothing are so alike that for some captions rounding decides."""
    router = mixture.router
    scores = router._similarity(encode_all(mixture.encoder, CAPTIONS)) + router.balance
    best = scores.topk(2, dim=1)
    clear, expert = best.values[:, 0] - best.values[:, 1], best.indices[:, 0]
    first, second = ([int(torch.where(expert == k, clear, 0).topk(2).indices[n]) for k in range(3)] for n in range(2))
    assert clear[[*first, *second]].min() > 1e-6
    return [CAPTIONS[n] for n in (first[2], first[0], first[1], second[2], second[0])]


@pytest.fixture
def draw(monkeypatch, tmp_path, capsys):
    """Calls the command; returns its images (seeds, prompts, ...) and the lines that it printed."""

    def call(prompts, *flags):
        caught = {}

        def picture(rows, *_args):
            caught.update(rows)

        monkeypatch.setattr(to_grid, "picture", picture)
        monkeypatch.setattr(to_grid, "png", lambda _: b"")
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        argv = ["sample", "--prompts", *prompts, "--steps", "3", "--out", out, "--device", "cpu", *flags]
        monkeypatch.setattr("sys.argv", [str(arg) for arg in argv])
        sample.main()
        return torch.stack(list(caught.values())), capsys.readouterr().out.splitlines()

    return call


def close(ours, theirs):
    """Of pixels in [-1, 1] or so: the sum of a convolution depends a little on how many rows it has."""
    return torch.allclose(ours, theirs, atol=1e-4)


def test_every_prompt_is_drawn_by_its_expert(draw, mixture, prompts):
    images, lines = draw(prompts, "--mixture", mixture.path, "--seeds", 0, 5)
    expert = mixture.route(prompts).tolist()
    assert lines[:-1] == [f"expert {k}  {prompt}" for k, prompt in zip(expert, prompts, strict=True)]
    assert expert[:3] == [2, 0, 1]
    assert images.shape[:2] == (2, 5)
    for n in range(3):
        alone, _ = draw(prompts[n : n + 1], "--model", mixture.expert_folder(expert[n]), "--seeds", 0, 5)
        assert close(images[:, n : n + 1], alone)
    other, _ = draw(prompts[:1], "--model", mixture.expert_folder(0), "--seeds", 0, 5)
    assert not close(images[:, :1], other)  # whose it is shows


@pytest.mark.parametrize("dense", [False, True])
def test_an_image_does_not_depend_on_the_other_prompts(draw, mixture, teacher, prompts, dense):
    flags = ["--mixture", mixture.path, *(["--model", teacher.path] if dense else [])]
    images, _ = draw(prompts, *flags)
    backwards, _ = draw(prompts[::-1], *flags)
    assert close(backwards.flip(1), images)
    few, _ = draw(prompts[1:3], *flags)
    assert close(few, images[:, 1:3])


@pytest.mark.parametrize("guidance", [1, 3])
def test_one_batch_from_the_dense_model(draw, mixture, teacher, prompts, guidance):
    flags = ["--mixture", mixture.path, "--seeds", 1, 2, "--guidance", guidance]
    apart, lines = draw(prompts, *flags)
    together, same_lines = draw(prompts, *flags, "--model", teacher.path)
    assert close(apart, together)
    assert lines[:-1] == same_lines[:-1]


def test_an_expert_that_has_learned_since(draw, mixture, teacher, prompts):
    """Its prompts change, those of the others do not; the dense model knows nothing of it."""
    before, _ = draw(prompts, "--mixture", mixture.path)
    whole, _ = draw(prompts, "--mixture", mixture.path, "--model", teacher.path)
    unet = load_unet(mixture.expert_folder(0))
    old = {name: p.detach().clone() for name, p in unet.named_parameters()}
    try:
        with torch.no_grad():
            unet.conv_out.weight.mul_(2)
        save_student(mixture.expert_folder(0), teacher, unet, overwrite=True)
        after, _ = draw(prompts, "--mixture", mixture.path)
        still, _ = draw(prompts, "--mixture", mixture.path, "--model", teacher.path)
    finally:
        unet.load_state_dict(old)
        save_student(mixture.expert_folder(0), teacher, unet, overwrite=True)
    for n, k in enumerate(mixture.route(prompts).tolist()):
        assert close(after[:, n], before[:, n]) == (k != 0)
    assert torch.equal(whole, still)


def test_batches_smaller_than_the_prompts(mixture, teacher, prompts):
    """Each batch has the experts of its own prompts."""
    expert = mixture.route(prompts)
    assert expert[2:4].tolist() != expert[:2].tolist()
    ((numbers, unet, model),) = one_batch(mixture, teacher, expert, torch.device("cpu"))
    assert list(numbers) == [0, 1, 2, 3, 4]
    found = [
        generate(
            unet, teacher.schedule, teacher.text_encoder, prompts, range(5), seed=0, size=(8, 8), guidance=3.0, steps=3,
            batch=batch, model=model,
        )
        for batch in (2, 36)
    ]  # fmt: skip
    assert close(*found)


def test_one_expert_at_a_time_is_read(mixture, prompts, monkeypatch):
    read = []
    monkeypatch.setattr("bilevel_fast.pruning.aptp.sampling.load_unet", lambda path: read.append(path.name))
    parts = expert_by_expert(mixture, torch.tensor([2, 0, 2]))
    assert (next(parts)[0], read) == ([1], ["0"])
    assert (next(parts)[0], read) == ([0, 2], ["0", "2"])
    assert next(parts, None) is None


def test_refusals(draw, mixture, teacher, prompts, tmp_path):
    other = make_mini_folder(tmp_path / "other", seed=1)
    for flags, message in (
        (["--mixture", mixture.path, "--model", mixture.expert_folder(0)], "is pruned; wanted the dense model of"),
        (["--mixture", mixture.path, "--model", other], "is another base model than that of"),
        (["--mixture", tmp_path / "nowhere"], "nowhere does not exist"),
        (["--prompt-encoder", tmp_path], "--prompt-encoder is for the router of a --mixture, and none was named"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            draw(prompts, *flags)
    with pytest.raises(UserError, match="another base model"):
        one_batch(mixture, load_folder(other), torch.zeros(1, dtype=torch.int64), torch.device("cpu"))
