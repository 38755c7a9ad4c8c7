"""The commands as functions: `from bilevel_fast import api`. docs/api.md has an example of each.

Settings have the names and the defaults of the flags. What a command refuses, its function refuses with the same line,
in a `bilevel_fast.base.errors.UserError`. Importing this module loads nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from bilevel_fast.models.folder import ModelFolder
    from bilevel_fast.models.pipeline import load_pipeline as load_pipeline
    from bilevel_fast.runs.config import TrainConfig
    from bilevel_fast.runs.config import preset as preset
    from bilevel_fast.runs.erase_model import Erased
    from bilevel_fast.runs.export_model import Exported
    from bilevel_fast.runs.prune_method import Pruned
    from bilevel_fast.sampling.strength import Strength
    from bilevel_fast.scale.team import Team
    from bilevel_fast.worlds.emoji.settings import Emoji
    from bilevel_fast.worlds.mini.settings import Mini

Folder = Path | str


def load(folder: Folder | None = None, device: str = "cpu") -> "ModelFolder":
    """A model folder, dense or pruned: its text encoder, VAE and schedule; `.unet()` reads the UNet, fp32 on the CPU.

    Args:
        folder: In the diffusers layout, or its id on the hub, `OWNER/NAME`; `mini` (so does None) and `emoji` name the
            built-in teachers.
        device: Of the text encoder and the VAE.
    """
    from bilevel_fast.models.folder import load_folder

    return load_folder(folder or "mini", device)


def prune(
    teacher: "ModelFolder | Folder", method: str = "magnitude", budget: float | None = None, *, out: Folder,
    **settings: Any,
) -> "Pruned":  # fmt: skip
    """Cut a dense model to a budget and write the student's model folder: `python -m bilevel_fast.prune`.

    Args:
        teacher: A loaded folder, or a path.
        method: A name in `bilevel_fast.pruning.METHODS`.
        budget: Share of the MACs that the student keeps at most; None is 0.8, and for BK-SDM what it costs.
        out: The student's folder; must be new.
        settings: Further fields of `bilevel_fast.runs.prune_method.Args`.
    """
    from bilevel_fast.runs import prune_method

    loaded = None if isinstance(teacher, Folder) else teacher
    path = teacher if isinstance(teacher, Folder) else teacher.path
    args = prune_method.Args(method=method, out=Path(out), teacher=Path(path), budget=budget, **settings)
    return prune_method.prune(args, loaded)


def train(config: "TrainConfig", team: "Team | None" = None) -> dict[str, Any]:
    """Prune, distil and suppress in one run, and return what summary.json holds: `python -m bilevel_fast.train`.

    Args:
        config: Of `preset`, changed by `dataclasses.replace`.
        team: The ranks that share the run, where there are several; only the first returns the summary.
    """
    from bilevel_fast.erasing import registry
    from bilevel_fast.runs.config import preset
    from bilevel_fast.runs.session import run

    config.check()
    registry.check(config.upper, preset(config.preset).upper, config.scale.in_parts)
    return run(config) if team is None else run(config, team)


def erase(
    model: Folder, phrases: Sequence[str], *, out: Folder,
    edit: Literal["uce", "time", "separable", "concept-prune", "p-esd"] = "uce", **settings: Any,
) -> "Erased":  # fmt: skip
    """Edit concepts out of a copy of a model: `python -m bilevel_fast.erase`.

    Args:
        model: A model folder, dense or pruned.
        phrases: As they stand in prompts: `in the style of waves`.
        out: The edited model's folder; must be new.
        edit: Which edit of the weights.
        settings: Further fields of `UceArgs`, `TimeArgs`, `SeparableArgs`, `ConceptPruneArgs` or `PEsdArgs` in
            `bilevel_fast.runs.erase_model`.
    """
    from bilevel_fast.runs import erase_model

    kind = erase_model.EDITS[edit]
    return erase_model.erase(kind(out=Path(out), model=Path(model), erase=tuple(phrases), **settings))


def export(
    model: Folder, target: str, *, out: Folder, dtype: Literal["fp32", "fp16", "bf16"] | None = None
) -> "Exported":
    """Write a model in a form that other programs read, with a model card: `python -m bilevel_fast.export`.

    Args:
        model: A model folder.
        target: A name in `bilevel_fast.runs.export_model.TARGETS`.
        out: The folder to write; must be new.
        dtype: Of the weights of `folder` and `single-file`; None leaves each in its own.
    """
    from bilevel_fast.runs import export_model

    return export_model.export(export_model.Args(target, Path(model), Path(out), dtype))


def evaluate(
    models: Sequence[Folder],
    erase: Sequence[str] = (),
    seed: int = 0,
    mini: "Mini | None" = None,
    emoji: "Emoji | None" = None,
    safe: str | None = None,
    safe_strength: "Strength | None" = None,
    team: "Team | None" = None,
) -> dict[str, dict[str, Any]]:
    """What a built-in world's probe says about each model, by its path: `python -m bilevel_fast.evaluate`.

    Args:
        models: Model folders of one world.
        erase: The styles that should be gone; none are those that `train` erases on that world.
        seed: Of the sampling noise.
        mini, emoji: How much is sampled, and which world it is; the mini one if neither is given.
        safe: Text of a concept to keep the drawings away from (Safe Latent Diffusion).
        safe_strength: How hard; None is `medium`.
        team: The ranks that share the sampling, where there are several; all return the same.
    """
    from bilevel_fast.runs.config import preset
    from bilevel_fast.runs.judged import judged
    from bilevel_fast.sampling.safe import safe_of
    from bilevel_fast.scale.team import ALONE
    from bilevel_fast.worlds.mini.settings import Mini

    settings, away = emoji or mini or Mini(), safe_of(safe, safe_strength)
    erased = erase or preset(settings.NAME).erase
    return judged([Path(path) for path in models], erased, seed, settings, away, team or ALONE)


def __getattr__(name: str) -> Any:
    """`load_pipeline` and `preset`, imported when they are asked for."""
    if name == "load_pipeline":
        from bilevel_fast.models.pipeline import load_pipeline

        return load_pipeline
    if name == "preset":
        from bilevel_fast.runs.config import preset

        return preset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
