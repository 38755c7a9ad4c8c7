"""Diff-Pruning, LAPTOP, BK-SDM, random units and random weights: each against what its paper says, written out."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch

from bilevel_fast.architecture import MINI, SD21, sites
from bilevel_fast.data.cache import Index
from bilevel_fast.data.writer import CacheWriter
from bilevel_fast.diffusion import Schedule
from bilevel_fast.errors import UserError
from bilevel_fast.folder import load_folder
from bilevel_fast.macs import count, site_costs
from bilevel_fast.pruning import METHODS, CalibrationSet, MacBudget, bk_sdm, calibration_set, learned, method, reinitialise
from bilevel_fast.pruning.layers import cheapest_drops, output_losses
from bilevel_fast.pruning.planner import spend
from bilevel_fast.pruning.taylor import taylor_importance
from bilevel_fast.randomness import Stream, normal
from bilevel_fast.structure import Structure
from bilevel_fast.unet import UNet
from mini_folder import TINY, make_mini_folder

LATENT, TEXT = 8, 12
DENSE = count(Structure.dense(TINY), LATENT, TEXT).true
TWO = dataclasses.replace(TINY, layers_per_block=2)
"""Two layers per block, as Stable Diffusion has: here BK-SDM finds something to drop."""


def make_teacher(seed: int = 0, config=TINY) -> UNet:
    torch.manual_seed(seed)
    return UNet(config)


def make_calibration(schedule: Schedule | None = None, seed: int = 0) -> CalibrationSet:
    """Two batches, of 3 and 2 samples."""
    batches = [
        (normal(5, Stream.VIEW, rows, (12, LATENT, LATENT)), normal(5, Stream.CAPTION, rows, (TEXT, 64)))
        for rows in ([0, 1, 2], [3, 4])
    ]
    return CalibrationSet(batches, schedule or Schedule.sd(), seed)


def budget(share: float, config=TINY) -> MacBudget:
    return MacBudget(share, *((LATENT, TEXT) if config != SD21 else (64, 77)))


def budget_without(*dropped: str, units: int = 0) -> MacBudget:
    """Exactly what is left when these sites go; `units` MACs less."""
    return budget((count(Structure.uniform(TINY, 1.0, dropped), LATENT, TEXT).true - units + 0.5) / DENSE)


# --- all methods ---


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """What is looked at here does not need well learned gates."""
    monkeypatch.setattr(learned, "STEPS", 6)


@pytest.mark.parametrize("share", [0.8, 0.55])
@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("bk-sdm")])
def test_budget_and_determinism(name, share):
    """Within the budget by less than the cheapest thing that went; the same structure again from the same inputs."""
    structure = method(name)(make_teacher(), budget(share), make_calibration())
    left = share * DENSE - structure.macs(LATENT, TEXT).true
    table = site_costs(TINY, LATENT, TEXT)
    prices = {site.name: table[site.name].total({w.name: w.units for w in site.widths}).true for site in sites(TINY)}
    gone = [prices[name] for name in structure.dropped]
    for site in sites(TINY):
        if site.name not in structure.dropped:
            gone += [table[site.name].units[w.name].true for w in site.widths if structure.count(site, w) < w.units]
    assert 0 <= left < min(gone)
    assert not structure.dropped or name in ("laptop", "gates")
    assert method(name)(make_teacher(), budget(share), make_calibration()) == structure


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("bk-sdm")])
def test_whole_budget_keeps_everything(name):
    assert method(name)(make_teacher(), budget(1.0), make_calibration()).is_dense


@pytest.mark.parametrize("name", ["diff-pruning", "gates", "laptop"])
def test_empty_calibration(name):
    with pytest.raises(UserError, match=f"^{name} tries the teacher on data, and the calibration set is empty.*--data"):
        method(name)(make_teacher(), budget(0.8), ())


@pytest.mark.parametrize("name", ["diff-pruning", "gates", "laptop"])
def test_the_teacher_is_left_as_it_was(name):
    teacher = make_teacher()
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    teacher.conv_in.requires_grad_(False)
    method(name)(teacher, budget(0.8), make_calibration())
    assert before.keys() == teacher.state_dict().keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert [n for n, p in teacher.named_parameters() if not p.requires_grad] == ["conv_in.weight", "conv_in.bias"]


@pytest.mark.parametrize("name", ["diff-pruning", "gates", "laptop"])
def test_broken_weights(name):
    teacher = make_teacher()
    with torch.no_grad():
        teacher.get_parameter("conv_out.weight")[0] = torch.inf
    with pytest.raises(UserError, match=r"^teacher: .* is not finite"):
        method(name)(teacher, budget(0.8), make_calibration())


# --- Diff-Pruning ---


def transcription(teacher, calibration, levels, threshold):
    """The method on one page: every parameter has its gradient, levels one after the other, units by hand."""
    abar, everything = calibration.schedule.alphas_cumprod, range(5)
    x0 = torch.cat([x for x, _ in calibration])
    text = torch.cat([c for _, c in calibration])
    losses, gradients = [], []
    for i, t in enumerate(calibration.timesteps(levels).tolist()):
        eps = normal(calibration.seed, Stream.NOISE, [(1 << 44) + 5 * i + k for k in everything], x0.shape[1:])
        alpha, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
        target = alpha * eps - sigma * x0 if calibration.schedule.prediction_type == "v_prediction" else eps
        out = teacher(alpha * x0 + sigma * eps, torch.full((5,), t), text).out
        teacher.zero_grad()
        loss = torch.nn.functional.mse_loss(out, target)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in teacher.named_parameters() if p.grad is not None})
    chosen = [g for g, loss in zip(gradients, losses, strict=True) if loss / max(losses) > threshold]
    score = {n: (p.detach() * sum(g[n] for g in chosen)).abs() for n, p in teacher.named_parameters() if n in chosen[0]}
    return losses, score


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_taylor_is_its_transcription(prediction):
    """A threshold between the losses: only some timesteps count. Units of 2 channels, 8 wide heads, FFN groups of 8."""
    teacher, calibration = make_teacher(), make_calibration(Schedule.sd(prediction), seed=3)
    losses, _ = transcription(teacher, calibration, 6, 0.0)
    threshold = sorted(losses)[2] / max(losses) + 1e-6
    _, score = transcription(teacher, calibration, 6, threshold)
    found = taylor_importance(teacher, calibration, threshold=threshold, levels=6)

    name, rows = "down_blocks.0.resnets.0", slice(6, 8)
    parts = [score[f"{name}.{t}.{k}"][rows] for t in ("conv1", "norm2", "time_emb_proj") for k in ("weight", "bias")]
    parts.append(score[f"{name}.conv2.weight"][:, rows])
    close(found[name]["groups"][3], parts)

    name = "up_blocks.2.attentions.1"
    block, rows = f"{name}.transformer_blocks.0", slice(8, 16)
    parts = [score[f"{block}.attn2.to_{p}.weight"][rows] for p in "qkv"]
    close(found[name]["attn2"][1], [*parts, score[f"{block}.attn2.to_out.0.weight"][:, rows]])

    proj, value, gate = f"{block}.ff.net.0.proj", slice(40, 48), slice(64 + 40, 64 + 48)
    parts = [score[f"{proj}.{k}"][half] for k in ("weight", "bias") for half in (value, gate)]
    close(found[name]["ff"][5], [*parts, score[f"{block}.ff.net.2.weight"][:, value]])

    assert found.keys() == {site.name for site in sites(TINY)}
    for site in sites(TINY):
        for width in site.widths:
            units = found[site.name][width.name]
            assert (units.shape, units.dtype) == ((width.units,), torch.float64)
            assert units.isfinite().all()
            assert (units >= 0).all()


def close(found, parts):
    torch.testing.assert_close(found, sum(p.double().sum() for p in parts), rtol=1e-4, atol=0.0)


def test_taylor_sums_in_fp32():
    """A bf16 teacher: the gradients are bf16, their sum over timesteps and batches is not."""
    teacher, calibration = make_teacher().bfloat16(), make_calibration()
    site = next(site for site in sites(TINY) if site.name == "mid_block.resnets.0")
    weights = {cut: teacher.get_parameter(f"{site.name}.{cut.tensor}") for cut in site.widths[0].cuts}
    totals = [torch.zeros_like(w, dtype=torch.float32) for w in weights.values()]
    for i, t in enumerate(calibration.timesteps(16)):
        for first, (x, c) in zip((5 * i, 5 * i + 3), calibration, strict=True):
            noised = calibration.noised(x, t.expand(len(x)), first)
            loss = (teacher(noised.x, noised.t, c).out.float() - noised.target).square().sum() / (5 * 12 * 64)
            for total, gradient in zip(totals, torch.autograd.grad(loss, list(weights.values())), strict=True):
                total += gradient.float()
    terms = [(w.detach().double() * total).abs() for w, total in zip(weights.values(), totals, strict=True)]
    wanted = sum(x.movedim(cut.axis, 0).reshape(8, -1).sum(1) for cut, x in zip(weights, terms, strict=True))
    found = taylor_importance(teacher, calibration, threshold=0.0)[site.name]["groups"]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0.0)


def zero_unit(teacher: UNet, site, width, unit: int) -> None:
    with torch.no_grad():
        for cut in width.cuts:
            tensor = teacher.get_parameter(f"{site.name}.{cut.tensor}").movedim(cut.axis, 0)
            tensor.unflatten(0, (cut.copies, width.units, -1))[:, unit] = 0.0


def test_a_unit_of_zeros_has_no_importance_and_goes_first():
    """One unit of each of seven vectors, and a budget for all the others: exactly these go."""
    teacher, table, went, price = make_teacher(), site_costs(TINY, LATENT, TEXT), {}, 0
    for i, (site, width) in enumerate([(s, w) for s in sites(TINY) for w in s.widths][::5]):
        went[site.name, width.name] = i % width.units
        price += table[site.name].units[width.name].true
        zero_unit(teacher, site, width, i % width.units)
    assert len(went) > 5
    importance = taylor_importance(teacher, make_calibration(), levels=4)
    structure = spend(TINY, budget_without(units=price), importance)
    for site in sites(TINY):
        for width in site.widths:
            zero = went.get((site.name, width.name), -1)
            nothing = (importance[site.name][width.name] == 0).nonzero().flatten().tolist()
            assert nothing == ([] if zero < 0 else [zero])
            assert structure.kept[site.name][width.name] == tuple(u for u in range(width.units) if u != zero)


def test_taylor_refuses_a_threshold_that_leaves_nothing():
    with pytest.raises(UserError, match=r"threshold is 1\.0, wanted"):
        taylor_importance(make_teacher(), make_calibration(), threshold=1.0)


# --- LAPTOP ---


def test_output_loss_is_that_of_the_model_without_the_layer():
    """Against models that are cut, and samples noised one by one."""
    teacher, calibration = make_teacher(), make_calibration()
    found = output_losses(teacher, calibration)
    assert list(found) == [site.name for site in sites(TINY) if site.droppable]
    latents, text = (torch.cat(parts) for parts in zip(*calibration, strict=True))
    t = calibration.timesteps(5)
    abar = calibration.schedule.alphas_cumprod[t].reshape(5, 1, 1, 1)
    eps = normal(0, Stream.NOISE, [(1 << 44) + k for k in range(5)], latents.shape[1:])
    x = abar.sqrt() * latents + (1 - abar).sqrt() * eps
    with torch.no_grad():
        whole = teacher(x, t, text).out
        for name, loss in found.items():
            cut = teacher.cut(Structure.uniform(TINY, 1.0, [name]))(x, t, text).out
            assert loss == pytest.approx((cut - whole).square().mean().item(), rel=1e-4)
            assert loss > 0


def test_layers_that_do_nothing_go_first():
    """Two ResNets and a Transformer made exact identities; the budget is what the others cost."""
    teacher = make_teacher()
    idle = {"down_blocks.0.resnets.0": "conv2", "mid_block.resnets.1": "conv2", "up_blocks.1.attentions.0": "proj_out"}
    with torch.no_grad():
        for site, last in idle.items():
            for kind in ("weight", "bias"):
                teacher.get_parameter(f"{site}.{last}.{kind}").zero_()
    losses = output_losses(teacher, make_calibration())
    assert {name for name, loss in losses.items() if loss == 0} == idle.keys()
    assert method("laptop")(teacher, budget_without(*idle), make_calibration()).dropped == idle.keys()
    assert method("laptop")(teacher, budget(1.0), make_calibration()).is_dense, "what fits stays, useful or not"


def test_drops_are_the_best_there_are():
    """Against all 2^16 sets of layers of the mini world's UNet, with losses that prices do not follow."""
    names = [site.name for site in sites(MINI) if site.droppable]
    assert len(names) == 16
    table = site_costs(MINI, 16, 12)
    costs = [table[s.name].total({w.name: w.units for w in s.widths}).true for s in sites(MINI) if s.droppable]
    losses = np.random.default_rng(1).exponential(size=16)
    sets = np.array(list(itertools.product([0, 1], repeat=16)))
    dense = count(Structure.dense(MINI), 16, 12).true
    for share in (0.9, 0.7, 0.5):
        fits = dense - sets @ np.array(costs) <= share * dense
        best = (sets @ losses)[fits].min()
        structure = cheapest_drops(MINI, MacBudget(share, 16, 12), dict(zip(names, losses.tolist(), strict=True)))
        ours = sum(losses[names.index(name)] for name in structure.dropped)
        assert structure.macs(16, 12).ratio <= share
        assert ours == pytest.approx(best, abs=1e-9)


def test_too_small_for_layers():
    """The number in the message is enough; a little less is not."""
    losses = {site.name: 1.0 for site in sites(SD21) if site.droppable}
    with pytest.raises(UserError, match=r"all 34 layers that can go leaves 0\.\d\d\d of the dense MACs") as error:
        cheapest_drops(SD21, budget(0.1, SD21), losses)
    least = float(str(error.value).split(" leaves ")[1].split()[0])
    assert cheapest_drops(SD21, budget(least, SD21), losses).dropped == losses.keys()
    with pytest.raises(UserError, match="is too small"):
        cheapest_drops(SD21, budget(least - 0.001, SD21), losses)


# --- BK-SDM ---

BASE = {
    *(f"down_blocks.{i}.resnets.1" for i in range(4)),
    *(f"down_blocks.{i}.attentions.1" for i in range(3)),
    *(f"up_blocks.{i}.resnets.1" for i in range(4)),
    *(f"up_blocks.{i}.attentions.1" for i in range(1, 4)),
}
MID = {"mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"}


def test_bk_sdm_drops_what_was_published():
    """The second pair of every block; small drops the mid block as well. Parameters: 0.58 and 0.49 billion."""
    base, small = bk_sdm.structure(SD21, "base"), bk_sdm.structure(SD21, "small")
    assert base.dropped == BASE
    assert small.dropped == BASE | MID
    assert round(base.macs(64, 77).params / 1e9, 2) == 0.58
    assert round(small.macs(64, 77).params / 1e9, 2) == 0.49
    for structure, mid in ((base, SD21.mid_block_type), (small, None)):
        own = dataclasses.replace(SD21, layers_per_block=1, mid_block_type=mid)
        theirs, ours = count(Structure.dense(own), 64, 77), count(structure, 64, 77)
        assert (ours.true, ours.params) == (theirs.true, theirs.params)


@pytest.mark.parametrize("size", ["base", "small"])
def test_bk_sdm_is_its_own_unet(size):
    """The structure computes what BK-SDM's smaller UNet computes with the same weights."""
    teacher = make_teacher(config=TWO)
    cut = teacher.cut(bk_sdm.structure(TWO, size))
    mid = TWO.mid_block_type if size == "base" else None
    own = UNet(dataclasses.replace(TWO, layers_per_block=1, mid_block_type=mid))
    # the last pair of an up block is the third here, and the second there
    own.load_state_dict({re.sub(r"(up_blocks\.\d\.\w+)\.2", r"\1.1", k): v for k, v in cut.state_dict().items()})
    x, c = make_calibration()[0]
    t = torch.tensor([5, 500, 990])
    torch.testing.assert_close(cut(x, t, c).out, own(x, t, c).out, rtol=1e-5, atol=1e-6)


def test_bk_sdm_and_budgets():
    teacher = make_teacher(config=TWO)
    structure = bk_sdm.structure(TWO, "base")
    cost = structure.macs(LATENT, TEXT).ratio
    assert method("bk-sdm-base")(teacher, budget(cost + 1e-9), ()) == structure
    assert method("bk-sdm-small")(teacher, budget(1.0), ()) == bk_sdm.structure(TWO, "small")
    with pytest.raises(UserError, match=r"budget 0.3 is too small: bk-sdm-base takes 0\.\d{4} of") as error:
        method("bk-sdm-base")(teacher, budget(0.3), ())
    named = float(str(error.value).split(" takes ")[1].split()[0])
    assert cost <= named < cost + 1e-4
    with pytest.raises(UserError, match="bk-sdm-base drops nothing of this UNet: 1 layer per block"):
        method("bk-sdm-base")(make_teacher(), budget(1.0), ())
    with pytest.raises(UserError, match=r"bk-sdm-tiny is a UNet of its own.*bk-sdm-base and bk-sdm-small"):
        method("bk-sdm-tiny")


# --- random ---


def test_random_keeps_uniform_counts_of_any_units():
    with torch.device("meta"):
        teacher = UNet(SD21)
    even = method("uniform")(teacher, budget(0.7, SD21), ())
    structures = [method("random")(teacher, budget(0.7, SD21), CalibrationSet(seed=seed)) for seed in range(20)]
    for structure in structures:
        for site in sites(SD21):
            for width in site.widths:
                assert structure.count(site, width) == even.count(site, width)
    assert method("random")(teacher, budget(0.7, SD21), ()) == structures[0]
    assert len({str(s.kept) for s in structures}) == 20
    # one vector of 32 units: over 20 seeds every unit is kept sometimes and goes sometimes
    draws = [set(s.kept["mid_block.resnets.0"]["groups"]) for s in structures]
    assert set.union(*draws) == set(range(32))
    assert not set.intersection(*draws)
    # and vectors of equal width draw for themselves
    one, other = (set(structures[0].kept[f"mid_block.resnets.{j}"]["groups"]) for j in range(2))
    assert not one <= other
    assert not other <= one


def test_random_is_nested():
    few, many = (method("random")(make_teacher(), budget(share), ()) for share in (0.5, 0.9))
    for name, widths in few.kept.items():
        assert all(set(units) <= set(many.kept[name][width]) for width, units in widths.items())


# --- random weights ---


def test_reinitialised_weights_depend_on_the_seed_alone():
    structure = Structure.uniform(TINY, 0.5, ["mid_block.attentions.0"])
    first, other = (make_teacher(seed).cut(structure) for seed in (0, 1))
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    assert reinitialise(first, 7) is first
    assert first.structure == structure
    reinitialise(other, 7)
    padded = reinitialise(make_teacher().cut(structure, align=16), 7)
    eighth = reinitialise(make_teacher().cut(structure), 8).state_dict()
    state = first.state_dict()
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert not torch.equal(state[f"{block}.to_q.weight"], state[f"{block}.to_k.weight"]), "each tensor draws for itself"
    norms = {n for n, m in first.named_modules() if isinstance(m, torch.nn.GroupNorm | torch.nn.LayerNorm)}
    for name, tensor in state.items():
        assert torch.equal(tensor, other.state_dict()[name]), name
        assert torch.equal(tensor, padded.state_dict()[name]), name
        if name.rpartition(".")[0] in norms:
            assert (tensor == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            assert not torch.equal(tensor, before[name]), name
            assert not torch.equal(tensor, eighth[name]), name


def test_reinitialised_weights_are_distributed_as_torch_initialises():
    """Every bound is 1 / sqrt(fan-in) of the pruned shape, and so is torch's own; large tensors spread alike."""
    structure = Structure.uniform(MINI, 0.5)
    torch.manual_seed(0)
    ours, torchs = reinitialise(UNet(MINI, structure), 0), UNet(MINI, structure)
    for name, module in ours.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        bound = 1 / math.sqrt(module.weight[0].numel())
        reference = torchs.get_submodule(name)
        for kind in ("weight", "bias"):
            drawn, theirs = getattr(module, kind), getattr(reference, kind)
            if drawn is None:
                continue
            assert drawn.abs().max() <= bound, name
            assert theirs.abs().max() <= bound * (1 + 1e-6), name
            if drawn.numel() > 2000:
                assert drawn.std().item() == pytest.approx(theirs.std().item(), rel=0.05), name
                assert abs(drawn.mean()) < 0.1 * bound, name
    x, c = normal(0, Stream.NOISE, [0], (12, 16, 16)), torch.randn(1, 12, 64)
    assert ours(x, torch.tensor([400]), c).out.isfinite().all()


# --- calibration ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return load_folder(make_mini_folder(tmp_path_factory.mktemp("models") / "teacher"))


def test_calibration_on_the_mini_world(folder):
    """Whole batches, the same ones again, others for another seed; text that the encoder gives."""
    found = calibration_set(folder, None, images=11, batch=4)
    assert [(tuple(x.shape), tuple(c.shape)) for x, c in found] == [((4, 12, 16, 16), (4, 12, 64))] * 2
    again, other = calibration_set(folder, None, images=11, batch=4), calibration_set(folder, None, batch=4, seed=1)
    assert torch.equal(found[1][0], again[1][0])
    assert torch.equal(found[1][1], again[1][1])
    assert not torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], other[0][0])
    assert len(other) == 16


def test_calibration_from_a_cache(folder, tmp_path):
    def write(name, kind="images", vae=folder.vae_fingerprint, anchor=None):
        writer = CacheWriter(tmp_path / name, Index(kind=kind, latent_shape=(12, 8, 8), vae=vae))
        for i in range(5):
            mean = torch.full((1, 12, 8, 8), float(i))
            writer.add(torch.cat([mean, torch.full_like(mean, -30.0)], dim=1), ["a red star"], anchor)
        writer.finish()
        return tmp_path / name

    found = calibration_set(folder, write("cache"), images=64, batch=64)
    ((latents, text),) = found
    assert sorted(latents.mean(dim=(1, 2, 3)).round(decimals=3).tolist()) == [0, 1, 2, 3, 4]
    assert text.shape == (5, 12, 64)
    with pytest.raises(UserError, match="is a cache of concepts, wanted one of images"):
        calibration_set(folder, write("bank", kind="concepts", anchor="a star"))
    with pytest.raises(UserError, match="latents of VAE other, the model has VAE"):
        calibration_set(folder, write("foreign", vae="other"))
    with pytest.raises(UserError, match="images of the calibration set: 0, wanted 1 or more"):
        calibration_set(folder, None, images=0)


def test_timesteps_cover_the_noise_process():
    t = CalibrationSet(seed=4).timesteps(16)
    assert (t * 16 // 1000).tolist() == list(range(16))
    assert not torch.equal(t, CalibrationSet(seed=5).timesteps(16))
    assert CalibrationSet().timesteps(1000).tolist() == list(range(1000))
