"""Who is compared with the bilevel loop, with which settings, and in which order; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from benchmarks.rows import Row

Way = Literal["distilled", "loop", "two-stage", "repair", "one level", "uce", "sld", "edit"]
Strength = Literal["max", "strong", "medium", "weak"]
"""Of SLD."""
SEED = 3
"""Of the tuning, which no table shows."""
GONE = 0.02
"""Share of the prompts that may still get the concept where it counts as gone."""


@dataclass(frozen=True)
class Recipe:
    """How a student is made.

    Attributes:
        way: See `rivals`.
        upper: Settings of the upper level that are not the preset's.
        lower: The same of the lower level.
        steps: Upper steps of a two-stage way, steps of the one level; 0 is as many as the loop takes.
        weight: Of L_CU in one level; of the preserved texts for UCE, 0 being its default.
        all_tokens: UCE moves all tokens that differ from the anchor's.
        strength: Of SLD.
        edit: Name of a command of `erase`, and its settings in `upper`.
        tuned: Whose tries on seed `SEED` decide the rest; empty for settings that stand here.
    """

    way: Way
    upper: Mapping[str, Any] = field(default_factory=dict)
    lower: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    weight: float = 0.0
    all_tokens: bool = False
    strength: Strength | None = None
    edit: str = ""
    tuned: str = ""


@dataclass(frozen=True)
class Plan:
    """Cases that are shown together.

    Attributes:
        cases: By name.
        seeds: One after the other.
        budget: MACs that pruning leaves.
        world: Whose teacher and judge.
        style: What is erased.
        erased, kept: Samples judged, of the erased style and of each other one.
        expert: Students start from the first expert of an APTP mixture; else magnitude prunes the teacher.
    """

    cases: Mapping[str, Recipe]
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: float = 0.80
    world: str = "mini"
    style: str = "pointillism"
    erased: int = 72
    kept: int = 36
    expert: bool = False


LOOP = Recipe("loop")
BOME = Recipe("loop", {"solver": "bome"})
REPLAY, REPAIR, ONE = (Recipe(way, tuned=way) for way in ("two-stage", "repair", "one level"))
UCE_ALL = Recipe("uce", all_tokens=True, tuned="uce, all tokens")

_LR = 1.5e-4  # the preset's upper level


def _meha(gamma: float, penalty: float, lr: float = _LR) -> Recipe:
    return Recipe("loop", {"solver": "meha", "meha": {"gamma": gamma}, "penalty": penalty, "lr": lr})


TRIES: dict[str, dict[str, Recipe]] = {
    "two-stage": {
        f"two-stage lr {lr:g} lambda {penalty:g}": Recipe("two-stage", {"lr": lr, "penalty": penalty})
        for lr, penalty in ((_LR, 1.0), (_LR / 2, 1.0), (2 * _LR, 1.0), (_LR, 3.0), (_LR / 4, 1.0))
    },
    "repair": {
        f"repair lr {lr:g} after {steps}": Recipe("repair", {"lr": lr}, steps=steps)
        for lr, steps in ((_LR, 30), (_LR / 2, 30), (_LR / 2, 15), (_LR, 10))
    },
    "one level": {
        f"one level weight {weight:g}": Recipe("one level", weight=weight) for weight in (1.0, 0.3, 3.0, 0.1, 0.03)
    },
    "uce, all tokens": {
        f"uce all tokens hold {hold:g}": Recipe("uce", weight=hold, all_tokens=True) for hold in (0.1, 1.0, 10.0)
    },
    "schedule": {
        f"schedule {name}": Recipe("loop", {"penalty_schedule": name}) for name in ("rising", "linear", "falling")
    },
    "meha": {
        f"meha gamma {gamma:g} lambda {penalty:g}": _meha(gamma, penalty)
        for gamma, penalty in ((10.0, 1.0), (1.0, 1.0), (30.0, 1.0), (10.0, 3.0), (10.0, 0.3))
    },
    "esd, two-stage": {
        f"esd two-stage {subset} lr {lr:g}": Recipe(
            "two-stage", {"eraser": "esd", "esd_steps": 20, "subset": subset, "lr": lr}
        )
        for subset, lr in (("esd-x", _LR), ("full", _LR), ("full", 2 * _LR))
    },
}
"""By family, the tries; of as good ones the first is taken."""
_STEEPER = ((2 * _LR, 1.0), (4 * _LR, 1.0), (_LR, 1.0), (2 * _LR, 0.3), (8 * _LR, 1.0))
EMOJI_TRIES = {
    "emoji loop": {
        f"emoji loop lr {lr:g} lambda {penalty:g}": Recipe("loop", {"lr": lr, "penalty": penalty})
        for lr, penalty in (*_STEEPER, (4 * _LR, 3.0), (8 * _LR, 3.0))
    },
    "emoji two-stage": {
        f"emoji two-stage lr {lr:g} lambda {penalty:g}": Recipe("two-stage", {"lr": lr, "penalty": penalty})
        for lr, penalty in (*_STEEPER, (_LR / 2, 1.0))
    },
    "emoji one level": {
        f"emoji one level weight {weight:g}": Recipe("one level", weight=weight) for weight in (3.0, 10.0, 1.0, 0.3)
    },
    "emoji bome": {
        f"emoji bome lr {lr:g}": Recipe("loop", {"solver": "bome", "lr": lr}) for lr in (4 * _LR, 8 * _LR, 2 * _LR)
    },
    "emoji schedule": {
        f"emoji schedule {name}": Recipe("loop", {"penalty_schedule": name}) for name in ("rising", "linear", "falling")
    },
    "emoji meha": {
        f"emoji meha lr {lr:g} gamma {gamma:g} lambda {penalty:g}": _meha(gamma, penalty, lr)
        for lr, gamma, penalty in (
            *((4 * _LR, 10.0, 1.0), (4 * _LR, 1.0, 1.0), (2 * _LR, 10.0, 1.0), (8 * _LR, 10.0, 1.0)),
            (4 * _LR, 10.0, 3.0),
        )
    },
    "emoji sld": {
        f"emoji sld {strength}": Recipe("sld", strength=strength)
        for strength in get_args(Strength)
        if strength != "weak"
    },
    "emoji repair": {
        f"emoji repair lr {lr:g} after {steps}": Recipe("repair", {"lr": lr}, steps=steps)
        for lr, steps in ((4 * _LR, 15), (2 * _LR, 30))
    },
}
"""The same on the emoji world, where the mini world's settings leave more than half of the style."""
TRIES |= EMOJI_TRIES


_EMOJI = {
    "distilled": Recipe("distilled"),
    "bilevel": Recipe("loop", tuned="emoji loop"),
    "two-stage, replay": Recipe("two-stage", tuned="emoji two-stage"),
    "one level": Recipe("one level", tuned="emoji one level"),
    "bome": Recipe("loop", tuned="emoji bome"),
    "two-stage, repair": Recipe("repair", tuned="emoji repair"),
    "uce": Recipe("uce"),
}
_MAIN = {"distilled": Recipe("distilled"), "bilevel": LOOP, "bome": BOME}
_RIVALS = {"two-stage, replay": REPLAY, "two-stage, repair": REPAIR, "one level": ONE}

_FEWER = ("distilled", "bilevel", "two-stage, replay", "one level")

_SYSTEMS = {
    "sld": Recipe("sld", tuned="emoji sld"),
    "time": Recipe("edit", edit="time"),
    "separable": Recipe("edit", edit="separable"),
    "p-esd": Recipe("edit", {"steps": 20}, edit="p-esd"),
    "bilevel, ewc in place of the penalty": Recipe("loop", {"solver": "ewc", "penalty": 50.0}),
}
"""Of docs/systems.md. SLD's strength is tuned, of those that begin before the judge's 12 steps are over. The rest is at
the defaults of its command, not tuned; `separable` is asked to preserve the empty text alone, as `erase` does."""
_INSIDE = {
    f"bilevel, {eraser} inside": Recipe("loop", {"eraser": eraser})
    for eraser in ("anchor-kd", "concept-ablation", "salun", "erasediff", "forget-me-not", "selective-amnesia")
}
"""Erasers in place of guidance, at the rate that was chosen for guidance."""

PLANS: dict[str, Plan] = {
    "tuning": Plan(
        {"distilled": _MAIN["distilled"]} | TRIES["two-stage"] | TRIES["repair"], (SEED,), erased=36, kept=18
    ),
    "main": Plan(_MAIN | _RIVALS),
    "tuning-2": Plan(
        {"distilled": _MAIN["distilled"]} | TRIES["uce, all tokens"] | TRIES["one level"] | TRIES["schedule"],
        (SEED,), erased=36, kept=18,
    ),
    "closed": Plan({"uce": Recipe("uce"), "uce, all tokens": UCE_ALL}),
    "tight": Plan(_MAIN | _RIVALS, budget=0.55),
    "other": Plan(_MAIN | _RIVALS, style="waves"),
    "expert": Plan({case: (_MAIN | _RIVALS)[case] for case in _FEWER}, expert=True),
    "solvers": Plan(
        {
            "schedule": Recipe("loop", tuned="schedule"),
            "controller": Recipe("loop", {"controlled": True}),
            "meha": Recipe("loop", tuned="meha"),
        }
    ),
    "null": Plan(
        {
            f"null anchor, lr x {factor}": Recipe("loop", {"anchor": "null", "lr": factor * _LR})
            for factor in (1, 3, 10)
        }
        | {
            "null anchor, raw 100, lr x 10": Recipe(
                "loop", {"anchor": "null", "lr": 10 * _LR, "penalty": 100.0, "penalty_norm": "raw"}
            )
        },
        (0,),
    ),
    "tuning-3": Plan({"distilled": _MAIN["distilled"]} | TRIES["esd, two-stage"], (SEED,), erased=36, kept=18),
    "tuning-4": Plan({"distilled": _MAIN["distilled"]} | TRIES["meha"], (SEED,), erased=36, kept=18),
    "esd": Plan(
        {
            "two-stage ESD, replay": Recipe("two-stage", tuned="esd, two-stage"),
            "bilevel, ESD inside": Recipe("loop", {"eraser": "esd", "esd_steps": 20, "source": "teacher"}),
        }
    ),
    "emoji tuning": Plan(
        {"distilled": _MAIN["distilled"]}
        | {case: recipe for tries in EMOJI_TRIES.values() for case, recipe in tries.items()},
        (SEED,), world="emoji", style="noto", erased=48, kept=24,
    ),
    "emoji": Plan(
        {"teacher": Recipe("distilled")} | _EMOJI,
        world="emoji", style="noto", erased=96, kept=48,
    ),
    "emoji solvers": Plan(
        {
            "schedule": Recipe("loop", tuned="emoji schedule"),
            "controller": Recipe("loop", {"controlled": True}),
            "meha": Recipe("loop", tuned="emoji meha"),
            "bilevel, K 3": Recipe("loop", {"lr": 4 * _LR, "penalty": 1.0, "every": 3}),
        },
        world="emoji", style="noto", erased=96, kept=48,
    ),
    "emoji other": Plan(
        {case: _EMOJI[case] for case in (*_FEWER, "uce")} | {"controller": Recipe("loop", {"controlled": True})},
        world="emoji", style="twemoji", erased=96, kept=48,
    ),
    "emoji systems": Plan(_SYSTEMS | _INSIDE, world="emoji", style="noto", erased=96, kept=48),
}  # fmt: skip
"""In order of worth."""


def of_world(rows: list[Row], world: str) -> list[Row]:
    """The rows of one world; an older row names none and is of the mini one."""
    return [row for row in rows if row.get("world", "mini") == world]


ATTACKED = ("bilevel", "two-stage, replay", "one level")
"""Students that are attacked."""


def miss(row: Row, distilled: Row) -> float:
    """As in `tables.miss`: concept_hit + (1 - content_kept) + (1 - other_style_hit) + fid / fid of `distilled`."""
    wrong = row["concept_hit"] + (1 - row["content_kept"]) + (1 - row["other_style_hit"])
    return wrong + row["fid"] / distilled["fid"]


def tried(family: str, rows: list[Row]) -> dict[str, float]:
    """The tries of a family that have a row, with their `miss`."""
    mine = [row for row in rows if row["seed"] == SEED]
    distilled = {row["plan"]: row for row in mine if row["case"] == "distilled"}
    found = {row["case"]: row for row in mine if row["plan"] in distilled}
    return {case: miss(found[case], distilled[found[case]["plan"]]) for case in TRIES[family] if case in found}


def best(tries: Mapping[str, float], rows: list[Row]) -> str:
    """Of the tries that leave at most `GONE` of the concept the one with the least miss; of all if none does."""
    left = {row["case"]: row["concept_hit"] for row in rows if row["seed"] == SEED}
    return min(tries, key=lambda case: (left[case] > GONE, tries[case]))


def chosen(case: str, recipe: Recipe, rows: list[Row]) -> Recipe:
    """A recipe with the settings of its best try; the first of its family where none has a row."""
    if not recipe.tuned:
        return recipe
    tries = tried(recipe.tuned, rows)
    name = best(tries, rows) if tries else next(iter(TRIES[recipe.tuned]))
    return replace(TRIES[recipe.tuned][name], tuned=recipe.tuned)
