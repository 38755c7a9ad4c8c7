"""Pruning methods: the budget is met, what is kept is what the method promises, and bad budgets are refused."""

import math
import sys

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21, UNetConfig, sites
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning import MacBudget, method
from bilevel_fast.pruning.budget import choices
from bilevel_fast.pruning.magnitude import magnitude, unit_importance
from bilevel_fast.pruning.uniform import uniform
from mini_folder import TINY

SIZES = {"sd21": (SD21, 64, 77), "mini": (MINI, 16, 12), "tiny": (TINY, 8, 12)}


def make_teacher(config: UNetConfig) -> UNet:
    """Random weights; of the real SD 2.1 only the shapes."""
    with torch.device("meta" if config == SD21 else "cpu"):
        return UNet(config)


@pytest.fixture
def spread_importance(monkeypatch):
    """SD 2.1 has no weights here: its units get random importances instead, spread over a factor of four."""

    def importance(choice, state):
        if state["conv_in.weight"].is_meta:
            return 0.5 + 1.5 * torch.rand(choice.width.units, dtype=torch.float64)
        return unit_importance(choice, state)

    monkeypatch.setattr(sys.modules[magnitude.__module__], "unit_importance", importance)


@pytest.mark.parametrize("ratio", [0.80, 0.55])
@pytest.mark.parametrize("size", ["sd21", "mini"])
@pytest.mark.parametrize("name", ["magnitude", "uniform"])
def test_meets_the_budget(name, size, ratio, spread_importance):
    config, latent, text = SIZES[size]
    structure = method(name)(make_teacher(config), MacBudget(ratio, latent, text), ())
    assert ratio - 0.002 <= count(structure, latent, text).ratio <= ratio
    assert not structure.dropped
    for site in sites(config):
        for width in site.widths:
            assert structure.count(site, width) >= 0.25 * width.units


@pytest.mark.parametrize("name", ["magnitude", "uniform"])
def test_whole_budget_keeps_everything(name):
    assert method(name)(make_teacher(MINI), MacBudget(1.0, 16, 12), ()).is_dense


def test_min_keep_binds():
    """At the smallest budget every vector keeps its least, and a little less is refused with that number."""
    with pytest.raises(UserError, match=r"keeping 40% of every width vector takes 0\.\d\d\d of the dense") as error:
        choices(SD21, MacBudget(0.2, 64, 77, min_keep=0.4))
    least = float(str(error.value).split(" takes ")[1].split()[0])
    structure = uniform(make_teacher(SD21), MacBudget(least, 64, 77, min_keep=0.4), ())
    lows = Structure(
        SD21, {s.name: {w.name: tuple(range(math.ceil(0.4 * w.units))) for w in s.widths} for s in sites(SD21)}
    )
    assert least - 0.001 < count(lows, 64, 77).ratio <= count(structure, 64, 77).ratio <= least
    with pytest.raises(UserError, match=f"budget {least - 0.001:.3f} is too small"):
        choices(SD21, MacBudget(round(least - 0.001, 3), 64, 77, min_keep=0.4))


@pytest.mark.parametrize(("ratio", "keep"), [(0.0, 0.25), (1.2, 0.25), (math.nan, 0.25), (0.8, 0.0), (0.8, 2.0)])
def test_budget_refuses(ratio, keep):
    with pytest.raises(UserError, match=r"wanted .*0 < .* <= 1"):
        MacBudget(ratio, 64, 77, keep)


def test_unknown_method():
    with pytest.raises(UserError, match=r"no pruning method 'magnitud'; did you mean 'magnitude'\?"):
        method("magnitud")


# --- uniform ---


@pytest.mark.parametrize("ratio", [0.80, 0.55])
def test_uniform_contains_the_largest_uniform_structure(ratio):
    """And nothing beyond the next larger one, but for what the rest of the budget still pays for."""
    keeps = sorted({k / w.units for s in sites(SD21) for w in s.widths for k in range(1, w.units + 1)})
    fits = [keep for keep in keeps if count(Structure.uniform(SD21, keep), 64, 77).ratio <= ratio]
    inner = Structure.uniform(SD21, fits[-1])
    ours = uniform(make_teacher(SD21), MacBudget(ratio, 64, 77), ())
    for site in sites(SD21):
        for width in site.widths:
            units = ours.kept[site.name][width.name]
            assert units == tuple(range(len(units)))
            assert len(units) >= inner.count(site, width)
    left = ratio * count(Structure.dense(SD21), 64, 77).true - count(ours, 64, 77).true
    found, _ = choices(SD21, MacBudget(ratio, 64, 77))
    missing = [int(c.prices[1]) for c in found if ours.count(c.site, c.width) < c.width.units]
    assert 0 <= left < min(missing)


# --- magnitude ---


def test_importance_is_the_sum_of_squares_that_goes():
    """Against the tensors named one by one: 8 groups of 2 channels, 2 heads of 8, 8 FFN groups of 8."""
    teacher = make_teacher(TINY)
    state = {k: v.double() for k, v in teacher.state_dict().items()}
    found = {(c.site.name, c.width.name): c for c in choices(TINY, MacBudget(0.8, 8, 12))[0]}

    name, rows = "down_blocks.0.resnets.0", slice(6, 8)
    parts = [state[f"{name}.{t}"][rows] for t in ("conv1.weight", "conv1.bias", "norm2.weight", "norm2.bias")]
    parts += [state[f"{name}.time_emb_proj.{t}"][rows] for t in ("weight", "bias")]
    parts += [state[f"{name}.conv2.weight"][:, rows]]
    importance = unit_importance(found[name, "groups"], state)
    torch.testing.assert_close(importance[3], torch.stack([p.square().sum() for p in parts]).sum())

    name = "down_blocks.0.attentions.0"
    block, rows = f"{name}.transformer_blocks.0", slice(8, 16)
    parts = [state[f"{block}.attn2.to_{p}.weight"][rows] for p in "qkv"] + [
        state[f"{block}.attn2.to_out.0.weight"][:, rows]
    ]
    importance = unit_importance(found[name, "attn2"], state)
    torch.testing.assert_close(importance[1], torch.stack([p.square().sum() for p in parts]).sum())

    value, gate = slice(40, 48), slice(64 + 40, 64 + 48)
    proj, out = f"{block}.ff.net.0.proj", state[f"{block}.ff.net.2.weight"]
    parts = [state[f"{proj}.{t}"][half] for t in ("weight", "bias") for half in (value, gate)] + [out[:, value]]
    importance = unit_importance(found[name, "ff"], state)
    torch.testing.assert_close(importance[5], torch.stack([p.square().sum() for p in parts]).sum())


def test_weak_units_go_first():
    """Units shrunk to a tenth, scattered over all vectors and together a bit dearer than the cut, are what goes."""
    teacher = make_teacher(TINY)
    found, _ = choices(TINY, MacBudget(0.7, 8, 12))
    weak = {(c.site.name, c.width.name): c.width.units - 1 - i % 2 for i, c in enumerate(found)}
    with torch.no_grad():
        for c in found:
            unit = weak[c.site.name, c.width.name]
            for cut in c.width.cuts:
                tensor = teacher.get_parameter(f"{c.site.name}.{cut.tensor}").movedim(cut.axis, 0)
                tensor.unflatten(0, (cut.copies, c.width.units, -1))[:, unit] *= 0.1
    dense = count(Structure.dense(TINY), 8, 12).true
    ratio = 1 - 0.9 * sum(int(c.prices[1]) for c in found) / dense
    kept = magnitude(teacher, MacBudget(ratio, 8, 12), ()).kept
    for c in found:
        gone = set(range(c.width.units)) - set(kept[c.site.name][c.width.name])
        assert gone <= {weak[c.site.name, c.width.name]}, c


def test_magnitude_is_optimal():
    """Weak duality: for any price of a MAC, max (value - price * MACs) + price * budget bounds every structure within
    the budget. The best such bound leaves no room for more than rounding and the last unit."""
    teacher, budget = make_teacher(MINI), MacBudget(0.6, 16, 12)
    found, spare = choices(MINI, budget)
    tables = []
    for c in found:
        largest = unit_importance(c, teacher.state_dict()).sort(descending=True).values
        tables.append((largest.cumsum(0) / largest.sum()).log()[c.least - 1 :])

    def bound(price: float) -> float:
        costs = (int(c.prices[1]) * torch.arange(len(t)) for c, t in zip(found, tables, strict=True))
        return sum((t - price * cost).max().item() for t, cost in zip(tables, costs, strict=True)) + price * spare

    best = min(bound(2.0 ** (i / 50) / spare) for i in range(-500, 500))
    structure = magnitude(teacher, budget, ())
    ours = sum(t[structure.count(c.site, c.width) - c.least].item() for c, t in zip(found, tables, strict=True))
    even = uniform(teacher, budget, ())
    plain = sum(t[even.count(c.site, c.width) - c.least].item() for c, t in zip(found, tables, strict=True))
    assert best - 0.05 <= ours <= best + 1e-9
    assert plain < ours - 1


def test_magnitude_refuses_broken_weights():
    teacher = make_teacher(TINY)
    with torch.no_grad():
        teacher.get_parameter("mid_block.resnets.0.conv2.weight")[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"mid_block.resnets.0.conv2.weight holds numbers that are not finite"):
        magnitude(teacher, MacBudget(0.8, 8, 12), ())


def test_a_vector_of_zeros_is_no_failure():
    teacher = make_teacher(TINY)
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if name.startswith("mid_block."):
                p.zero_()
    structure = magnitude(teacher, MacBudget(0.8, 8, 12), ())
    assert 0.798 <= count(structure, 8, 12).ratio <= 0.8
