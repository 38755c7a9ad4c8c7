"""The bilevel loop against rivals that are as well tuned and get the same budget, on both built-in worlds.

    python -m benchmarks.quality.rivals run tuning main   some of `PLANS`, by default all; rows that are there stay
    python -m benchmarks.quality.rivals attack            what an attacker gets back from students of plan `main`
    python -m benchmarks.quality.rivals report          the tables, from benchmarks/results/rivals.jsonl

All students of a seed start from the same pruned student, see the same lower batches and the same concept images, and
are judged on the same noise. What a row has cost is in it: gradients of L_ft and of L_CU, and concept images.

    loop        K lower steps, an upper step (`upper` says with which eraser, solver and lambda)
    two-stage   distilled, then as many upper steps as the loop takes, each with the penalty on a new lower batch
    repair      distilled, then upper steps without a penalty, then as many lower steps as the loop's penalties
    one level   one AdamW on L_ft + weight L_CU, the concept batch cut so that it sees as many concept images
    uce         distilled, then the closed form, over the tokens behind the last word, or over all that differ
    edit        distilled, then an edit of `erase`, of the style's phrase alone
    sld         distilled; all that is judged is kept away from the style while it is sampled

Rivals are tuned on seed 3, which no table shows; all tries keep their rows. Of those that leave at most 2 % of the
concept the one with the least `miss` (see `tables`) is taken.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.machine import describe
from benchmarks.quality import attack_tables, rival_tables
from benchmarks.quality.lab import CPU, Lab, append, read
from benchmarks.quality.rival_attacks import ATTACKS, Attacker
from benchmarks.quality.rival_cases import ATTACKED, PLANS, Plan, Recipe, chosen, of_world
from benchmarks.rows import Row
from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.erasing import registry as erasers
from bilevel_fast.erasing import uce
from bilevel_fast.erasing.edit import Job
from bilevel_fast.erasing.pairs import Frame, Pair
from bilevel_fast.models.text_encoder import token_states
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.aptp.mixture_folder import INDEX
from bilevel_fast.runs import router
from bilevel_fast.runs.config import TrainConfig, preset
from bilevel_fast.runs.erase_model import EDITS
from bilevel_fast.sampling.safe import safe_of
from bilevel_fast.sampling.strength import Strength
from bilevel_fast.training.levels import Level, bilevel, descend
from bilevel_fast.training.losses import Loss
from bilevel_fast.training.lower import Answered, Answers, FineTuning, SharedAnswers
from bilevel_fast.training.lower import descend as gradient_of
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.upper import Suppression
from bilevel_fast.worlds import drawn_world

ROWS = RESULTS / "rivals.jsonl"
CURVES = RESULTS / "attacks.png"


@dataclass(frozen=True)
class Run:
    """Train and judge what some plans lack."""

    plans: tyro.conf.Positional[tuple[str, ...]] = tuple(PLANS)
    """Of PLANS, one after the other."""
    seeds: tuple[int, ...] = ()
    """Of these alone; by default of all that the plan has."""
    only: tuple[str, ...] = ()
    """These cases alone; by default all."""
    cache: Path = Path("runs/rivals")
    """Where banks and students are kept."""


@dataclass(frozen=True)
class Attack:
    """How much an attacker gets back from the students of plan `main`: the longer the search, the more."""

    cases: tyro.conf.Positional[tuple[str, ...]] = ATTACKED
    """Students; they are made if they are not there."""
    attacks: tuple[str, ...] = tuple(ATTACKS)
    """Of ATTACKS; those that have a row are left out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One after the other."""
    cache: Path = Path("runs/rivals")
    """As of run."""


@dataclass(frozen=True)
class Report:
    """Print the tables, and draw the curves of the attacks."""


class Remembered(SharedAnswers):
    """Asks the teacher once per lower batch, whichever student comes first."""

    def __init__(self, other: Answers):
        super().__init__(other.teacher, other.schedule, other.seed, other.snr_gamma)
        self._known: dict[int, tuple[Answered, ...]] = {}

    def __call__(self, parts: Sequence[Batch]) -> Iterator[Answered]:
        first = int(parts[0].index[0])
        if first not in self._known:
            self._known[first] = tuple(map(self.ask, parts))
        self.last = self._known[first]
        return iter(self.last)


class OneLevel:
    """The gradient of L_ft + weight L_CU: what a single optimizer descends."""

    def __init__(self, lower: FineTuning, upper: Level, weight: float):
        assert isinstance(upper.gradient, Suppression)
        self.lower, self.upper, self.eraser, self.weight, self.step = lower, upper, upper.gradient.eraser, weight, 0

    def __call__(self, batch: Batch) -> Loss:
        lower, found = self.lower, self.lower(batch)
        concept = self.upper.batches(self.step)
        self.step += 1
        loss = self.eraser.loss(lower.student, lower.answers, concept)
        other = gradient_of([loss], 1, lower.flat, self.weight, add=True)
        return Loss(found.total + self.weight * other.total, {**found.terms, **other.terms})


class Conflict:
    """Looks at the two gradients of every upper step before they become one: their cosine."""

    def __init__(self, suppression: Suppression):
        self.suppression, self.rule, self.cosines = suppression, suppression.rule, list[float]()
        if suppression.asks_lower:
            suppression.own = self

    def __call__(self, g: Tensor, flat: FlatParameters) -> None:
        self.cosines.append(round(float(flat.dot(g, flat.gradient) / (flat.norm(g) * flat.norm())), 4))
        if self.rule:
            self.rule(g, flat)
        else:
            penalty = self.suppression.penalty
            self.suppression.add(g, flat, penalty() if callable(penalty) else penalty)


def expert(plan: Plan, cache: Path) -> Path:
    """Folder of the first expert of a mixture of the plan's budget, which is trained, or trained on, where it lacks."""
    mixture = cache / f"aptp-{plan.world}-{plan.budget:g}"
    if not (mixture / INDEX).exists():
        teacher = drawn_world(plan.world).TEACHER
        router.run(router.AptpConfig(
            out=mixture, teacher=teacher, budget=plan.budget, device="cpu", resume=mixture.exists()
        ))  # fmt: skip
    return mixture / "experts/0"


class Bench:
    """Makes and judges the students of one plan and seed."""

    def __init__(self, plan: Plan, seed: int, cache: Path, settings: TrainConfig | None = None):
        config = replace(settings or preset(plan.world), seed=seed, erase=(plan.style,))
        config = replace(
            config,
            prune=replace(config.prune, budget=plan.budget),
            **{plan.world: replace(config.world_settings, judge_erased=plan.erased, judge_kept=plan.kept)},
        )
        if plan.expert:
            config = replace(config, student=expert(plan, cache))
        self.plan, self.place = plan, cache / f"{plan.style}-{plan.budget:g}{'-expert' * plan.expert}-{seed}"
        self.lab = Lab.set_up(config, self.place / "bank")
        self.lab = replace(self.lab, answers=Remembered(self.lab.answers))
        self.config, self.steps = config, config.lower.steps
        self.upper_steps = self.steps // config.upper.every

    def make(self, case: str, recipe: Recipe) -> tuple[UNet, Row]:
        """The student of a case, and what it has cost; read from the cache if it was made so."""
        file, start = self.place / f"{case.replace(' ', '-')}.safetensors", time.process_time()
        about = {"recipe": json.dumps(asdict(recipe), sort_keys=True)}
        known = _about(file) if file.exists() else {}
        student = self.lab.student()
        if case == "teacher":
            return self.lab.teacher, {"lower_gradients": 0, "upper_gradients": 0, "concept_images": 0}
        cost = self._cost(recipe)
        if known.get("recipe") == about["recipe"]:
            student.load_state_dict(load_file(file))
            return student, cost | json.loads(known.get("found", "{}"))
        found = getattr(self, "_" + recipe.way.replace("-", "_").replace(" ", "_"))(student, recipe)
        state = {name: value.detach().contiguous().clone() for name, value in student.state_dict().items()}
        save_file(state, file, about | {"found": json.dumps(found or {})})
        fresh = self.lab.student()  # with parameters of its own
        fresh.load_state_dict(state)
        return fresh, cost | {"train_seconds": round(time.process_time() - start, 1)} | (found or {})

    def _cost(self, recipe: Recipe) -> Row:
        upper = self._upper(recipe)
        count = {"distilled": 0, "uce": 0, "edit": 0, "sld": 0, "one level": recipe.steps or self.steps}.get(
            recipe.way, recipe.steps or self.upper_steps
        )
        held = upper.solver == "ewc"
        penalties = count if upper.penalty and not held and recipe.way in ("loop", "two-stage") else 0
        penalties *= 1 + (upper.solver == "meha")
        lower = {"one level": count, "repair": self.steps + self.upper_steps}.get(recipe.way, self.steps + penalties)
        return {"lower_gradients": lower, "upper_gradients": count, "concept_images": count * upper.batch}

    def _upper(self, recipe: Recipe) -> Any:
        settings = {} if recipe.way == "edit" else dict(recipe.upper)
        upper = self.config.upper
        if settings.pop("controlled", False):
            settings["controller"] = replace(upper.controller, enabled=True)
        if "meha" in settings:
            settings["meha"] = replace(upper.meha, **settings["meha"])
        if "esd_steps" in settings:
            settings["esd"] = replace(upper.esd, steps=settings.pop("esd_steps"))
        if recipe.way == "repair":
            settings["penalty"] = 0.0
        if recipe.way == "one level":
            steps = recipe.steps or self.steps
            settings |= {"penalty": 0.0, "batch": max(1, self.upper_steps * upper.batch // steps)}
        return replace(upper, **settings)

    def _levels(self, student: UNet, recipe: Recipe) -> tuple[Level, Level | None]:
        lower = replace(self.config.lower, **recipe.lower)
        config = replace(self.config, lower=lower, upper=self._upper(recipe))
        lab = self.lab
        if erasers.shows(config.upper.eraser) == "anchor":  # images of a bank of its own, of the same number and noise
            other = Lab.set_up(config, self.place / "bank-anchor")
            lab = replace(lab, materials=replace(lab.materials, concepts=other.materials.concepts))
        lower, upper = lab.levels(config, student)
        assert upper is None or isinstance(upper, Level)
        return lower, upper

    def _distilled(self, student: UNet, recipe: Recipe) -> None:
        lower, _ = self._levels(student, replace(recipe, upper={"every": 0}))
        for _ in bilevel(lower, None, 1, 0, recipe.steps or self.steps):
            pass

    def _loop(self, student: UNet, recipe: Recipe) -> Row:
        lower, upper = self._levels(student, recipe)
        assert upper is not None
        given = upper.gradient  # under a controller it is no Suppression, and its gradients are not looked at
        conflict = Conflict(given) if isinstance(given, Suppression) else None
        steps = bilevel(lower, upper, self._upper(recipe).every, 0, self.steps)
        count = sum("upper/loss" in terms for terms in steps)
        cost = self._cost(replace(recipe, steps=count)) if count != self.upper_steps else {}  # a controller's choice
        return ({"cosines": conflict.cosines} if conflict else {}) | cost

    def _begin(self, student: UNet) -> None:
        distilled, _ = self.make("distilled", PLANS["main"].cases["distilled"])
        student.load_state_dict(distilled.state_dict())

    def _two_stage(self, student: UNet, recipe: Recipe) -> None:
        self._begin(student)
        lower, upper = self._levels(student, recipe)
        assert upper is not None
        for step in range(recipe.steps or self.upper_steps):
            for _ in self.lab.answers((lower.batches(self.steps + step),)):
                pass
            descend(upper, step)

    def _repair(self, student: UNet, recipe: Recipe) -> None:
        self._two_stage(student, recipe)
        lower, _ = self._levels(student, replace(recipe, upper={"every": 0}))
        for step in range(self.upper_steps):
            descend(lower, self.steps + step)

    def _one_level(self, student: UNet, recipe: Recipe) -> None:
        lower, upper = self._levels(student, recipe)
        assert upper is not None
        assert isinstance(lower.gradient, FineTuning)
        level = replace(lower, gradient=OneLevel(lower.gradient, upper, recipe.weight))
        for _ in bilevel(level, None, 1, 0, recipe.steps or self.steps):
            pass

    def _sld(self, student: UNet, recipe: Recipe) -> None:
        self._begin(student)

    def _edit(self, student: UNet, recipe: Recipe) -> None:
        """Alone as in sentences: what the paper erases is a name."""
        self._begin(student)
        edit = EDITS[recipe.edit](out=self.place, **recipe.upper)
        edit.edit(student, Job(self.lab.folder, (Pair(self.lab.world.phrase(self.lab.erased[0])),)))

    def _uce(self, student: UNet, recipe: Recipe) -> None:
        self._begin(student)
        lab, style = self.lab, self.lab.erased[0]
        encoder = lab.folder.text_encoder
        preserve = tuple(scene.caption for scene in lab.world.scenes if scene.style != style)
        if not recipe.all_tokens:
            pairs, frames = (Pair(lab.world.phrase(style)),), tuple(map(Frame.of, lab.world.subjects()))
            uce.Uce(preserve_scale=recipe.weight or None).edit(student, Job(lab.folder, pairs, frames, preserve))
            return
        states = [token_states(encoder, texts).double() for texts in lab.world.known(style)]
        differs = (states[0] != states[1]).any(2)
        erased, guide = (some[differs] for some in states)
        weights = dict.fromkeys(["", *preserve], recipe.weight or max(0.1, 1 / (1 + len(preserve))))
        new = uce.Matched(erased, guide, torch.ones(len(erased), 1, dtype=torch.float64))
        uce.apply(student, uce.solve(new, uce.gram(encoder, weights), uce.Uce().ridge))

    @torch.no_grad()
    def judge(self, student: UNet, strength: Strength | None = None) -> Row:
        """Shares, how many samples they are of, and where the erased prompts' pictures went; `strength`: of SLD."""
        config, lab = self.config, self.lab
        away = safe_of(lab.world.phrase(lab.erased[0]), strength) if strength else None
        asked = lab.folder, lab.erased, config.world_settings, config.seed
        portfolio = lab.world.portfolio(student.eval(), *asked, safe=away)
        seen = lab.world.probe(portfolio.images).style_logits.argmax(1)
        gone = torch.tensor([scene.style in lab.erased for scene in portfolio.scenes])
        plain: Tensor = (seen[gone] == 0).double().mean()
        counts = {"erased": int(gone.sum()), "kept": int((~gone).sum())}
        if relatives := lab.world.shares(lab.erased, config.world_settings).get("relative_hit"):
            counts["relatives"] = relatives
        return {**lab.world.quality(portfolio, lab.erased), "plain": round(plain.item(), 4), "samples": counts}


def _about(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as tensors:
        return tensors.metadata() or {}


def done(rows: list[Row], plan: str, seed: int, case: str, recipe: Recipe) -> bool:
    """Whether there is a row of a case, and it was made so: another try may have become the best one since."""
    mine = [row for row in rows if (row["plan"], row["seed"], row["case"]) == (plan, seed, case)]
    return any(Recipe(**row["settings"]) == recipe for row in mine)


def run(args: Run, name: str, plan: Plan, say: Callable[[str], None]) -> None:
    """Train and judge what has no row, seed by seed."""
    for seed in args.seeds or plan.seeds:
        rows = read(ROWS)
        recipes = {case: chosen(case, recipe, of_world(rows, plan.world)) for case, recipe in plan.cases.items()}
        wanted = {case: recipe for case, recipe in recipes.items() if case in (args.only or [case])}
        missing = {case: recipe for case, recipe in wanted.items() if not done(rows, name, seed, case, recipe)}
        if not missing:
            continue
        bench = Bench(plan, seed, args.cache)
        for case, recipe in missing.items():
            student, cost = bench.make(case, recipe)
            found = {**bench.judge(student, recipe.strength), **cost, "settings": asdict(recipe)}
            where = {"plan": name, "seed": seed, "world": plan.world, "style": plan.style, "budget": plan.budget}
            append(ROWS, {"suite": "rivals", "case": case, **where, **found, **describe(CPU)})
            say(f"{name} seed {seed} {case}: {found}")


def attack(args: Attack, say: Callable[[str], None]) -> None:
    """A row for each student, of the attacks that have none."""
    for seed in args.seeds:
        missing = {case: lacking(read(ROWS), case, seed, args.attacks) for case in args.cases}
        if not any(missing.values()):
            continue
        bench = Bench(PLANS["main"], seed, args.cache)
        attacker = Attacker(bench.lab, bench.config)
        for case, names in missing.items():
            student, _ = bench.make(case, chosen(case, PLANS["main"].cases[case], of_world(read(ROWS), "mini")))
            for name in names:  # a row each: what is measured stays, whatever happens later
                found = {"plan": "attack", "seed": seed, "got_back": attacker(name, student.eval())}
                append(ROWS, {"suite": "rivals", "case": case, **found, **describe(CPU)})
                say(f"attack seed {seed} {case}: {found}")


def lacking(rows: list[Row], case: str, seed: int, attacks: Sequence[str]) -> list[str]:
    """The attacks that a student's rows do not have."""
    mine = [row for row in rows if (row["plan"], row["case"], row["seed"]) == ("attack", case, seed)]
    done = {found["attack"] for row in mine for found in row["got_back"]}
    return [name for name in attacks if name not in done]


def main() -> None:
    args = tyro.extras.subcommand_cli_from_dict(
        {"run": Run, "attack": Attack, "report": Report}, prog="python -m benchmarks.quality.rivals"
    )
    if isinstance(args, Report):
        for world in rival_tables.SHOWN:
            print(f"The {world} world\n\n{rival_tables.report(read(ROWS), world)}\n")
        attack_tables.plot(read(ROWS), CURVES)
        return
    if isinstance(args, Attack):
        if unknown := [name for name in args.attacks if name not in ATTACKS]:
            raise UserError(f"attack {unknown[0]!r} does not exist; there are {', '.join(ATTACKS)}")
        attack(args, lambda text: print(text, file=sys.stderr, flush=True))
        return
    for name in args.plans:
        if name not in PLANS:
            raise UserError(f"plan {name!r} does not exist; there are {', '.join(PLANS)}")
    for name in args.plans:
        run(args, name, PLANS[name], lambda text: print(text, file=sys.stderr, flush=True))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
