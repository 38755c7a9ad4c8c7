"""Predictor, codebook and routing: formulas, who learns from what, and that a route is a prompt's own affair."""

import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21
from bilevel_fast.models.vector import layout
from bilevel_fast.pruning.aptp.binarise import binarise
from bilevel_fast.pruning.aptp.router import Predictor, Router, balance, cosines, embed, orthogonal, sinkhorn
from mini_folder import TINY


def test_predictor_of_sd21():
    predictor = Predictor(SD21, 768, seed=0)
    assert sum(p.numel() for p in predictor.parameters()) == 1_245_780
    assert predictor.linear.bias.eq(0).all()
    starts = [s.start for s in layout(SD21).segments] + [layout(SD21).widths, 1620]
    for start, stop in itertools.pairwise(starts):
        part = predictor.linear.weight[start:stop]
        torch.testing.assert_close(part @ part.T, torch.eye(len(part)), atol=1e-5, rtol=0)
    first, second = (predictor.linear.weight[s.start : s.stop] for s in layout(SD21).segments[:2])
    assert (first @ second.T).abs().max() > 0.01  # of its own for each width vector


def test_orthogonal():
    tall, wide = orthogonal(9, 4, 0, 1), orthogonal(4, 9, 0, 1)
    torch.testing.assert_close(tall.T @ tall, torch.eye(4))
    torch.testing.assert_close(wide @ wide.T, torch.eye(4))
    assert torch.equal(orthogonal(4, 9, 0, 1), wide)
    assert not torch.equal(orthogonal(4, 9, 1, 1), wide)
    corner = torch.stack([orthogonal(1, 1, seed, 0)[0, 0] for seed in range(200)])
    assert 70 < corner.eq(1).sum() < 130  # no preferred sign, as QR by itself has


def test_router_starts_from_its_seed():
    a, b, c = (Router(TINY, 16, 4, seed) for seed in (0, 0, 1))
    for mine, same, other in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(mine, same)
        assert not torch.equal(mine, other) or mine.eq(0).all()
    torch.testing.assert_close(a.codes @ a.codes.T, torch.eye(4), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="experts is 0, wanted at least 1"):
        Router(TINY, 16, 0, 0)


def test_similarity_space():
    """Site by site, from the definition."""
    plan = layout(MINI)
    gates = torch.rand(2, plan.size)
    space = embed(MINI, gates)
    depth = {site.name: plan.widths + i for i, site in enumerate(plan.depths)}
    for row in range(2):
        for s in plan.segments:
            for i in range(s.start, s.stop):
                a = gates[row, i].item()
                a = a * gates[row, depth[s.site.name]].item() if s.site.name in depth else float(a >= 0.5)
                assert space[row, i].item() == pytest.approx(a / math.sqrt(s.width.units), rel=1e-5)
        assert torch.equal(space[row, plan.widths :], (gates[row, plan.widths :] >= 0.5).float())


def test_similarity_space_passes_gradients_straight_through():
    """As if nothing were rounded: 1 / sqrt(units), times the depth where there is one."""
    gates = torch.rand(1, layout(TINY).size, requires_grad=True)
    plan = layout(TINY)
    (gradient,) = torch.autograd.grad(embed(TINY, gates).sum(), gates)
    depth = {site.name: gates[0, plan.widths + i].item() for i, site in enumerate(plan.depths)}
    for s in plan.segments:
        wanted = torch.full((s.width.units,), depth.get(s.site.name, 1.0) / math.sqrt(s.width.units))
        torch.testing.assert_close(gradient[0, s.start : s.stop], wanted)
    assert gradient[0, plan.widths :].gt(1).all()  # 1 of their own, and the widths of their sites


def test_sinkhorn_shares_out():
    """Against the loops of the definition; and a code that everybody likes best is not given to everybody."""
    similarity = torch.rand(12, 4) * 0.1
    similarity[:, 2] += 0.5
    q = [[math.exp(similarity[b, k].item() / 0.05) for b in range(12)] for k in range(4)]
    for _ in range(3):
        q = [[v / sum(row) / 4 for v in row] for row in q]
        columns = [sum(q[k][b] for k in range(4)) for b in range(12)]
        q = [[q[k][b] / columns[b] / 12 for b in range(12)] for k in range(4)]
    shares = sinkhorn(similarity)
    torch.testing.assert_close(shares, 12 * torch.tensor(q, dtype=torch.float64).T, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(12, dtype=torch.float64))
    assert similarity.argmax(dim=1).eq(2).all()
    assert shares.argmax(dim=1).bincount(minlength=4).tolist() == pytest.approx([3, 3, 3, 3], abs=2)


def spread_router(config=TINY, width=16, experts=4):
    """With codes and predictor far enough from the start that prompts differ."""
    router = Router(config, width, experts, 0)
    with torch.no_grad():
        router.codes.copy_(5 * torch.randn_like(router.codes) - 3)
        router.predictor.linear.weight.mul_(4)
        router.predictor.linear.bias.fill_(-3)
    return router


def test_training_uses_all_codes_and_noise_of_the_samples():
    router = spread_router()
    prompts = torch.randn(1, 16) + 0.1 * torch.randn(32, 16)  # alike: by the largest cosine most go one way
    routed = router(prompts, range(32), step=5)
    nearest = cosines(embed(TINY, routed.own), embed(TINY, routed.codes)).argmax(dim=1)
    assert nearest.bincount(minlength=4).max() > 16
    assert routed.expert.bincount(minlength=4).tolist() == pytest.approx([8] * 4, abs=3)
    assert torch.equal(routed.gates, routed.codes[routed.expert])
    again = router(prompts[8:16], range(8, 16), step=5)
    torch.testing.assert_close(again.own, routed.own[8:16], rtol=1e-5, atol=1e-6)
    assert torch.equal(again.codes, routed.codes)
    assert not torch.equal(router(prompts, range(32), step=6).codes, routed.codes)
    assert not torch.equal(router(prompts, range(32, 64), step=5).own, routed.own)


def test_who_learns():
    """The task moves the codes that were given, the predictor's own gates move the predictor."""
    router = spread_router()
    routed = router(torch.randn(3, 16), range(3), step=0)
    task = torch.autograd.grad(routed.gates.sum(), [router.codes, router.predictor.linear.weight], allow_unused=True)
    assert task[1] is None
    given = torch.zeros(4, dtype=torch.bool).index_fill(0, routed.expert.unique(), True)
    assert torch.equal(task[0].abs().sum(dim=1) > 0, given)
    own = torch.autograd.grad(
        embed(TINY, routed.own).sum(), [router.codes, *router.predictor.parameters()], allow_unused=True
    )
    assert own[0] is None
    assert all(g.abs().sum() > 0 for g in own[1:])


@torch.no_grad()
def test_route_is_the_largest_cosine():
    router, prompts = spread_router(), torch.randn(20, 16)
    own = embed(TINY, binarise(TINY, prompts @ router.predictor.linear.weight.T + router.predictor.linear.bias))
    codes = embed(TINY, binarise(TINY, router.codes))
    table = torch.tensor([[(torch.dot(o, c) / (o.norm() * c.norm())).item() for c in codes] for o in own])
    torch.testing.assert_close(cosines(own, codes), table)
    routes = router.route(prompts)
    assert torch.equal(routes, table.argmax(dim=1))
    assert len(routes.unique()) > 1


def test_route_is_a_prompts_own_affair():
    """Shuffled with the rows, the same alone, the same every time, and equal for equal prompts."""
    router, prompts = spread_router(), torch.randn(40, 16)
    routes, order = router.route(prompts), torch.randperm(40)
    assert torch.equal(router.route(prompts[order]), routes[order])
    assert torch.equal(torch.cat([router.route(p[None]) for p in prompts]), routes)
    assert router.route(prompts[:1].expand(9, -1)).unique().numel() == 1
    assert not routes.requires_grad


def test_route_refuses_another_encoder():
    with pytest.raises(UserError, match=r"shape \(3, 20\), this router wants \(B, 16\)"):
        spread_router().route(torch.randn(3, 20))


def test_balance_shares_out_one_by_one():
    """Everybody likes code 2 best, by far more than they differ: with the balance all codes get their turn."""
    similarity = 0.01 * torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    similarity[:, 2] += 0.5
    found = balance(similarity)
    assert found.mean().item() == pytest.approx(0, abs=1e-9)
    assert found.argmin() == 2
    routes = (similarity + found).argmax(dim=1)
    assert routes.bincount(minlength=4).tolist() == pytest.approx([15] * 4, abs=2)
    # no other even assignment has more similarity: scipy solves the same transport
    cost = -similarity.double().repeat_interleave(15, dim=1).numpy()
    rows, columns = linear_sum_assignment(cost)
    assert similarity.gather(1, routes[:, None]).sum().item() >= -cost[rows, columns].sum() - 0.02
    assert (routes.numpy() == columns[rows.argsort()] // 15).mean() > 0.9


def test_rebalanced_routes_are_a_prompts_own_affair():
    router = spread_router()
    prompts = torch.randn(1, 16) + 0.02 * torch.randn(48, 16)
    before = router.route(prompts)
    assert before.bincount(minlength=4).max() > 30
    router.rebalance(prompts)
    routes = router.route(prompts)
    assert routes.bincount(minlength=4).tolist() == pytest.approx([12] * 4, abs=2)
    assert torch.equal(torch.cat([router.route(p[None]) for p in prompts]), routes)
    again = Router(TINY, 16, 4, 1)
    again.load_state_dict(router.state_dict())  # the balance is part of the router
    assert torch.equal(again.route(prompts), routes)
