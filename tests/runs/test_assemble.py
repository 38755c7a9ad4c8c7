"""Levels put together from settings: what a training leaves of the models that it was given."""

import copy
from types import SimpleNamespace

import pytest
import torch

from bilevel_fast.base.devices import compute_dtype
from bilevel_fast.data.batches import Batches
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning import METHODS
from bilevel_fast.runs.assemble import fit, levels
from bilevel_fast.runs.session import gather, initial_student
from bilevel_fast.train import parse
from bilevel_fast.training.loop import Places
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.worlds.mini import TEACHER

CPU = torch.device("cpu")
SMALL = ["--preset", "smoke", "--lower.steps", "1", "--lower.batch", "1", "--upper.batch", "1", "--upper.every", "1"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_callers_teacher_keeps_its_dtype_and_bits(tmp_path, precision):
    config, folder = parse([*SMALL, "--precision", precision, "--mini.bank", "1"]), load_folder(TEACHER)
    teacher, start = folder.unet(), initial_student(config, folder, 1)
    before = copy.deepcopy(teacher.state_dict())
    materials = gather(config, folder, teacher, [], tmp_path)
    lower, _ = levels(config, copy.deepcopy(start), materials, CPU)
    asked = lower.gradient.answers.teacher.unet
    assert (asked is teacher) == (precision == "fp32"), "a copy, and none that nobody needs"
    assert asked.conv_in.weight.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    places = Places(tmp_path / "checkpoints", tmp_path / "stats.jsonl")
    fit(config, copy.deepcopy(start), materials, places, SimpleNamespace(requested=False), CPU)
    after = teacher.state_dict()
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], value) for name, value in before.items())


def test_a_copied_teacher_is_the_converted_one():
    unet = load_folder(TEACHER).unet()
    mine, wanted = Teacher.of(unet, CPU, torch.bfloat16).unet, copy.deepcopy(unet).to(torch.bfloat16)
    for (name, value), other in zip(mine.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert value.dtype == torch.bfloat16, name
        assert torch.equal(value, other), name
        assert value.stride() == other.stride(), name
    assert not any(p.requires_grad for p in mine.parameters())
    assert mine.structure == unet.structure


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captions_are_encoded_where_the_networks_compute(tmp_path, precision):
    """A device that is not the CPU; what is drawn for the run is drawn with the folder's own encoder, as ever."""
    folder, flags = load_folder(TEACHER), [*SMALL, "--precision", precision, "--mini.bank", "1"]
    own = gather(parse(flags), folder, folder.unet(), [], tmp_path / "cpu")
    assert own.text_encoder is folder.text_encoder
    materials = gather(parse([*flags, "--device", "meta"]), folder, folder.unet(), [], tmp_path / "meta")
    weight = materials.text_encoder.position
    assert (weight.device.type, weight.dtype) == ("meta", compute_dtype(precision, CPU))
    for few in (0, 10_000):
        batches = Batches(materials.concepts, materials.text_encoder, 2, 0, anchor="null", max_states=few)
        for number in range(2):
            batch = batches(number)
            assert {x.device.type for x in (batch.text, batch.anchor)} == {"meta"}


def test_a_student_is_pruned_on_data_where_the_run_computes(monkeypatch):
    """And comes back to the CPU, from where copies of it are trained."""
    seen = []

    def method(teacher, budget, calibration):
        latents, text = calibration[0]
        seen.append({x.device.type for x in (*teacher.parameters(), latents, text)})
        return Structure.uniform(teacher.config, 0.8)

    monkeypatch.setitem(METHODS, "diff-pruning", method)
    monkeypatch.setattr(UNet, "cpu", lambda unet: load_folder(TEACHER).unet(), raising=False)  # meta has no data
    config = parse([*SMALL, "--prune.method", "diff-pruning", "--device", "meta"])
    student = initial_student(config, load_folder(TEACHER), 1)
    assert seen == [{"meta"}]
    assert {p.device.type for p in student.parameters()} == {"cpu"}
