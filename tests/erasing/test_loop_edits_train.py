"""Training with edits as upper steps on the mini world: projections, resumed runs, what is refused."""

import copy
import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.concept_prune import second_matrices
from bilevel_fast.erasing.uce import matrices
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.structure import Structure
from bilevel_fast.runs import session
from bilevel_fast.runs.assemble import fit, levels
from bilevel_fast.train import parse
from bilevel_fast.training import checkpoint
from bilevel_fast.training.loop import Places
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.world import STYLES

CPU = torch.device("cpu")
SMALL = ["--preset", "smoke", "--lower.batch", "1", "--lower.warmup", "0", "--log-every", "1"]
SMALL += [
    "--checkpoint-every",
    "9",
    "--mini.bank",
    "3",
    "--mini.bank-steps",
    "2",
    "--mini.images",
    "36",
    "--upper.every",
    "2",
]
EDITS = {
    "uce": ["--upper.eraser", "uce"],
    "concept-prune": ["--upper.eraser", "concept-prune", "--upper.concept-prune.steps", "3"],
}
EDITS["concept-prune"] += ["--upper.concept-prune.prompts", "2"]


class World:
    def __init__(self, root: Path):
        self.root, self.folder = root, load_folder(TEACHER)
        self.student = session.initial_student(parse(SMALL), self.folder, 1)

    def materials(self, config):
        styles = session.erased_concepts(config)
        return session.gather(config, self.folder, self.folder.unet(), styles, self.root / "-".join(map(str, styles)))

    def fit(self, name: str, out: Path, steps: int, *flags: str, student=None) -> dict[str, torch.Tensor]:
        """Train up to a step, from the last checkpoint in `out`."""
        config = parse([*SMALL, *EDITS[name], "--lower.steps", str(steps), *flags])
        student = copy.deepcopy(student or self.student)
        out.mkdir(exist_ok=True)
        places = Places(out / "checkpoints", out / "stats.jsonl", out / "events")
        fit(config, student, self.materials(config), places, SimpleNamespace(requested=False), CPU)
        return student.state_dict()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def stats(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]


def test_uce_in_the_loop_and_the_same_run_when_stopped(world, tmp_path):
    """Every upper step projects; what is saved is projected, although the last step was a lower one."""
    after = world.fit("uce", tmp_path / "run", 5)
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert set(saved.optimizers) == {"lower"}, "an edit has no moments, and this one nothing else to keep"
    assert (saved.state["step"], saved.state["upper_steps"]) == (5, 2)
    moved = [record.get("upper/edit_moved") for record in stats(tmp_path / "run")]
    assert [m is None for m in moved] == [True, False, True, False, True]
    assert 0 < moved[3] < 0.1 * moved[1], "the second one only takes back what the lower level did"
    assert all("upper/lr" not in record for record in stats(tmp_path / "run"))
    config = parse([*SMALL, *EDITS["uce"]])
    upper = levels(config, copy.deepcopy(world.student), world.materials(config), CPU)[1]
    taken = upper.eraser.matrix
    for name, _ in matrices(world.student):
        size = after[name].norm()
        assert (after[name].double() @ taken).norm() < 1e-5 * size, "the last upper step was the last step"
        assert (saved.tensors[name].double() @ taken).norm() > 1e-5 * size
    eye = torch.eye(len(taken), dtype=torch.float64)
    torch.testing.assert_close((eye + taken) @ (eye + taken), eye + taken, rtol=0, atol=1e-9)
    world.fit("uce", tmp_path / "parts", 3)
    resumed = world.fit("uce", tmp_path / "parts", 5)
    assert all(torch.equal(after[key], resumed[key]) for key in after)


def test_concept_prune_in_the_loop_and_the_same_run_when_stopped(world, tmp_path):
    after = world.fit("concept-prune", tmp_path / "whole", 5)
    saved = checkpoint.latest(tmp_path / "whole" / "checkpoints")
    masks = saved.optimizers["eraser"]["masks"]
    assert set(masks) == set(second_matrices(world.student))
    share = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert 0.002 < share < 0.05
    for name, mask in masks.items():
        assert not after[name][mask].any(), "what is saved is masked"
        assert saved.tensors[name][mask].any(), "which the last lower step had moved"
        assert after[name][~mask].all()
    world.fit("concept-prune", tmp_path / "parts", 1)  # before there are masks
    world.fit("concept-prune", tmp_path / "parts", 3)
    resumed = world.fit("concept-prune", tmp_path / "parts", 5)
    assert all(torch.equal(after[key], resumed[key]) for key in after)


def test_masks_are_found_anew_as_often_as_asked(world, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = ["--upper.every", "1", "--upper.concept-prune.every", "2"]
    world.fit("concept-prune", tmp_path, 3, *flags)
    found = [message.split(":")[0] for message in caplog.messages if "masks found" in message]
    assert found == ["upper step 0", "upper step 2"]


def test_what_was_zero_stays_zero(world, tmp_path):
    """A run that goes on from an edited student keeps its zeros, though its own masks are others."""
    student = copy.deepcopy(world.student)
    name, w = next(iter(second_matrices(student).items()))
    with torch.no_grad():
        w[:, ::3] = 0
    after = world.fit("concept-prune", tmp_path, 2, student=student)
    assert not after[name][:, ::3].any()
    assert after[name][:, 1::3].any()


def test_several_concepts_and_dropped_sites(world, tmp_path, caplog):
    """Both styles' texts are projected; what the student has dropped is skipped, and that is said."""
    caplog.set_level(logging.INFO)
    dense = world.folder.unet()
    site = "up_blocks.2.attentions.1"
    student = dense.cut(Structure.uniform(dense.config, 0.8, [site]))
    flags = ["--erase", "waves", "mosaic", "--concept-weights", "2", "1", "--mini.bank", "12"]
    after = world.fit("uce", tmp_path, 2, *flags, student=student)
    assert f"upper level: {site} is skipped: the student has dropped it" in caplog.messages
    assert "2 concepts share the upper batches: waves 67%, mosaic 33%" in caplog.messages
    encoder = world.folder.text_encoder
    name = next(name for name in after if name.endswith("attn2.to_k.weight"))

    def apart(w: torch.Tensor, style: str) -> float:
        texts = [f"a red star in the style of {style}", "a red star"]
        ends = [int(encoder.mask([text]).sum()) - 2 for text in texts]
        words = [state[end] for state, end in zip(encoder.encode(texts), ends, strict=True)]
        return (w @ (words[0] - words[1])).norm().item()

    left = {style: apart(after[name], style) / apart(student.get_parameter(name), style) for style in STYLES[1:]}
    assert max(left["waves"], left["mosaic"]) < 0.7, left
    assert min(left[style] for style in left if style not in ("waves", "mosaic")) > 0.85, left


def test_a_preserve_list_is_read_and_checked(world, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    texts = tmp_path / "texts.txt"
    texts.write_text("a red star\na blue circle in the style of waves\n")
    world.fit("uce", tmp_path / "run", 1, "--upper.uce.preserve", str(texts))
    assert any(", 3 preserved," in message for message in caplog.messages), "the two, and the empty one"
    texts.write_text("a red star\na red star in the style of pointillism\n")
    with pytest.raises(UserError, match=r"texts\.txt preserves .*, and 'in the style of pointillism' is to be erased"):
        world.fit("uce", tmp_path / "other", 1, "--upper.uce.preserve", str(texts))


def test_profile_knows_edits(world, tmp_path):
    from bilevel_fast.runs.profiled import profiled

    config = parse([*SMALL, *EDITS["uce"]])
    (tmp_path / "scratch").mkdir()
    found, _ = profiled(config, CPU, 1, 0, tmp_path / "scratch", tmp_path / "trace.json")
    assert [step.name for step in found] == ["lower", "upper"]
    rooms = {row.room: row for row in found[1].rooms}
    assert rooms["optimizer"].launches > 0
    assert rooms["backward"].launches == rooms["teacher"].launches == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--upper.penalty", "2"],
            "--upper.penalty is 2.0, but eraser 'uce' does not read it; those that do: guidance",
        ),
        (["--upper.lr", "1e-3"], "--upper.lr is 0.001, but eraser 'uce' does not read it"),
        (["--upper.surgery"], "--upper.surgery is True, but eraser 'uce' does not read it"),
        (["--upper.subset", "esd-x"], "--upper.subset is esd-x, but eraser 'uce' does not read it"),
        (["--upper.concept-prune.ratio", "0.1"], "does not read it; those that do: concept-prune"),
        (["--upper.uce.ridge", "0"], "--upper.uce.ridge is 0.0: wanted > 0 and finite"),
        (
            ["--upper.eraser", "guidance", "--upper.uce.hold", "2"],
            "--upper.uce.hold is 2.0, but eraser 'guidance'",
        ),
        (["--upper.eraser", "concept-prune", "--upper.concept-prune.every", "-1"], "--upper.concept-prune.every is -1"),
    ],
)
def test_refused(flags, message):
    with pytest.raises(UserError) as refused:
        parse(["--preset", "mini", "--upper.eraser", "uce", *flags])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_preset_is_no_setting_that_somebody_gave():
    """The presets set rates and batches for erasers that read them; that does not forbid edits."""
    for preset in ("mini", "released"):
        config = parse(["--preset", preset, "--upper.eraser", "uce", "--dry-run"])
        assert config.upper.eraser == "uce"
    assert dataclasses.replace(config.upper, eraser="guidance") == parse(["--preset", "released", "--dry-run"]).upper


def test_a_ratio_that_takes_nothing(world, tmp_path):
    with pytest.raises(
        UserError, match=r"--upper\.concept-prune\.ratio 1e-05 of \d+ weights, the widest row here, is none"
    ):
        world.fit("concept-prune", tmp_path, 1, "--upper.concept-prune.ratio", "1e-5")
