"""Edits as upper steps: what they solve, that many are as good as one, and training with them."""

import copy

import pytest
import torch

from bilevel_fast.data.bank import Concept, anchor_for
from bilevel_fast.erasing import uce
from bilevel_fast.erasing.concept_prune import second_matrices
from bilevel_fast.erasing.loop_edits import PruneMasks, UceProjection, projection
from bilevel_fast.erasing.pairs import Pair
from bilevel_fast.models.folder import load_folder
from bilevel_fast.ops.graphs import WARMUP
from bilevel_fast.training.graphs import Graphs
from bilevel_fast.training.levels import Editing, descend
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.world import SCENES, STYLES, is_held_out
from replay import on_the_cpu
from world import make_levels, make_models

SMALL = [
    "--preset",
    "smoke",
    "--lower.batch",
    "1",
    "--checkpoint-every",
    "1",
    "--log-every",
    "1",
    "--lower.warmup",
    "0",
]
FEW = ["--upper.concept-prune.steps", "3", "--upper.concept-prune.prompts", "2"]


def few_texts(width: int = 48, erased: int = 3, kept: int = 5, seed: int = 0):
    """Tokens to erase with their guides, alike as those of one text encoder are, and tokens to keep."""
    make = torch.Generator().manual_seed(seed)
    mean = torch.randn(width, dtype=torch.float64, generator=make)
    e, g = (mean + 0.5 * torch.randn(erased, width, dtype=torch.float64, generator=make) for _ in range(2))
    p = mean + 0.5 * torch.randn(kept, width, dtype=torch.float64, generator=make)
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)[:erased, None]
    return uce.Matched(e, g, weight), p


def apart(w, texts: uce.Matched) -> float:
    """How far erased texts are from their guides, as a matrix sees them."""
    return ((texts.erased - texts.guide) @ w.T).norm().item()


def test_one_two_and_twenty_projections_are_the_same():
    texts, kept = few_texts()
    matrix, directions = projection(texts, 1e6 * kept.T @ kept, ridge=0.01)
    assert directions == 3
    w = torch.randn(7, 48, dtype=torch.float64)
    p = torch.eye(48, dtype=torch.float64) + matrix
    first = w @ p
    for times in (1, 2, 20):
        w_n = w @ torch.linalg.matrix_power(p, times)
        torch.testing.assert_close(w_n, first, rtol=0, atol=1e-9)
        assert apart(w_n, texts) < 1e-9 * apart(w, texts), "a text to erase ends at its guide"
        assert ((w_n - w) @ kept.T).norm() < 1e-4 * (w @ kept.T).norm(), "a text to keep stays"


def test_the_guide_stays_where_it_is_held():
    """Texts meet near the heavier one: at the guide, if it is preserved as well, as it often is by lower captions."""
    texts, kept = few_texts()
    matrix, _ = projection(texts, 1e6 * (kept.T @ kept + texts.guide.T @ texts.guide), ridge=0.01)
    w = torch.randn(7, 48, dtype=torch.float64)
    wanted, found = w @ texts.guide.T, (w + w @ matrix) @ texts.erased.T
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_projection_against_least_squares():
    """One direction: the least change, in the norm of what should stay, among all W' with W' k_e = W' k_g."""
    texts, kept = few_texts(width=12, erased=1)
    ridge, held_by = 0.3, kept.T @ kept
    h = held_by + texts.weight * texts.guide.T @ texts.guide + ridge * torch.eye(12, dtype=torch.float64)
    apart_by = (texts.erased - texts.guide)[0]
    w = torch.randn(4, 12, dtype=torch.float64)
    # the conditions of the optimum, row by row: (x - w) H + nu d^T = 0 and x d = 0
    system = torch.zeros(13, 13, dtype=torch.float64)
    system[:12, :12], system[12, :12], system[:12, 12] = h, apart_by, apart_by
    right = torch.cat([h @ w.T, torch.zeros(1, 4, dtype=torch.float64)])
    expected = torch.linalg.solve(system, right)[:12].T
    matrix, directions = projection(texts, held_by, ridge)
    assert directions == 1
    torch.testing.assert_close(w + w @ matrix, expected, rtol=0, atol=1e-10)


def test_directions_that_should_stay_are_left_alone():
    """One edit of UCE would take out less than half of them: repeated, it would take out all."""
    texts, _ = few_texts()
    apart_by = texts.erased - texts.guide
    matrix, directions = projection(texts, 1e3 * apart_by.T @ apart_by, ridge=0.01)
    assert directions == 0
    assert not matrix.any()
    matrix, directions = projection(uce.Matched(texts.guide, texts.guide, texts.weight), 0 * matrix, ridge=0.01)
    assert directions == 0, "erased and guide equal: nothing changes"


@pytest.fixture(scope="module")
def teacher():
    return load_folder(TEACHER)


def test_published_uce_cannot_be_repeated_on_the_mini_world(teacher):
    """Why the loop has a form of its own: the same texts, applied 300 times; 1 and 300 of ours are the same."""
    concept, style = Concept("in the style of waves"), STYLES.index("waves")
    pairs = [Pair(s.caption, anchor_for(s.caption, concept)) for s in SCENES if s.style == style and not is_held_out(s)]
    kept = [scene.caption for scene in SCENES if scene.style != style]
    encoder, texts = teacher.text_encoder, uce.match(teacher.text_encoder, pairs)
    published = uce.solve(texts, uce.gram(encoder, dict.fromkeys(["", *kept], 0.1)), 0.5)
    texts = uce.Matched(texts.erased, texts.guide, texts.weight / len(pairs))
    ours, directions = projection(texts, uce.gram(encoder, dict.fromkeys(["", *kept], 1 / (1 + len(kept)))), 0.5)
    assert 0 < directions < 8
    eye, states = torch.eye(encoder.width, dtype=torch.float64), encoder.encode(kept[::7]).double().flatten(0, 1)
    published, ours = (torch.linalg.matrix_power(eye + d, 300) - eye for d in (published, ours))
    assert (states @ published.T).norm() > 1e3 * states.norm()
    assert (states @ ours.T).norm() < 0.05 * states.norm()
    style_gone = (texts.erased - texts.guide) @ (eye + ours).T
    assert style_gone.norm() < 0.7 * (texts.erased - texts.guide).norm()


def masks_of(flat: FlatParameters) -> dict[str, torch.Tensor]:
    return {name: torch.rand(w.shape) < 0.3 for name, w in second_matrices(flat.module).items()}


def make_edit(kind: str, flat: FlatParameters):
    if kind == "masks":
        masks = masks_of(flat)
        return PruneMasks(flat, list(masks), "", lambda: masks, 0)
    texts, kept = few_texts(width=16, kept=2)
    names = [name for name, _ in uce.matrices(flat.module)]
    return UceProjection(flat, names, "", projection(texts, kept.T @ kept, 0.01)[0])


@pytest.mark.parametrize("kind", ["uce", "masks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_edit_moves_masters_copy_and_average_alike(kind, dtype):
    flat = FlatParameters(make_models()[1], dtype, average=True)
    flat.average.mul_(2)
    before, gap = copy.deepcopy(flat.state_dict()), flat.master.clone()
    edit = make_edit(kind, flat)
    edit.prepare(0)
    terms = edit.apply()
    after, average = flat.state_dict(), flat.state_dict(flat.average)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(edit.names)
    for name in moved:
        torch.testing.assert_close(average[name], 2 * after[name], rtol=0, atol=1e-6)
        if kind == "masks":
            assert not after[name][edit.masks[name]].any()
            assert torch.equal(after[name][~edit.masks[name]], before[name][~edit.masks[name]])
    assert torch.equal(flat.compute, flat.master.to(dtype))
    assert terms["edit_moved"].item() == pytest.approx((flat.master - gap).norm().item(), rel=1e-4)
    share = terms["edit_moved"] / torch.cat([after[name].flatten() for name in moved]).norm()
    assert terms["edit_share"].item() == pytest.approx(share.item(), rel=1e-5)
    again = edit.apply()["edit_moved"].item()
    assert again < 1e-5 * terms["edit_moved"].item(), "a second edit finds nothing to do"


@pytest.mark.parametrize("kind", ["uce", "masks"])
def test_an_edit_is_recorded_and_replayed(kind, monkeypatch):
    """As a CUDA graph would be: nothing is read back, and what is replayed is the step."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")

    def train(run=None):
        lower, _ = make_levels(*make_models())
        torch.manual_seed(1)
        upper, found = Editing(make_edit(kind, lower.optimizer.flat)), []
        for step in range(WARMUP + 3):
            move = {} if run is None else {"move": run}
            descend(lower, step, **move)
            found.append({name: value.item() for name, value in descend(upper, step, **move).items()})
        return found, lower.optimizer.flat.state_dict()

    expected, graphs = train(), Graphs(on_the_cpu)
    replayed = train(graphs)
    assert set(graphs._recorder._recorded) == {"lower", "upper"}
    assert replayed[0] == expected[0]
    assert all(torch.equal(replayed[1][name], value) for name, value in expected[1].items())
    assert all(terms["upper/edit_moved"] > 0 for terms in expected[0])
