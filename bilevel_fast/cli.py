"""`bilevel-fast NAME ...` is `python -m bilevel_fast.NAME ...`, and so is `python -m bilevel_fast NAME ...`."""

import importlib
import sys

import bilevel_fast
from bilevel_fast.base import errors

COMMANDS = {
    "train": "prune, distil and suppress concepts in one run",
    "prune": "prune a model folder to a budget",
    "export": "a model to diffusers, one file, ONNX or torch, with a card",
    "erase": "erase concepts from a model folder by an edit of its weights",
    "attack": "search prompts that bring back what was erased",
    "prepare": "images and captions to the latent cache that training reads",
    "sample": "prompts to a grid, or a file of them to a folder of images",
    "evaluate": "judge models of the mini world, or folders of images",
    "convert": "a Stable Diffusion checkpoint in one file to a model folder",
    "reproduce": "the paper's tables and figures, on the mini world or in full",
    "profile": "where the time of a training step goes",
    "doctor": "what is installed, what runs where and why, what is missing",
    "completion": "completion of all this by bash, zsh or fish",
}
"""Modules of this package with a `main`, in the order of the overview."""


def main() -> None:
    """Console script: hands over to the entry point that is named, and ends as it does."""
    raise SystemExit(errors.run(_main))


def _main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"bilevel-fast {bilevel_fast.__version__}")
        return
    if name in ("-h", "--help", "--help-all"):
        lines = [f"  {command:<11}{what}" for command, what in COMMANDS.items()]
        more = "bilevel-fast NAME --help says more, bilevel-fast --version which release this is"
        print("\n".join(["usage: bilevel-fast NAME [FLAGS]", "", *lines, "", more]))
        return
    if name not in COMMANDS:
        raise errors.UserError(f"no command {name!r}{errors.nearest(name, COMMANDS)}")
    sys.argv = [f"bilevel-fast {name}", *sys.argv[2:]]
    importlib.import_module(f"bilevel_fast.{name}").main()


if __name__ == "__main__":
    main()
