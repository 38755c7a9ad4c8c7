"""Command lines from dataclasses: tyro, with a mistyped flag refused in one line."""

import contextlib
import dataclasses
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from bilevel_fast.base.errors import UserError, check_finite, nearest
from bilevel_fast.base.help import laid_out, page, terminal_width

_T = TypeVar("_T")


def parse(
    kind: type[_T],
    module: str,
    description: str | None,
    *,
    args: Sequence[str] | None = None,
    default: _T | None = None,
) -> _T:
    """Read flags into a dataclass; `--help` and `--help-all` print its page (`base.help`) and end the command.

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
    words = list(sys.argv[1:] if args is None else args)
    if {"-h", "--help", "--help-all"} & set(words):
        sys.stdout.write(page(kind, module, description, default, everything="--help-all" in words))
        sys.stdout.flush()
        raise SystemExit(0)
    given: dict[str, Any] = {} if default is None else {"default": default}
    held = io.StringIO()
    try:
        with contextlib.redirect_stderr(held):
            config, unknown = tyro.cli(
                kind, prog=f"python -m {module}", description="", args=words, return_unknown_args=True, **given
            )
    except SystemExit as end:
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


def value(argv: Sequence[str], flag: str) -> str | None:
    """What follows a flag on a command line that is not parsed yet; None where it is not given."""
    for arg, after in zip(argv, [*argv[1:], ""], strict=False):
        if arg == flag or arg.startswith(f"{flag}="):
            return after if arg == flag else arg.partition("=")[2]
    return None


def overview(text: str) -> str:
    """A page of a command that has further names, as wide as the terminal."""
    return laid_out(text, terminal_width())


def _flags(kind: Any, prefix: str = "--") -> Iterator[str]:
    for field in dataclasses.fields(kind):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.type):
            yield from _flags(field.type, f"{name}.")
        else:
            yield name
