"""User errors: one clear line, exit code 2, never a traceback."""

import dataclasses
import difflib
import importlib
import math
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

_NAME = 200  # characters of a name that are compared
_LONGEST = 4096  # characters of a message: a file's text may be in it


class UserError(ValueError):
    """The user can mend this. The message is one line: what came, where, what was wanted.

    What a file brought may stand in it: characters that would end the line or command the terminal are written out.
    """

    def __init__(self, message: str, more: str = "") -> None:
        """`more` is text of ours that follows on lines of its own."""
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 4 :]}"
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(line + (f"\n{more}" if more else ""))


def nearest(name: str, choices: Iterable[str]) -> str:
    """The tail of a message about a mistyped name: `; did you mean 'a' or 'b'?`, or the choices if none is near."""
    known = sorted(choices)
    near = difflib.get_close_matches(name[:_NAME], known, n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(map(repr, near)) + "?"
    shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    return f"; choose from {shown}" if known else ""


def in_range(flag: str, value: object, wanted: str, good: bool) -> None:
    """Refuse a setting that is not `good`: `--upper.lr is 0: wanted > 0`.

    Raises:
        UserError: Names the flag, what came, and what was wanted.
    """
    if not good:
        raise UserError(f"{flag} is {value}: wanted {wanted}")


def check_finite(settings: object, prefix: str = "--") -> None:
    """Refuse a setting that is infinite or not a number, anywhere in a dataclass: no range of ours has room for one.

    Raises:
        UserError: Names the flag: `--lower.lr is inf: wanted finite`.
    """
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value, flag = getattr(settings, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            check_finite(value, f"{flag}.")
        for number in value if isinstance(value, tuple) else (value,):
            in_range(flag, number, "finite", not isinstance(number, float) or math.isfinite(number))


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which command installs it: that works for a wheel and for a checkout.

    Args:
        module: Import name, such as `diffusers`.
        extra: The extra of this package that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{module} is not installed; run: pip install 'bilevel-fast[{extra}]'") from error


def run(main: Callable[[], None]) -> int:
    """Run an entry point: 0 if it ends well, 2 after a user error, 1 when the system refuses, 130 when interrupted."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
