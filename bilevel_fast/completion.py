"""Print what makes a shell complete commands, flags, their values and paths: for bash, zsh or fish.

python -m bilevel_fast.completion bash > ~/.local/share/bash-completion/completions/bilevel-fast

zsh wants it as `_bilevel-fast` in a folder of its fpath, fish as ~/.config/fish/completions/bilevel-fast.fish.
"""

import argparse
import importlib
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from bilevel_fast.base import errors, flags
from bilevel_fast.base.flag_list import flags_of
from bilevel_fast.base.help import fill
from bilevel_fast.cli import COMMANDS


@dataclass(frozen=True)
class Settings:
    """What it is printed for."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """The shell."""


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return {"": Settings}


def parser(paths: Any) -> argparse.ArgumentParser:
    """All commands as argparse has them; it parses nothing.

    Args:
        paths: What completes a path, for `shtab`.
    """
    root = argparse.ArgumentParser("bilevel-fast", add_help=False)
    names = root.add_subparsers()
    for command, what in COMMANDS.items():
        own = names.add_parser(command, help=what)
        module = importlib.import_module(f"bilevel_fast.{command}")
        kinds: dict[str, Any] = module.settings()
        several = own.add_subparsers() if set(kinds) - {""} else None
        for name, kind in kinds.items():
            # shtab goes on only into parsers that have a help text
            target = several.add_parser(name, help=f"{command} {name}") if several and name else own
            target.add_argument("--help-all", action="store_true", help="every flag")
            # a free word is named by the parser that it chooses, or is anybody's guess
            fill(target, [flag for flag in flags_of(kind) if not flag.word or flag.choices or flag.path], paths=paths)
    return root


def main() -> None:
    asked = flags.parse(Settings, "bilevel_fast.completion", __doc__)
    shtab = errors.require("shtab", "completion")
    print(shtab.complete(parser(shtab.FILE), shell=asked.shell))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
