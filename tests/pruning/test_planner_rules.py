"""`spend`: alignment, least shares and dropped sites, and what it refuses."""

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21, sites
from bilevel_fast.models.macs import count
from bilevel_fast.pruning.planner import DROP, spend
from planning import depth_sites, macs, ones, random

MIDDLE = "mid_block.resnets.0"

# --- rules ---


def test_alignment_binds_only_the_groups():
    """320 channels have 10 per group: with 16, counts are multiples of 8; 640 and 1280 are finer."""
    structure = spend(SD21, macs(SD21, 0.55), random(SD21, 0), align=16)
    free = spend(SD21, macs(SD21, 0.55), random(SD21, 0))

    def inner(found):
        return [found.count(s, s.widths[0]) * s.widths[0].unit_size for s in sites(SD21) if s.kind == "resnet"]

    assert all(width % 16 == 0 for width in inner(structure))
    assert any(width % 16 for width in inner(free))
    assert 0.548 <= count(structure, 64, 77).ratio <= 0.55


def test_alignment_that_no_width_has_leaves_the_groups_alone():
    structure = spend(MINI, macs(MINI, 0.8), random(MINI, 0), align=1000)
    assert all(structure.count(s, s.widths[0]) == 16 for s in sites(MINI) if s.kind == "resnet")
    assert count(structure, 16, 12).ratio <= 0.8


def test_min_keep_overrides_the_budget_s():
    structure = spend(SD21, macs(SD21, 0.5, min_keep=0.05), random(SD21, 2), min_keep=0.4)
    loose = spend(SD21, macs(SD21, 0.5, min_keep=0.05), random(SD21, 2))

    def least(found):
        return min(found.count(site, width) / width.units for site in sites(SD21) for width in site.widths)

    assert least(structure) >= 0.4 > 0.3 > least(loose)


def test_a_site_goes_if_its_score_says_so():
    """At one budget: worthless it goes, beyond price it stays, and what its MACs buy is kept elsewhere. Without a
    score, or without leave, it always stays."""
    site = "up_blocks.1.attentions.1"
    for ratio in (0.6, 0.9):
        structures = {}
        for value in (0.0, -1e3, None):
            importance = random(MINI, 4)
            if value is not None:
                importance[site][DROP] = torch.tensor(value, dtype=torch.float64)
            structures[value] = spend(MINI, macs(MINI, ratio), importance, droppable=[site])
        assert structures[0.0].dropped == {site}
        assert not structures[-1e3].dropped
        assert structures[None] == structures[-1e3]
        importance[site][DROP] = torch.tensor(0.0, dtype=torch.float64)
        assert spend(MINI, macs(MINI, ratio), importance) == structures[None]
        assert ratio - 0.002 <= count(structures[0.0], 16, 12).ratio <= ratio


# --- refusals ---


def test_a_budget_below_the_least_names_the_least():
    """The number is the least there is: the budget that it names works, one thousandth less does not."""
    drops = depth_sites(SD21)
    for rules in ({}, {"align": 64}, {"droppable": drops}, {"min_keep": 0.5}):
        importance = random(SD21, 0, drops)
        with pytest.raises(UserError, match=r"budget 0.01 is too small: .* takes 0\.\d{3} of the dense MACs") as error:
            spend(SD21, macs(SD21, 0.01), importance, **rules)
        least = float(str(error.value).split(" takes ")[1].split()[0])
        assert ("with every droppable site dropped" in str(error.value)) == ("droppable" in rules)
        assert ("at alignment 64" in str(error.value)) == ("align" in rules)
        assert least - 0.001 < count(spend(SD21, macs(SD21, least), importance, **rules), 64, 77).ratio <= least
        with pytest.raises(UserError, match=f"takes {least:.3f} of"):
            spend(SD21, macs(SD21, round(least - 0.001, 3)), importance, **rules)


@pytest.mark.parametrize(
    ("site", "width", "value", "message"),
    [
        (MIDDLE, "groups", torch.ones(15), r"site mid_block.resnets.0, 'groups' has shape \(15,\), wanted \(16,\)"),
        (MIDDLE, "groups", torch.ones(1, 16), r"mid_block.resnets.0, 'groups' has shape \(1, 16\)"),
        (MIDDLE, "groups", torch.full((16,), torch.nan), "resnets.0, 'groups' holds numbers that are not finite"),
        (MIDDLE, "groups", torch.full((16,), torch.inf), "resnets.0, 'groups' holds numbers that are not finite"),
        (MIDDLE, "groups", -torch.ones(16), "mid_block.resnets.0, 'groups' holds negative numbers"),
        (MIDDLE, "groups", None, "site mid_block.resnets.0, 'groups' is missing"),
        (MIDDLE, None, None, "site mid_block.resnets.0 is missing"),
        (MIDDLE, "group", torch.ones(16), "mid_block.resnets.0 has no 'group'; did you mean 'groups'"),
        (MIDDLE, DROP, torch.tensor(0.1), "mid_block.resnets.0, 'drop' is 0.1.*, wanted a finite number <= 0"),
        (MIDDLE, DROP, torch.tensor(-torch.inf), "mid_block.resnets.0, 'drop' is -inf, wanted a finite"),
        (MIDDLE, DROP, torch.zeros(1), r"mid_block.resnets.0, 'drop' has shape \(1,\), wanted \(\)"),
        ("up_blocks.2.resnets.0", DROP, torch.tensor(-1.0), "up_blocks.2.resnets.0 has no 'drop'"),
        ("mid_block.resnet.0", "groups", torch.ones(16), "no site 'mid_block.resnet.0' .* did you mean 'mid"),
    ],
)  # fmt: skip
def test_refuses_importances(site, width, value, message):
    importance = ones(MINI)
    if width is None:
        del importance[site]
    elif value is None:
        del importance[site][width]
    else:
        importance.setdefault(site, {})[width] = value
    with pytest.raises(UserError, match=message):
        spend(MINI, macs(MINI, 0.8), importance)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"droppable": ["mid_block.resnet.0"]}, "droppable: no site 'mid_block.resnet.0'.*did you mean"),
        (
            {"droppable": ["up_blocks.2.resnets.0"]},
            "site up_blocks.2.resnets.0 cannot be dropped, it changes the number",
        ),
        ({"min_keep": 0.0}, "min_keep is 0.0, wanted 0 < min_keep <= 1"),
        ({"align": 0}, "align is 0, wanted at least 1"),
    ],
)
def test_refuses_rules(rules, message):
    with pytest.raises(UserError, match=message):
        spend(MINI, macs(MINI, 0.8), ones(MINI), **rules)
