"""What is known of a model that is exported, for its card: from its folder, and from the run that it lies in."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json
from bilevel_fast.base.tables import listed
from bilevel_fast.erasing.edit import read_records
from bilevel_fast.exporting.card import Facts, Measured, licence_of
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.weights import fingerprint
from bilevel_fast.runs import history
from bilevel_fast.runs.config import VOLATILE, preset
from bilevel_fast.worlds import world

_UNITS = {
    "groups": "GroupNorm groups inside ResNets",
    "attn1": "heads of self-attention",
    "attn2": "heads of cross-attention",
    "ff": "groups of feed-forward channels",
}
_RUNS = ("student", "distilled")


@dataclass(frozen=True)
class Made:
    """What a target has written.

    Attributes:
        library: Of the card's header.
        snippet: Python that loads it, from within the folder.
        said: Lines for the terminal and the card: what, and how it went.
    """

    library: str
    snippet: str
    said: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Run:
    """The run that a model was trained by.

    Attributes:
        path: Its folder.
        config, summary: What `config.json` and `summary.json` hold.
    """

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]


_LICENCES = {"mini": {"license": "apache-2.0"}, "emoji": {"license": "cc-by-4.0"}}
"""Of the built-in teachers; the emoji world's is that of drawings it has learnt from which want to be named."""


def facts(folder: ModelFolder, made: Made) -> Facts:
    """What the card of an exported model says.

    Args:
        folder: The model that was exported.
        made: What was made of it.

    Raises:
        UserError: A record beside the model is broken.
    """
    path, run = folder.path.resolve(), read_run(folder.path.resolve())
    drawn = folder.family.world
    built_in = drawn is not None and _same_text_encoder(path, drawn)
    base = f"the built-in {drawn} teacher of bilevel-fast" if built_in else _origin(path)
    licence = licence_of(path) or (_licence_of_teacher(run) if run else {})
    return Facts(
        name=f"{run.path.name}: {path.name}" if run else path.name,
        base=base,
        licence=_LICENCES.get(drawn or "", {}) if built_in and not licence else licence,
        structure=tuple(_structure(folder)),
        suppressed=tuple(_suppressed(path, run)),
        measured=measured(run) if run else None,
        unmeasured=tuple(_unmeasured(run)),
        library=made.library,
        snippet=made.snippet,
        more=tuple(f"{name}: {text}" for name, text in made.said),
    )


def read_run(path: Path) -> Run | None:
    """The finished run whose `student` or `distilled` a folder is.

    Raises:
        UserError: Its files are damaged.
    """
    home = path.parent
    if path.name not in _RUNS or not all((home / name).is_file() for name in ("config.json", "summary.json")):
        return None
    return Run(home, read_json(home / "config.json"), read_json(home / "summary.json"))


def _origin(path: Path) -> str:
    """What the configs say of where the model came from: names of the Hub and of folders look alike in them."""
    names = [read_json(path / file).get("_name_or_path") for file in ("unet/config.json", "model_index.json")]
    said = next((name for name in names if isinstance(name, str) and name and not name.startswith("/")), None)
    return f"its configs say {said!r}" if said else "not named in its folder"


def _same_text_encoder(path: Path, name: str) -> bool:
    return fingerprint(path / "text_encoder") == fingerprint(world(name).TEACHER / "text_encoder")


def _licence_of_teacher(run: Run) -> dict[str, str]:
    teacher = run.config.get("teacher")
    return licence_of(Path(teacher)) if isinstance(teacher, str) and "\0" not in teacher else {}


def _structure(folder: ModelFolder) -> Iterator[str]:
    latent, text = folder.config.sample_size, folder.text_encoder.length
    dense = Structure.dense(folder.config)
    kept = folder.structure or dense
    before, after = count(dense, latent, text), count(kept, latent, text)
    where = f"latents {latent}x{latent}, {text} text tokens, one forward pass"
    if folder.structure is None:
        yield f"{after.true / 1e9:.3f} GMAC ({where}), {after.params:,} parameters; nothing is cut"
        return
    yield f"{before.true / 1e9:.3f} -> {after.true / 1e9:.3f} GMAC, {after.ratio:.4f} of the dense UNet's ({where})"
    yield f"{before.params:,} -> {after.params:,} parameters of the UNet"
    whole, left = dict.fromkeys(_UNITS, 0), dict.fromkeys(_UNITS, 0)
    for site in sites(folder.config):
        for width in site.widths:
            whole[width.name] += width.units
            left[width.name] += kept.count(site, width)
    for name, text_of in _UNITS.items():
        if left[name] < whole[name]:
            yield f"{left[name]} of {whole[name]} {text_of}"
    gone = [site.name for site in sites(folder.config) if site.name in kept.dropped and site.within not in kept.dropped]
    if gone:
        yield f"{len(gone)} layers dropped: {listed(gone)}"


def _suppressed(path: Path, run: Run | None) -> Iterator[str]:
    if run and path.name == "student" and (run.path / history.RECORD).is_file():
        upper = run.config.get("upper")
        upper = upper if isinstance(upper, dict) else {}
        how = f"upper steps of the run, one after every {upper.get('every')} lower ones, target {upper.get('eraser')!r}"
        for concept in history.read(run.path).concepts:
            yield f"{Path(concept.name).name!r}: {how}"
    for record in read_records(path):
        for pair in record.pairs:
            yield f"{pair.erase!r} became {pair.guide!r}: an edit of the weights, {record.method}"


def measured(run: Run) -> Measured:
    """What the run has measured of its models, and the command that it was."""
    quality = run.summary.get("quality")
    rows = {
        name: {column: float(value) for column, value in row.items() if type(value) in (int, float)}
        for name, row in (quality.items() if isinstance(quality, dict) else ())
        if isinstance(row, dict)
    }
    columns = {tuple(row) for row in rows.values()}
    return Measured(_command(run.config), rows if len(columns) == 1 and columns != {()} else {})


def _unmeasured(run: Run | None) -> Iterator[str]:
    yield "What the precision of the stored weights changes in pictures."
    yield "What the model draws on other prompts than those of the run." if run else "What the model draws."
    yield "Whether a suppressed concept comes back under other words, by an attack or by further training."


def _command(config: Mapping[str, Any]) -> str:
    """The command line of a run: its preset, and what it was told beside; without paths of the machine above it."""
    name = config.get("preset")
    words = ["python -m bilevel_fast.train", _word("--preset", str(name))]
    try:
        known = dict(_flat(preset(str(name)).to_dict()))
    except UserError:  # of another release
        known = {}
    for flag, value in _flat(config):
        if flag == "preset" or flag in VOLATILE or flag.partition(".")[0] in VOLATILE:
            continue
        if flag in known and _plain(known[flag]) != _plain(value):
            words.append(_word(f"--{flag.replace('_', '-')}", value))
    return " ".join(words)


def _flat(fields: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _word(flag: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    values = value if isinstance(value, list) else [value]
    return " ".join([flag, *(shlex.quote(_shown(str(each))) for each in values)])


def _shown(text: str) -> str:
    """Of a path from the root its last name: where it lay on a machine is nobody's business."""
    text = f"{Path(text).name}/" if text.startswith("/") else text
    return text if text.isprintable() else repr(text)
