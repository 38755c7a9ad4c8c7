"""P-ESD against a transcription: masks learnt under ESD's loss, straight through; bounds and refusals."""

import pytest
import torch

from bilevel_fast import erase
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.erasing import p_esd
from bilevel_fast.erasing.concept_prune import FIRST
from bilevel_fast.erasing.edit import read_records
from bilevel_fast.erasing.esd import Esd
from bilevel_fast.erasing.p_esd import Learning, PEsd
from bilevel_fast.erasing.pairs import Pair
from bilevel_fast.models.folder import load_folder, load_unet
from bilevel_fast.training.lower import Answers
from bilevel_fast.training.teacher import Teacher
from commands import run_command
from mini_folder import make_mini_folder
from mutants import mutated

PAIRS = [Pair("a red star in the style of waves", "a red star"), Pair("in the style of waves")]
LEARNING = Learning(ratio=0.3, updates=3, lr=0.7, eta=0.5, steps=4, guidance=2.0, batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return load_folder(make_mini_folder(tmp_path_factory.mktemp("models") / "model"))


class Hard(torch.autograd.Function):
    """1(s >= 0), whose gradient is that of s."""

    @staticmethod
    def forward(_ctx, s):
        return (s >= 0).to(s.dtype)

    @staticmethod
    def backward(_ctx, gradient):
        return gradient


@pytest.fixture(scope="module")
def by_hand(folder):
    """Which weights go, by autograd through the masks of a copy whose weights are set anew in each update."""
    frozen, masked = folder.unet().requires_grad_(False), folder.unet()
    names = [n for n, _ in frozen.named_parameters() if ".attn2." in n and n.endswith(".weight")]
    scores = {n: torch.ones_like(frozen.get_parameter(n)).requires_grad_() for n in names}
    adam = torch.optim.Adam(scores.values(), lr=LEARNING.lr)
    encoder, null = folder.text_encoder, folder.text_encoder.encode([""])
    painter = Esd(Teacher(frozen), null, LEARNING.eta, LEARNING.guidance, LEARNING.steps, False)
    answers = Answers(Teacher(frozen), folder.schedule, 5)
    for number in range(LEARNING.updates):
        rows = torch.arange(2) + 2 * number
        text, anchor = (encoder.encode([getattr(PAIRS[r % 2], s) for r in rows]) for s in ("erase", "guide"))
        batch = Batch(torch.zeros(2, 12, 8, 8), text, anchor, rows + FIRST)
        weights = {n: Hard.apply(scores[n]) * frozen.get_parameter(n) for n in names}
        with torch.no_grad():
            for n, w in weights.items():
                masked.get_parameter(n).copy_(w)
        x, t, order = painter.paint(masked, answers, batch)
        c, a = (frozen(x, t, some[order]).out for some in (text, anchor))
        loss = (masked(x, t, text[order]).out - (a - LEARNING.eta * (c - a))).square().mean()
        by_weight = torch.autograd.grad(loss, [masked.get_parameter(n) for n in names])
        adam.zero_grad()
        torch.autograd.backward(list(weights.values()), list(by_weight))
        adam.step()
    every = torch.cat([s.detach().flatten() for s in scores.values()])
    assert 0 < (every < 0).sum() < len(every)
    bound = every.sort().values[int(LEARNING.ratio * len(every)) - 1]
    return {n: (s < 0) & (s <= bound) for n, s in scores.items()}


def agreement(module, folder, by_hand):
    """Share of the weights on which both agree."""
    unet = folder.unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    learning = module.Learning(**vars(LEARNING))
    masks, losses = module.learn(unet, folder.schedule, folder.text_encoder, PAIRS, learning, 5, 8)
    assert len(losses) == LEARNING.updates
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items()), "only masks are learnt"
    assert all(p.grad is None for p in unet.parameters()), "and nobody else's gradient"
    assert masks.keys() == by_hand.keys()
    same = sum(int((masks[name] == mask).sum()) for name, mask in by_hand.items())
    return same / sum(mask.numel() for mask in by_hand.values())


def test_the_masks(folder, by_hand):
    assert agreement(p_esd, folder, by_hand) > 0.999


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weights[name].float() * gradients[name].float()", "gradients[name].float()"),
        ("score.grad = ", "score.grad = -1 * "),
        ("(w * (scores[name] >= 0))", "(w * 1)"),
    ],
)
def test_a_planted_bug_is_seen(folder, by_hand, old, new, tmp_path):
    assert agreement(mutated(p_esd.__file__, old, new, tmp_path), folder, by_hand) < 0.95


def test_no_more_goes_than_may():
    scores = {"a": torch.tensor([-3.0, -1.0, 1.0]), "b": torch.tensor([[-2.0], [2.0], [0.0], [1.0]])}
    found = {r: [int(m.sum()) for m in p_esd._lowest(scores, r).values()] for r in (0.1, 0.15, 0.3, 0.9)}
    assert found == {0.1: [0, 0], 0.15: [1, 0], 0.3: [1, 1], 0.9: [2, 1]}
    assert p_esd._lowest({"a": torch.full((10,), -1.0)}, 0.3)["a"].sum() == 3, "equal ones"


def test_the_command_zeros_and_changes_nothing_else(folder, tmp_path):
    made = run_command(
        erase.main, "p-esd", "--model", folder.path, "--erase", "waves", "--out", tmp_path / "out", "--updates", 2,
        "--lr", 2, "--steps", 3, "--batch", 1, "--ratio", 0.2,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "ESD's loss: " in made.stdout
    before, after = folder.unet().state_dict(), load_unet(tmp_path / "out").state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".attn2." in name for name in moved)
    assert all(((after[name] == before[name]) | (after[name] == 0)).all() for name in moved)
    (record,) = read_records(tmp_path / "out")
    assert (record.method, record.settings["size"]) == ("p-esd", 8)


@pytest.mark.situation
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"ratio": 0.0}, "--ratio is 0.0; wanted 0 < ratio <= 1"),
        ({"updates": 0}, "--updates is 0; wanted 1 or more"),
        ({"lr": -1.0}, "--lr is -1.0; wanted a positive number"),
        ({"steps": 2}, "--steps is 2; wanted 3 or more"),
        ({"size": 0}, "--size is 0; wanted 1 or more"),
    ],
)
def test_settings_that_cannot_be(flags, told):
    """`erase p-esd` with a share, a rate or numbers of steps that cannot be: one line with the flag."""
    with pytest.raises(UserError, match=told):
        PEsd(**flags)
