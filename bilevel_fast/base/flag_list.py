"""The flags of a command, as the source of the dataclass that it reads them into describes them.

The docstring under a field is its text, its default is said once, and beside it the range that `in_range` holds it to.
Two variables of the class say the rest:

    GROUPS: ClassVar = {"run": ("preset", "out")}    fields of the class by heading; a nested dataclass is a group
    MAIN: ClassVar = ("preset", "lower.steps")       flags of the short page; without it that has all
"""

import ast
import dataclasses
import inspect
import re
import shlex
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import tyro

WORDS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Flag:
    """One flag, or a word without one.

    Attributes:
        names: As they are typed: `--twin`, `--no-twin`; of a word its name.
        metavar: What follows; empty for a switch.
        choices: What may follow, where that is a list.
        text: What it does, its default and its range.
        group: Its heading.
        about: What stands below the heading.
        main: Whether it is on the short page.
        several: Whether any number of values follows.
        word: Whether it is a word without a flag.
        path: Whether what follows are files or folders.
    """

    names: tuple[str, ...]
    metavar: str
    choices: tuple[str, ...]
    text: str
    group: str
    about: str
    main: bool
    several: bool
    word: bool
    path: bool


def flags_of(kind: Any, default: Any = None) -> list[Flag]:
    """All flags of a dataclass, in the order of the page.

    Args:
        kind: The dataclass.
        default: An instance with the defaults; without it the class has them.
    """
    main = {name for owner in kind.__mro__ for name in vars(owner).get("MAIN", ())}
    found = list(_walk(kind, default, "", "", main))
    groups = list(dict.fromkeys(flag.group for flag in found))
    named = [title for owner in kind.__mro__ for title in vars(owner).get("GROUPS", ())]
    order = [*(title for title in dict.fromkeys(named) if title in groups), *groups]
    return sorted(found, key=lambda flag: order.index(flag.group))


def _walk(
    kind: Any, default: Any, prefix: str, about: str, main: set[str], outer: dict[str, str] | None = None
) -> Iterator[Flag]:
    """Flags of a dataclass and of those within; `prefix` is `lower.` within `lower`, `outer` the ranges said around."""
    hints = typing.get_type_hints(kind, include_extras=True)
    texts, own = _source(kind)
    ranges = own | (outer or {})
    around = {flag: said for flag, said in ranges.items() if flag.startswith("--")}
    titles = {
        name: title
        for owner in kind.__mro__
        for title, names in vars(owner).get("GROUPS", {}).items()
        for name in names
    }
    for field in dataclasses.fields(kind):
        name, value = prefix + field.name.replace("_", "-"), _default(field, default)
        if dataclasses.is_dataclass(field.type):
            inner = None if value is dataclasses.MISSING else value
            yield from _walk(field.type, inner, f"{name}.", _about(field.type), main, around)
            continue
        hint, notes = _stripped(hints[field.name])
        text = next((note.help for note in notes if getattr(note, "help", None)), texts.get(field.name, ""))
        required = value is dataclasses.MISSING or value is tyro.MISSING
        bounds = next((said for flag, said in ranges.items() if f".{name}".endswith(f".{flag.removeprefix('--')}")), "")
        word = tyro.conf.Positional in notes
        metavar, choices, several = _values(hint)
        path = metavar.startswith("PATH")
        if word and choices:
            text += f" One of {', '.join(choices)}."
        group = (titles.get(field.name, "flags") if not prefix else f"--{prefix}*") if not word else "arguments"
        yield Flag(
            names=(field.name,) if word else _names(name, hint is bool, value),
            metavar=field.name.upper().replace("_", "-") if word else metavar,
            choices=choices,
            text=_text(text, _hint(required, word, value, text), bounds),
            group=group,
            about=about,
            main=word or required or not main or name.replace("-", "_") in main,
            several=several,
            word=word,
            path=path,
        )  # fmt: skip


def _names(name: str, switch: bool, value: Any) -> tuple[str, ...]:
    """With the form that switches it off where it is on."""
    section, dot, last = name.rpartition(".")
    return (f"--{name}", f"--{section}{dot}no-{last}") if switch and value is True else (f"--{name}",)


def _text(text: str, value: str, bounds: str) -> str:
    hint = "; ".join(filter(None, [value, "" if bounds == "finite" else bounds]))
    return f"{text} ({hint})" if hint else text


def _default(field: "dataclasses.Field[Any]", default: Any) -> Any:
    if default is not None:
        return getattr(default, field.name)
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _hint(required: bool, word: bool, value: Any, text: str) -> str:
    """What is said of a default; a word without one stands in the usage."""
    return _shown(value, text) if not required else "" if word else "required"


def _shown(value: Any, text: str) -> str:
    """A default that the text does not say itself."""
    if (
        re.search("[Dd]efault:|[Bb]y default", text)
        or value is False
        or value in (None, (), ("",), dataclasses.MISSING)
    ):
        return ""
    if value is True:
        return "default: on"
    values = value if isinstance(value, tuple) else (value,)
    return "default: " + " ".join(shlex.quote(f"{each:g}" if isinstance(each, float) else str(each)) for each in values)


def _stripped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without its annotations and without None, and the annotations."""
    notes: tuple[Any, ...] = ()
    while typing.get_origin(hint) is typing.Annotated:
        hint, *more = typing.get_args(hint)
        notes += tuple(more)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kept = [each for each in typing.get_args(hint) if each is not type(None)]
        hint = kept[0] if len(kept) == 1 else tuple(kept)
    return hint, notes


def _values(hint: Any) -> tuple[str, tuple[str, ...], bool]:
    """What follows a flag of a type, the choices, and whether there may be several; nothing follows a switch."""
    if hint is bool:
        return "", (), False
    if typing.get_origin(hint) is tuple:
        inner, choices, _ = _values(_stripped(typing.get_args(hint)[0])[0])
        return f"{inner} ...", choices, True
    if typing.get_origin(hint) is Literal:
        choices = tuple(str(each) for each in typing.get_args(hint) if each is not None)
        return "|".join(choices), choices, False
    if isinstance(hint, tuple):
        return "|".join(_values(each)[0] for each in hint), (), False
    return WORDS.get(hint, "TEXT"), (), False


def _about(kind: Any) -> str:
    return " ".join((kind.__doc__ or "").split())


@cache
def _source(kind: Any) -> tuple[dict[str, str], dict[str, str]]:
    """By field the docstring under it; by flag, and by its last name, the range that `in_range` is asked for."""
    texts: dict[str, str] = {}
    ranges: dict[str, str] = {}
    owners: list[Any] = [owner for owner in reversed(kind.__mro__) if dataclasses.is_dataclass(owner)]
    for owner in owners:
        (found,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(found, ast.ClassDef)
        for node, after in pairwise(found.body):
            match node, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
        for node in ast.walk(found):
            match node:
                case ast.Call(
                    func=ast.Name(id="in_range"), args=[ast.Constant(str(flag)), _, ast.Constant(str(said)), _]
                ):
                    ranges[flag] = said
                    ranges.setdefault(flag.removeprefix("--").rpartition(".")[2], said)
    return texts, ranges
