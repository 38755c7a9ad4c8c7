"""Command lines from dataclasses: tyro, with a mistyped flag refused in one line."""

import ast
import contextlib
import dataclasses
import inspect
import io
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, TypeVar

import tyro

from bilevel_fast.base.errors import UserError, check_finite, nearest

_T = TypeVar("_T")

_HERE = "(description)"  # stands for the description until the help is laid out


def parse(
    kind: type[_T],
    module: str,
    description: str | None,
    *,
    args: Sequence[str] | None = None,
    default: _T | None = None,
) -> _T:
    """Read flags into a dataclass; `--help` prints the docstrings under its fields.

    Args:
        kind: The dataclass.
        module: What the user ran with `python -m`.
        description: Heads the help.
        args: Instead of sys.argv.
        default: Values of the flags that are not given; without it, the dataclass has them all.

    Raises:
        UserError: There is no such flag; the nearest are named. Or the dataclass refuses its values, or one is infinite
            or not a number. A missing or malformed value ends in tyro's own message and exit code 2.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    shown = {"-h", "--help"} & set(sys.argv[1:] if args is None else args)
    if shown:
        _document(kind)
    held, help_text = io.StringIO(), _Aside()
    try:
        with contextlib.redirect_stderr(held), contextlib.redirect_stdout(help_text):
            config, unknown = tyro.cli(
                kind, prog=f"python -m {module}", description=_HERE, args=args, return_unknown_args=True, **given
            )
    except SystemExit as end:
        sys.stdout.write(help_text.getvalue().replace(_HERE, inspect.cleandoc(description or ""), 1))
        sys.stdout.flush()
        cause = end.__context__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:  # a dataclass refused its values: what it says, without tyro's box around it
            raise cause from None
        sys.stderr.write(held.getvalue())
        raise
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise UserError(f"there is no flag {flag!r}{nearest(flag, _flags(kind))}")
    check_finite(config)
    return config


class _Aside(io.StringIO):
    """Text that will go to standard output: tyro asks what that can show."""

    encoding = property(lambda self: sys.__stdout__.encoding if sys.__stdout__ else None)  # type: ignore[assignment]

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


def _document(kind: Any) -> None:
    """Give tyro the docstring under each field as one piece: it takes the line breaks of the source for paragraphs."""
    texts: dict[str, str] = {}
    owners: list[Any] = [owner for owner in reversed(kind.__mro__) if dataclasses.is_dataclass(owner)]
    for owner in owners:
        (found,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(found, ast.ClassDef)
        for node, after in pairwise(found.body):
            match node, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    for field in dataclasses.fields(kind):
        if field.name in texts:
            field.metadata = MappingProxyType({**field.metadata, "help": texts[field.name]})
        if dataclasses.is_dataclass(field.type):
            _document(field.type)


def _flags(kind: Any, prefix: str = "--") -> Iterator[str]:
    for field in dataclasses.fields(kind):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.type):
            yield from _flags(field.type, f"{name}.")
        else:
            yield name
