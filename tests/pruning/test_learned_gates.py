"""One learned architecture: what the network can do without goes first, the budget is met, and a seed decides."""

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.macs import count
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning import MacBudget, learned
from bilevel_fast.pruning.calibration import CalibrationSet
from mini_folder import TINY

BUDGET = MacBudget(0.7, 8, 5)


def make(seed=0):
    generator = torch.Generator().manual_seed(3)
    batches = [
        (torch.randn(n, 12, 8, 8, generator=generator), torch.randn(n, 5, 64, generator=generator)) for n in (4, 3)
    ]
    return CalibrationSet(batches, seed=seed)


def teacher_with_idle_units():
    """The first half of every FFN's groups is missed by nobody.

    The prediction is 0 whatever the gates do: random weights predict better without busy units, and what is learned
    here has to come from the distillation of features.
    """
    torch.manual_seed(0)
    unet = UNet(TINY)
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith("ff.net.2"):
                module.weight[:, : module.weight.shape[1] // 2] = 0
                module.weight.mul_(30)
        unet.conv_out.weight.zero_()
    return unet


def test_learns_what_nobody_misses(monkeypatch):
    monkeypatch.setattr(learned, "STEPS", 80)
    unet = teacher_with_idle_units()
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    structure = learned.learned_gates(unet, BUDGET, make())
    assert 0.69 < count(structure, 8, 5).ratio <= 0.7
    idle = busy = 0
    for widths in structure.kept.values():
        if "ff" in widths:
            idle += sum(u < 4 for u in widths["ff"])
            busy += sum(u >= 4 for u in widths["ff"])
    assert idle < 0.5 * busy
    assert all(torch.equal(p, before[name]) for name, p in unet.state_dict().items())


def test_a_seed_decides(monkeypatch):
    monkeypatch.setattr(learned, "STEPS", 6)
    first, again, other = (learned.learned_gates(teacher_with_idle_units(), BUDGET, make(seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_refuses():
    with pytest.raises(UserError, match="gates tries the teacher on data, and the calibration set is empty"):
        learned.learned_gates(UNet(TINY), BUDGET, CalibrationSet())
