"""Diff-Pruning against the page of its paper that it is, written out."""

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.macs import site_costs
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.pruning.planner import spend
from bilevel_fast.pruning.taylor import taylor_importance
from mini_folder import TINY
from tiny_teacher import LATENT, TEXT, budget_without, make_calibration, make_teacher


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
    for i, t in enumerate(calibration.timesteps(4)):
        for first, (x, c) in zip((5 * i, 5 * i + 3), calibration, strict=True):
            noised = calibration.noised(x, t.expand(len(x)), first)
            loss = (teacher(noised.x, noised.t, c).out.float() - noised.target).square().sum() / (5 * 12 * 64)
            for total, gradient in zip(totals, torch.autograd.grad(loss, list(weights.values())), strict=True):
                total += gradient.float()
    terms = [(w.detach().double() * total).abs() for w, total in zip(weights.values(), totals, strict=True)]
    wanted = sum(x.movedim(cut.axis, 0).reshape(8, -1).sum(1) for cut, x in zip(weights, terms, strict=True))
    found = taylor_importance(teacher, calibration, threshold=0.0, levels=4)[site.name]["groups"]
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
