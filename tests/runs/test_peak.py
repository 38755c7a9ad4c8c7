"""What pruning a model and saving a training take in memory, in processes of their own, on a UNet of 116 MB."""

from dataclasses import replace

import pytest

from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.folder import UNET_STEM
from mini_folder import make_mini_folder
from peak import peak_bytes

CONFIG = replace(MINI, block_out_channels=(144, 288, 288), num_heads=(9, 18, 18))
PRUNE = """
import sys, torch
import torch._dynamo  # which the first cut imports: no model's memory
import bilevel_fast.prune
from bilevel_fast.runs.prune_method import *
"""
TRAINING = """
import torch
from pathlib import Path
from bilevel_fast.models.folder import load_unet
from bilevel_fast.training import checkpoint
from bilevel_fast.training.optim import LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
place = Path({place!r})
flat = FlatParameters(load_unet({teacher!r}), torch.bfloat16)
optimizer = LevelOptimizer(flat, 1e-3, 1)
optimizer.rule.first.add_(1)
optimizer.rule.second.add_(1)
"""
SAVE_AND_LOAD = """
checkpoint.save(place, 1, flat.state_dict(), {"lower": optimizer.state_dict()}, {})
found = checkpoint.latest(place)
flat.load_state_dict(found.tensors)
optimizer.load_state_dict(found.optimizers["lower"])
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_mini_folder(tmp_path_factory.mktemp("large") / "teacher", config=CONFIG)


@pytest.fixture(scope="module")
def size(teacher):
    found = (teacher / "unet" / f"{UNET_STEM}.safetensors").stat().st_size
    assert found > 100e6
    return found


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_pruning_holds_the_student_once_and_the_teacher_not_at_all(tmp_path, teacher, size, method):
    arguments = [method, "--budget", "0.95", "--teacher", str(teacher), "--out", str(tmp_path / "out"), "--seed", "1"]
    peak = peak_bytes(PRUNE, f"sys.argv = {['prune', *arguments]}\nbilevel_fast.prune.main()")
    assert 0.8 * size < peak < 1.3 * size
    assert (tmp_path / "out" / "unet" / f"{UNET_STEM}.safetensors").stat().st_size > 0.8 * size


@pytest.mark.slow
def test_checkpoints_take_a_piece_at_most(tmp_path, teacher, size):
    """Of three buffers of the size of the model; to and fro."""
    before = TRAINING.format(place=str(tmp_path), teacher=str(teacher))
    assert peak_bytes(before, SAVE_AND_LOAD) < 0.3 * size
    assert sum(file.stat().st_size for file in tmp_path.glob("step-*/*")) > 2.9 * size
