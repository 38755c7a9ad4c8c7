"""Model folders by an id on the Hugging Face hub, `OWNER/NAME` or `OWNER/NAME@REVISION`: `local` fetches what is read.
The built-in teachers go by the names of their worlds.

Every model folder that a user names goes through `local`. Files lie in the cache of huggingface_hub, and its settings
hold: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. What is fetched is JSON, text and safetensors of the
components that are read, in one precision: never a pickle, never code, no safety checker.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.models.family import FAMILIES, family_of
from bilevel_fast.models.weights import PICKLES, STEMS, weight_names

_ID = re.compile(r"(?!.*\.\.)([a-zA-Z0-9][\w.-]*/[a-zA-Z0-9][\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)
_FILES = (".safetensors", ".json", ".txt", *(pattern.removeprefix("*") for pattern in PICKLES))
_READ = (".json", ".txt", ".model")
_WORLDS = Path(__file__).parents[1] / "worlds"
_PARTS = {
    **dict.fromkeys(("feature_extractor", "scheduler", "tokenizer", "tokenizer_2"), None),
    **dict.fromkeys(("unet", "vae"), STEMS[0]),
    **dict.fromkeys(("text_encoder", "text_encoder_2"), STEMS[1]),
}
"""The components that are fetched, and the stem of their weights; None where they have none."""

_log = logging.getLogger(__name__)


def local(given: Path | str, weights: bool = True) -> Path:
    """The folder on this machine that a model folder's name stands for; what has an id on the hub is fetched.

    What exists is taken as it is. The name of a built-in world (`mini`, `emoji`) stands for its teacher. Of the rest,
    an id is a name of two parts, `OWNER/NAME`, that could not be a mistyped path: it ends neither in `/` nor like a
    file (`.safetensors`, `.ckpt`), begins with neither `/`, `.` nor `~`, and there is no folder OWNER here. Any other
    name is returned for its reader to refuse.

    Without a network, and with HF_HUB_OFFLINE=1, the copy in the cache is read.

    Args:
        given: A path, or `OWNER/NAME`, or `OWNER/NAME@REVISION` (a branch, a tag or a commit).
        weights: Whether they are wanted, and not the files beside them alone, which are about a megabyte.

    Raises:
        UserError: huggingface_hub is not installed; there is no such model or revision, it is gated, it is no model
            that can be read, it has only pickles, or it can neither be fetched nor is it in the cache.
        OSError: It cannot be written: a full disk say.
    """
    path = Path(given)
    if not path.exists() and str(given) in {family.world for family in FAMILIES.values()}:
        return _WORLDS / str(given) / "weights" / "teacher"
    match = _ID.fullmatch(str(given))
    if match is None or path.exists() or path.parent.is_dir() or str(given).endswith(_FILES):
        return path
    return _fetched(match[1], match[2], weights)


@cache  # asked for by every reader of a run: the hub is asked once, and all of them see the same revision
def _fetched(name: str, revision: str | None, weights: bool) -> Path:
    what = name if revision is None else f"{name}@{revision}"
    hub: Any = require("huggingface_hub", "sd")
    try:
        # unlike a list of files, it is not asked for again and again where there is no network
        names = [file.rfilename for file in hub.HfApi().model_info(name, revision=revision, timeout=30).siblings]
    except Exception as error:  # versions of the library raise errors of different HTTP clients
        _refuse(hub, what, error)
        _log.debug("%s: %r", what, error)
        return _cached(hub, name, revision, weights, what, error)
    described = list(wanted(names, what, weights=False))
    chosen = list(wanted(names, what)) if weights else []
    path = Path(what)
    try:
        path = Path(hub.snapshot_download(name, revision=revision, allow_patterns=described))
        family_of(path)  # what is something else is refused before gigabytes of it are fetched
        if weights:
            path = Path(hub.snapshot_download(name, revision=revision, allow_patterns=[*described, *chosen]))
    except UserError as error:
        raise UserError(str(error).replace(str(path), what)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        _refuse(hub, what, error)
        raise UserError(f"{what} could not be fetched whole ({_said(error)}); call again: what came is kept") from error
    return path


def wanted(names: Iterable[str], what: str, weights: bool = True) -> Iterator[str]:
    """Of all files of a repository, those that a model folder is read from.

    Args:
        names: Relative to its root.
        what: Names it in messages.
        weights: As `local`.

    Raises:
        UserError: It is no folder in the diffusers layout, or a component that is there has no safetensors.
    """
    names = sorted(names)
    if "model_index.json" not in names:
        held = ", ".join([name for name in names if not name.startswith(".")][:3]) or "nothing"
        raise UserError(f"{what} is no model in the diffusers layout: it has no model_index.json, but {held}")
    yield "model_index.json"
    for part, stem in _PARTS.items():
        here = [path.name for name in names if (path := PurePosixPath(name)).parts[:-1] == (part,)]
        yield from (f"{part}/{name}" for name in here if name.endswith(_READ))
        if stem is None or not here or not weights:
            continue
        found = weight_names(PurePosixPath(what, part), stem, here)
        if not found:
            pickles = [name for name in here if any(PurePosixPath(name).match(pattern) for pattern in PICKLES)]
            held = f"only {part}/{pickles[0]}: a pickle is not fetched" if pickles else "none"
            raise UserError(
                f"{what} has no weights of its {part} in safetensors, {held}; wanted {part}/{stem}.safetensors"
            )
        yield from (f"{part}/{name}" for name in found if not name.endswith(_READ))


def _refuse(hub: Any, what: str, error: Exception) -> None:
    """Say what the hub has answered; nothing where it has not."""
    errors = hub.errors
    if isinstance(error, errors.GatedRepoError):
        raise UserError(f"{what} is gated: accept its terms on its page, then call `hf auth login`") from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise UserError(
            f"{what} is neither a folder on this machine nor a model on the hub, or it is private: then call "
            "`hf auth login`; a path that does not exist yet begins with ./"
        ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise UserError(f"{what}: there is no such revision of the model on the hub") from error


def _cached(hub: Any, name: str, revision: str | None, weights: bool, what: str, error: Exception) -> Path:
    index = hub.try_to_load_from_cache(name, "model_index.json", revision=revision)
    offline = hub.constants.HF_HUB_OFFLINE
    why = "HF_HUB_OFFLINE is set" if offline else f"the hub does not answer: {_said(error)}"
    mend = f"unset it, or call `hf download {name}` where there is a network" if offline else "call again"
    if not isinstance(index, str):
        raise UserError(f"{what} is no folder on this machine, it is not in the cache, and {why}; {mend}") from error
    path = Path(index).parent
    held = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    components = [part for part in _PARTS if _PARTS[part] and weights and (path / part).is_dir()]
    lacking = [part for part in components if not weight_names(PurePosixPath(what, part), _PARTS[part] or "", [
        file.partition("/")[2] for file in held if file.startswith(f"{part}/")
    ])]  # fmt: skip
    if lacking:
        raise UserError(f"{what} is in the cache without the weights of its {lacking[0]}, and {why}; {mend}") from error
    if not offline:
        _log.warning("%s is read from the cache: %s", what, why)
    return path


def _said(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
