"""`bilevel-fast NAME ...` is `python -m bilevel_fast.NAME ...`."""

import importlib
import sys

from bilevel_fast import __version__
from bilevel_fast.base import errors

COMMANDS = {
    "convert": "a Stable Diffusion checkpoint in one file to a model folder",
    "train": "prune, distil and suppress concepts in one run",
    "prune": "prune a model folder to a MAC budget",
    "erase": "erase concepts from any model folder by an edit of its weights",
    "prepare": "images and captions to the latent cache that training reads",
    "sample": "prompts to a PNG grid, or a file of them to a folder of images, with any model folder",
    "evaluate": "judge models of the mini world, or folders of images by the paper's metrics",
    "reproduce": "the paper's tables and figures, on the mini world or in full",
    "profile": "where the time of a training step goes",
    "doctor": "what is installed here, what runs where and why, what is missing",
}


def main() -> None:
    """Console script: hands over to the entry point that is named."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"bilevel-fast {__version__}")
        return
    if name in ("-h", "--help"):
        lines = [f"  {command:<10}{what}" for command, what in COMMANDS.items()]
        more = "bilevel-fast NAME --help says more, bilevel-fast --version which release this is"
        print("\n".join(["usage: bilevel-fast NAME [OPTIONS]", "", *lines, "", more]))
        return
    if name not in COMMANDS:
        print(f"error: no command {name!r}{errors.nearest(name, COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"bilevel-fast {name}", *sys.argv[2:]]
    raise SystemExit(errors.run(importlib.import_module(f"bilevel_fast.{name}").main))
