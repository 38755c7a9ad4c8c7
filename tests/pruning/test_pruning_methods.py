"""What every pruning method keeps to, and random units, the floor under them."""

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import SD21, sites
from bilevel_fast.models.macs import count, site_costs
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning import FIXED, METHODS, CalibrationSet, method
from mini_folder import TINY
from tiny_teacher import DENSE, LATENT, TEXT, budget, make_calibration, make_teacher

# --- all methods ---


pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.mark.parametrize("share", [0.8, 0.55])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in FIXED])
def test_budget_and_determinism(name, share):
    """Within the budget by less than the cheapest thing that went; the same structure again from the same inputs."""
    structure = method(name)(make_teacher(), budget(share), make_calibration())
    left = share * DENSE - count(structure, LATENT, TEXT).true
    table = site_costs(TINY, LATENT, TEXT)
    prices = {site.name: table[site.name].total({w.name: w.units for w in site.widths}).true for site in sites(TINY)}
    gone = [prices[name] for name in structure.dropped]
    for site in sites(TINY):
        if site.name not in structure.dropped:
            gone += [table[site.name].units[w.name].true for w in site.widths if structure.count(site, w) < w.units]
    assert 0 <= left < min(gone)
    assert not structure.dropped or name in ("laptop", "gates")
    assert method(name)(make_teacher(), budget(share), make_calibration()) == structure


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FIXED])
def test_whole_budget_keeps_everything(name):
    assert method(name)(make_teacher(), budget(1.0), make_calibration()).is_dense


@pytest.mark.parametrize("name", ["diff-pruning", "gates", "laptop"])
def test_empty_calibration(name):
    with pytest.raises(UserError, match=f"^{name} tries the teacher on data, and the calibration set is empty.*--data"):
        method(name)(make_teacher(), budget(0.8), ())


@pytest.mark.parametrize("name", ["diff-pruning", "laptop"])
def test_a_budget_out_of_reach_is_refused_before_the_teacher_is_tried(name):
    """On a real model that takes an hour."""

    class Untouchable(CalibrationSet):
        def __getitem__(self, index):
            raise AssertionError("read")

    with pytest.raises(UserError, match=r"^budget 0.02 is too small: .* 0\.\d{3} of the dense MACs"):
        method(name)(make_teacher(), budget(0.02), Untouchable(make_calibration()))


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
