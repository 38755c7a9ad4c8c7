"""Every built-in world has the whole interface, and a family of models that draws it."""

import inspect

import pytest
import torch

from bilevel_fast.models.family import FAMILIES
from bilevel_fast.models.folder import load_folder
from bilevel_fast.worlds import WORLDS, World, world

CONCEPT = {"mini": "pointillism", "emoji": "noto"}  # one that can be erased
FUNCTIONS = {name: f for name, f in vars(World).items() if inspect.isfunction(f) and not name.startswith("_")}


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_has_every_function_of_the_interface(name):
    for function, wanted in FUNCTIONS.items():
        arguments = list(inspect.signature(wanted).parameters)[1:]
        found = list(inspect.signature(getattr(world(name), function)).parameters.values())
        assert [each.name for each in found[: len(arguments)]] == arguments, function
        assert all(each.default is not each.empty for each in found[len(arguments) :]), function


@pytest.mark.parametrize("name", WORLDS)
def test_its_teacher_is_of_a_family_that_draws_it(name):
    folder = load_folder(world(name).TEACHER)
    assert folder.family.world == name
    folder.text_encoder.mask(world(name).subjects())  # it has all words


def test_families_name_worlds_that_exist():
    assert {family.world for family in FAMILIES.values()} - {None} == set(WORLDS)


@pytest.mark.parametrize("name", WORLDS)
def test_drawn_images_leave_out_what_is_erased(name):
    here, erased = world(name), world(name).erased_concepts([CONCEPT[name]])
    folder = load_folder(here.TEACHER)
    source = here.drawn_source(folder, erased, 8, seed=0)
    assert not any(CONCEPT[name] in caption for i in range(8) for caption in source.captions(i))
    assert torch.equal(here.drawn_source(folder, erased, 8, seed=0).moments([3], [0]), source.moments([3], [0]))
