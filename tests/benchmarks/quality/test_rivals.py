"""The rivals of the bilevel loop: each way is trained for a few steps; budgets, the choice of settings, tables."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from benchmarks.quality import attack_tables, rival_attacks, rival_tables
from benchmarks.quality.rival_attacks import ATTACKS, Attacker
from benchmarks.quality.rival_cases import TRIES, Plan, Recipe, best, chosen, of_world, tried
from benchmarks.quality.rivals import Bench, done, lacking
from bilevel_fast.attacking.mma import Mma
from bilevel_fast.attacking.ring_a_bell import RingABell
from bilevel_fast.attacking.unlearn_diff import UnlearnDiff
from bilevel_fast.erasing.settings import Fisher, Salun
from bilevel_fast.models.folder import load_unet
from bilevel_fast.runs import router
from bilevel_fast.runs.config import preset


def brief():
    smoke = preset("smoke")
    return replace(
        smoke,
        lower=replace(smoke.lower, steps=4, batch=2, warmup=0),
        upper=replace(smoke.upper, every=2, batch=2, warmup=0),
        mini=replace(smoke.mini, images=16, bank=2, bank_steps=2),
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(Plan({}, erased=1, kept=1), 0, tmp_path_factory.mktemp("rivals"), brief())


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
    "K 1": (Recipe("loop", {"every": 1}), (8, 4, 8)),
    "ewc": (Recipe("loop", {"solver": "ewc", "fisher": Fisher(1, 1)}), (4, 2, 4)),
    "meha": (Recipe("loop", {"solver": "meha", "meha": {"gamma": 10.0}}), (8, 2, 4)),
    "controller": (Recipe("loop", {"controlled": True}), (6, 2, 4)),
    "erasediff": (Recipe("loop", {"eraser": "erasediff"}), (6, 2, 4)),
    "forget-me-not": (Recipe("loop", {"eraser": "forget-me-not"}), (6, 2, 4)),
    "salun": (Recipe("loop", {"eraser": "salun", "salun": Salun(batches=1)}), (6, 2, 4)),
    "amnesia": (Recipe("loop", {"eraser": "selective-amnesia", "fisher": Fisher(1, 1)}), (6, 2, 4)),
}


@pytest.mark.parametrize("case", WAYS)
def test_every_way_trains_from_the_same_start_and_says_what_it_cost(bench, case):
    recipe, cost = WAYS[case]
    student, found = bench.make(case, recipe)
    assert tuple(found[key] for key in ("lower_gradients", "upper_gradients", "concept_images")) == cost
    start = bench.lab.student().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in student.state_dict().items())
    again, told = bench.make(case, recipe)  # from the cache
    assert {**told, "train_seconds": 0} == {**found, "train_seconds": 0}
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_student_of_another_recipe_is_made_anew_and_its_row_too(bench):
    """A further try may turn out as the best one: what was made of the one before is not taken for it."""
    first, second = (Recipe("uce", weight=weight, all_tokens=True) for weight in (0.1, 10.0))
    before, _ = bench.make("closed form", first)
    after, _ = bench.make("closed form", second)
    assert any(not torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
    row = {"plan": "closed", "seed": 0, "case": "closed form", "settings": json.loads(json.dumps(asdict(first)))}
    del row["settings"]["edit"]  # of before there were any
    assert done([row], "closed", 0, "closed form", first)
    assert not done([row], "closed", 0, "closed form", second)
    assert not done([row], "closed", 1, "closed form", first)


def test_students_may_start_from_an_expert_of_a_mixture(bench, tmp_path):
    """And keep apart in the cache from those that magnitude has pruned."""
    router.run(router.AptpConfig(out=tmp_path / "aptp-mini-0.8", steps=2, pretrain=1, batch=2, device="cpu"))
    plan = Plan({}, erased=1, kept=1, expert=True)
    own = Bench(plan, 0, tmp_path, brief())
    start = own.lab.student()
    assert start.structure == load_unet(tmp_path / "aptp-mini-0.8/experts/0", 1).structure
    assert start.structure != bench.lab.student().structure
    assert own.place.name == "pointillism-0.8-expert-0"


def test_every_attack_is_looked_at_on_its_way(bench, monkeypatch):
    """After so many steps of each; the teacher has forgotten nothing, and gives the style to who moves its states."""
    monkeypatch.setattr(rival_attacks, "SEARCHED", (1, 2))
    monkeypatch.setattr(rival_attacks, "TEXTS", 1)
    monkeypatch.setattr(rival_attacks, "RING_A_BELL", RingABell(tokens=6, population=40, generations=12, strength=1))
    monkeypatch.setattr(rival_attacks, "BRED", (2, 12))
    monkeypatch.setattr(rival_attacks, "MMA", Mma(tokens=3, steps=2, top=4, batch=6))
    monkeypatch.setattr(rival_attacks, "CHANGED", (1, 2))
    monkeypatch.setattr(rival_attacks, "UNLEARN_DIFF", UnlearnDiff(tokens=2, iterations=1, timesteps=2))
    attacker = Attacker(bench.lab, bench.config)
    found = [row for name in ATTACKS for row in attacker(name, bench.lab.folder.unet().eval())]
    assert [(row["attack"], row.get("strength", row.get("steps"))) for row in found] == [
        *(("concept vector", 1.0), ("concept vector", 3.0), ("inversion", 1), ("inversion", 2)),
        *(("ring-a-bell", 2), ("ring-a-bell", 12), ("mma", 1), ("mma", 2), ("unlearn-diff", 1), ("unlearn-diff", 2)),
    ]
    assert all(0 <= row[key] <= 1 and row["samples"] == 1 for row in found for key in ("hit", "content"))
    assert found[0]["hit"] == found[2]["hit"] == 1.0
    assert found[-2]["hit"] <= found[-1]["hit"]


def test_attacks_that_have_a_row_are_not_repeated():
    row = {"plan": "attack", "case": "bilevel", "seed": 0, "got_back": [{"attack": "mma"}, {"attack": "inversion"}]}
    names = ["inversion", "ring-a-bell", "mma"]
    assert lacking([row], "bilevel", 0, names) == ["ring-a-bell"]
    assert lacking([row], "bilevel", 1, names) == lacking([row], "bome", 0, names) == names


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


def test_each_world_has_tries_and_tables_of_its_own():
    first, second, *_ = TRIES["repair"]
    recipe = Recipe("repair", tuned="repair")
    mini = [measured("distilled", 3, 1.0, 4.0), measured(first, 3, 0.0, 9.0), measured(second, 3, 0.0, 6.0)]
    emoji = [{**row, "world": "emoji", "plan": "emoji tuning"} for row in mini]
    emoji[1]["fid"] = 5.0
    rows = [*mini, *emoji]
    assert chosen("x", recipe, of_world(rows, "mini")) == replace(TRIES["repair"][second], tuned="repair")
    assert chosen("x", recipe, of_world(rows, "emoji")) == replace(TRIES["repair"][first], tuned="repair")
    near = {"relative_hit": 0.25, "samples": {"erased": 100, "kept": 200, "relatives": 80}, "world": "emoji"}
    table = rival_tables.table([measured("bilevel", 0, 0.0, 4.0, "emoji") | near], ["emoji"])
    assert "of these its relatives" in table
    assert "0.25 (0.17..0.35)" in table
    assert "of these its relatives" not in rival_tables.table(rows, ["main"])


def test_tables(tmp_path):
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
    got = [{"attack": "inversion", "steps": n, "hit": 0.1 * n, "content": 1.0} for n in range(1, 4)]
    rows.append({**rows[0], "plan": "attack", "got_back": got, "seed": 0, "cosines": []})
    rows.append({**rows[-1], "got_back": [{**got[1], "hit": 0.4}], "seed": 1})
    text = attack_tables.tables(rows)
    assert "inversion: style got back / content kept | steps 1 | steps 2 | steps 3 |" in text
    assert "| bilevel, seeds 0, 1 | 0.10 / 1.00 | 0.30 / 1.00 | 0.30 / 1.00 |" in text
    assert "| one level | not measured | not measured | not measured |" in text
    assert "mma: style got back / content kept | steps |" in text
    attack_tables.plot(rows, tmp_path / "attacks.png")
    assert (tmp_path / "attacks.png").stat().st_size > 1000
    assert "Measured on a CPU, 1 thread, torch 2, commits abc." in rival_tables.report(rows, "mini")
    assert rival_tables.report(rows, "emoji") == "Nothing: not measured."
