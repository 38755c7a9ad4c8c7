"""User errors: one clear line, exit code 2, never a traceback."""

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable
from types import ModuleType


class UserError(ValueError):
    """The user can mend this. The message is one line: what came, where, what was wanted."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The tail of a message about a mistyped name: `; did you mean 'a' or 'b'?`, or the choices if none is near."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
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


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which command installs it.

    Args:
        module: Import name, such as `diffusers`.
        extra: The extra of this package that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{module} is not installed; run: pip install -e '.[{extra}]'") from error


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
