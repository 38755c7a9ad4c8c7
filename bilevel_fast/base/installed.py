"""What is installed: the packages that this one requires, by the extra that brings them, without importing them."""

import importlib.metadata
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

NAME = "bilevel-fast"

_REQUIREMENT = re.compile(  # name, extras, least version, the extra that it is of
    r"""([A-Za-z0-9][\w.-]*)(\[[^]]*\])?\s*\(?(?:>=\s*([\d.]+))?.*?"""
    r"""(?:;.*extra\s*==\s*['"]([\w-]+)['"])?\s*$"""
)
_FOR_US = ("test", "dev")  # extras that no command asks for


@dataclass(frozen=True)
class Part:
    """A package that is required.

    Attributes:
        name: Of the distribution.
        extra: That brings it; None is always there.
        version: That is installed, or None.
        problem: What is wrong with it in a few words, or None.
    """

    name: str
    extra: str | None
    version: str | None
    problem: str | None


def requirements() -> list[str]:
    """What this package requires, as metadata have it: of the checkout that it runs from, else of its distribution.

    Returns:
        Nothing where it is neither a checkout nor installed.
    """
    file = Path(__file__).parents[2] / "pyproject.toml"
    try:
        project = tomllib.loads(file.read_text())["project"]
        if project["name"] == NAME:
            extras = project.get("optional-dependencies", {}).items()
            marked = [f'{line} ; extra == "{extra}"' for extra, lines in extras for line in lines]
            return [*project["dependencies"], *marked]
    except (OSError, KeyError, ValueError):
        pass  # no checkout
    try:
        return importlib.metadata.requires(NAME) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def parts(lines: Iterable[str]) -> list[Part]:
    """Each required package, and whether it is there, new enough and whole. Imports none of them.

    Args:
        lines: `torch>=2.11`, `diffusers>=0.37; extra == "sd"`.
    """
    found = []
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match is None or match[1].lower() == NAME or match[4] in _FOR_US:
            continue
        name, _, least, extra = match.groups()
        version, problem = _look(name, least)
        found.append(Part(name, extra, version, problem))
    return found


def _look(name: str, least: str | None) -> tuple[str | None, str | None]:
    """Version and problem."""
    try:
        here = importlib.metadata.distribution(name)
        version = here.version
        if not version:
            return None, "half installed: it has no version"
        gone = _gone(here)
    except importlib.metadata.PackageNotFoundError:
        return None, "not installed"
    except Exception as error:  # what a broken installation raises is anybody's guess
        return None, f"half installed: {type(error).__name__}"
    if gone:
        return version, f"half installed: {gone[0]} is gone"
    if least and _numbers(version) < _numbers(least):
        return version, f"too old, wanted {least} or newer"
    return version, None


def _gone(here: importlib.metadata.Distribution) -> list[str]:
    """Packages of a distribution whose first file is not where pip has put it."""
    files = (file for file in here.files or [] if len(file.parts) == 2 and file.name == "__init__.py")
    return [file.parts[0] for file in files if not Path(str(here.locate_file(file))).is_file()]


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 11, 0) of 2.11.0+cu130."""
    return tuple(int(number) for number in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))
