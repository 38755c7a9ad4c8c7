"""The rivals of the bilevel loop: each way is trained for a few steps; budgets, the choice of settings, tables."""

from dataclasses import replace

import pytest
import torch

from benchmarks.quality import rival_tables, rivals
from benchmarks.quality.rival_cases import TRIES, Plan, Recipe, best, chosen, tried
from benchmarks.quality.rivals import Bench
from bilevel_fast.erasing.settings import Fisher
from bilevel_fast.runs.config import preset


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    brief = preset("smoke")
    brief = replace(
        brief,
        lower=replace(brief.lower, steps=4, batch=2, warmup=0),
        upper=replace(brief.upper, every=2, batch=2, warmup=0),
        mini=replace(brief.mini, images=16, bank=2, bank_steps=2),
    )
    return Bench(Plan({}, erased=1, kept=1), 0, tmp_path_factory.mktemp("rivals"), brief)


WAYS = {
    "distilled": (Recipe("distilled"), (4, 0, 0)),
    "bilevel": (Recipe("loop"), (6, 2, 4)),
    "two-stage": (Recipe("two-stage"), (6, 2, 4)),
    "repair": (Recipe("repair", steps=1), (6, 1, 2)),
    "one level": (Recipe("one level", weight=0.5), (4, 4, 4)),
    "uce": (Recipe("uce"), (4, 0, 0)),
    "uce, all tokens": (Recipe("uce", all_tokens=True), (4, 0, 0)),
    "sld": (Recipe("sld", strength="max"), (4, 0, 0)),
    "time": (Recipe("edit", edit="time"), (4, 0, 0)),
    "amnesia": (Recipe("loop", {"eraser": "selective-amnesia", "fisher": Fisher(1, 1)}), (6, 2, 4)),
}


@pytest.mark.parametrize("case", WAYS)
def test_every_way_trains_from_the_same_start_and_says_what_it_cost(bench, case):
    recipe, cost = WAYS[case]
    student, found = bench.make(case, recipe)
    assert tuple(found[key] for key in ("lower_gradients", "upper_gradients", "concept_images")) == cost
    start = bench.lab.student().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in student.state_dict().items())
    again, _ = bench.make(case, recipe)  # from the cache
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in again.state_dict().items())


def test_an_attack_is_looked_at_on_its_way(bench, monkeypatch):
    monkeypatch.setattr(rivals, "SEARCHED", (1, 2))
    student, _ = bench.make("bilevel", WAYS["bilevel"][0])
    found = bench.attacked(student.eval())
    assert [(row["attack"], row.get("strength", row.get("steps"))) for row in found] == [
        *(("concept vector", 1.0), ("concept vector", 3.0), ("inversion", 1), ("inversion", 2))
    ]
    assert all(0 <= row[key] <= 1 for row in found for key in ("hit", "content"))


def measured(case, seed, hit, fid, plan="tuning", cosines=()):
    shares = {"concept_hit": hit, "content_kept": 1.0, "other_style_hit": 1.0, "plain": 0.5}
    cost = {"lower_gradients": 150, "upper_gradients": 30, "concept_images": 480}
    where = {"device": "a CPU", "threads": 1, "torch": "2", "commit": "abc", "cosines": list(cosines)}
    samples = {"erased": 100, "kept": 200}
    return {"case": case, "seed": seed, "plan": plan, "fid": fid, "samples": samples, **shares, **cost, **where}


def test_of_the_tries_that_suppress_the_best_is_taken():
    first, second, third, *_ = TRIES["repair"]
    recipe = Recipe("repair", tuned="repair")
    assert chosen("x", recipe, []) == replace(TRIES["repair"][first], tuned="repair"), "without a row the first"
    rows = [measured("distilled", 3, 1.0, 4.0), measured(first, 3, 0.0, 9.0), measured(second, 3, 0.01, 6.0)]
    rows += [measured(third, 3, 0.03, 4.0), measured(first, 0, 0.0, 1.0)]
    assert chosen("x", recipe, rows) == replace(TRIES["repair"][second], tuned="repair")
    assert best(tried("repair", rows[:1] + rows[3:]), rows) == third, "nobody suppresses"
    assert chosen("x", Recipe("loop"), rows) == Recipe("loop")


def test_tables():
    rows = [measured("bilevel", seed, 0.0, 4.0 + seed, "main", [0.0, 0.4]) for seed in (0, 1)]
    rows += [measured("two-stage, replay", seed, 0.02, 6.0, "main") for seed in (0, 1)]
    lines = rival_tables.table(rows, ["main"]).splitlines()
    names = ("bilevel", "two-stage, replay")
    loop, other = (next(line for line in lines if line.startswith(f"| {name}")) for name in names)
    assert "seeds 0, 1 | 0.00 (0.00..0.02) | 1.00 (0.98..1.00) | 1.00 (0.99..1.00) | 0.50 (0.43..0.57)" in loop
    assert "| 4.5 ± 0.5 | - |" in loop
    assert "| 0.02 (0.01..0.05) |" in other
    assert "| 6.0 ± 0.0 | +2.0, +1.0 | 150 / 30 / 480 |" in other
    assert "| bome | not measured |" in "\n".join(lines)
    assert "over 2 runs: +0.20 in the first five, +0.20 in the last five, +0.00 at least" in rival_tables.conflict(rows)
    got = [{"hit": 0.1 * n, "content": 1.0} for n in range(5)]
    rows.append({**rows[0], "plan": "attack", "got_back": got, "seed": 0, "cosines": []})
    assert "| bilevel, seed 0 | 0.00 / 1.00 | 0.10 / 1.00 | 0.20 / 1.00 |" in rival_tables.attacks(rows)
    assert "Measured on a CPU, 1 thread, torch 2, commits abc." in rival_tables.report(rows)
