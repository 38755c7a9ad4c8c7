"""What ranks say to each other through their store, as threads here: who decides, who waits, who differs."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import bilevel_fast
from bilevel_fast.base.devices import Ranks
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.sources import MemorySource
from bilevel_fast.runs import ranks as facts
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.scale.team import ALONE, Team
from world import make_models


def together(world, call):
    """What `call(team)` returns on each rank."""
    store = dist.HashStore()

    def work(rank):
        team = Team(Ranks(rank, world))
        team._store = store
        return call(team)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, range(world)))


def test_the_first_decides_for_all():
    calls = []

    def call(team):
        decided = team.first(lambda: calls.append(team.rank) or {"step": 7})
        return decided, team.least(10 - team.rank)

    assert together(3, call) == [({"step": 7}, 8)] * 3
    assert calls == [0]
    assert (ALONE.first(lambda: 1), ALONE.least(5)) == (1, 5)


def test_others_find_what_the_first_has_made():
    made = []

    def call(team):
        def make():
            time.sleep(0.2 if team.rank == 0 else 0)
            made.append(team.rank)
            return list(made)

        return team.in_turn(make)

    found = together(3, call)
    assert found[0][:1] == [0]
    assert all(others[0] == 0 for others in found[1:])


@pytest.mark.parametrize("different", [1, 2])
def test_one_that_differs_is_named_by_all_alike(different):
    def call(team):
        with pytest.raises(UserError) as caught:
            team.agree({"the version of torch": "2.12" if team.rank == different else "2.11", "same": None})
        return str(caught.value)

    wanted = (
        f'rank {different} differs from rank 0 in the version of torch: "2.12", wanted "2.11"; start all ranks alike'
    )
    assert together(3, call) == [wanted] * 3


def test_ranks_agree_on_settings_and_versions_but_not_on_resume():
    found = facts.started_with(TrainConfig())
    assert found["the version of bilevel_fast"] == bilevel_fast.__version__
    assert found["the version of torch"] == torch.__version__
    assert found["--lower.lr"] == TrainConfig().lower.lr
    assert "--resume" not in found


def test_ranks_agree_on_weights_and_data():
    """One number of either that is another one changes what they say, and says which it was."""

    def said(change=None):
        teacher, student = make_models()
        latents, captions = torch.arange(3 * 4 * 8 * 8.0).view(3, 1, 4, 8, 8), [["a"], ["b"], ["c"]]
        source = MemorySource(torch.cat([latents, latents], dim=2), captions)
        with torch.no_grad():
            if change == "the teacher's weights":
                next(teacher.parameters())[-1, -1, -1, -1] += 1
            elif change == "the student's first weights":
                next(student.parameters())[-1, -1, -1, -1] += 1
        if change == "the lower level's data":
            source = MemorySource(torch.cat([latents, latents + 1], dim=2), captions)
        return facts.trained_with(student, SimpleNamespace(teacher=teacher, data=source, concepts=None))

    plain = said()
    assert said() == plain
    for name in ("the teacher's weights", "the student's first weights", "the lower level's data"):
        changed = said(name)
        assert [key for key in plain if plain[key] != changed[key]] == [name]
