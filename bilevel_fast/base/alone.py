"""Commands under torchrun: those that work in one process only, and those whose processes share work."""

import os
import time

from bilevel_fast.base.errors import UserError

_WAIT = 3.0  # seconds that the first process of a machine has to say it: torchrun ends all when one has ended


def alone(command: str) -> None:
    """Refuse to be one of several processes that torchrun has started: they would write the same files.

    Args:
        command: Its name, for the message.

    Raises:
        UserError: There are several. The first one of a machine says it, the others end silently.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if "RANK" not in os.environ or world == "1":
        return
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_WAIT)
        raise SystemExit(2)
    raise UserError(f"{world} processes of {command} were started, wanted 1: they would not share work")


def together() -> None:
    """Begin a command whose processes share work: where a launcher started it, torch's C++ keeps to errors.

    Else a rank that is gone leaves a stack of C++ beside our line. Torch reads the level when it is loaded, so this
    comes before it.
    """
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
