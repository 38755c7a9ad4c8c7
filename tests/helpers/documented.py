"""What README.md and docs/ tell a reader to type: commands, flags, code and links."""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro

from bilevel_fast.base import flags

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "situations.md")  # generated from tests: what users bring, not what they should type


@dataclass(frozen=True)
class Command:
    """`python -m MODULE ...` as a page has it."""

    line: str
    module: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the entry point, and of what it is asked to do: `prepare coco`."""
        stem = self.module.removeprefix("bilevel_fast.")
        return (
            f"{stem} {self.arguments[0]}"
            if stem in ("prepare", "erase", "attack", "prune") and self.arguments
            else stem
        )

    def main(self) -> Callable[[], None]:
        """Its entry point."""
        module = importlib.import_module(self.module)
        return (importlib.import_module(f"{self.module}.__main__") if hasattr(module, "__path__") else module).main


def sections(page: Path) -> Iterator[tuple[str, str]]:
    """Heading and text, without what is generated; the text before the first heading has none."""
    text = re.sub(r"<!-- (\w+): [^>]*-->.*?<!-- /\1 -->", "", page.read_text(), flags=re.DOTALL)
    parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    yield "", parts[0]
    yield from zip(parts[1::2], parts[2::2], strict=True)


def commands(text: str) -> Iterator[Command]:
    """Commands on lines of their own, and those between backticks."""
    bare = re.sub(r"^```python.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    shown = re.findall(r"^ {4,}(?:\.venv/bin/)?(python -m .*)$", bare, flags=re.MULTILINE)
    inline = re.findall(r"`(?:\w+=\S+ )*(?:\.venv/bin/)?(python\s+-m\s[^`]*)`", bare)
    for line in [*shown, *(" ".join(text.split()) for text in inline)]:
        if "<" in line:
            continue  # a name that the reader puts in
        module, *arguments = shlex.split(line, comments=True)[2:]
        several = module.startswith("bilevel_fast.") and module.split(".")[1] in ("prepare", "erase", "attack", "prune")
        if "..." in module or (several and not arguments):
            continue  # named, not shown
        if module.startswith(("bilevel_fast.", "benchmarks.")):
            yield Command(line, module, tuple(arguments))


def code(page: Path) -> list[str]:
    """Its blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Files that it leads to."""
    return [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()) if "://" not in link]


class Parsed(BaseException):
    """Raised by a command's own parser instead of returning: `kinds` are what it reads into."""

    def __init__(self, value: Any, *kinds: Any) -> None:
        self.value, self.kinds = value, kinds


def parse(command: Command) -> set[str]:
    """Give a command's arguments to its own parser and stop; returns all flags that it knows.

    Raises:
        AssertionError: The parser refuses them, or the command has none.
    """
    with pytest.MonkeyPatch.context() as patch:
        read, several, known = (
            flags.parse,
            tyro.extras.subcommand_cli_from_dict,
            argparse.ArgumentParser.parse_known_args,
        )

        def one(kind: Any, *args: Any, **options: Any) -> Any:
            value = read(kind, *args, **options)
            if callable(getattr(value, "check", None)):
                value.check()
            raise Parsed(value, kind)

        def chosen(kinds: dict[str, Any], **options: Any) -> Any:
            raise Parsed(several(kinds, **options), *kinds.values())

        def classic(self: argparse.ArgumentParser, *args: Any) -> Any:
            raise Parsed(known(self, *args), self)

        patch.setattr(flags, "parse", one)
        patch.setattr(tyro.extras, "subcommand_cli_from_dict", chosen)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", classic)
        patch.setattr(sys, "argv", [command.module, *command.arguments])
        try:
            command.main()()
        except Parsed as parsed:
            return {name for kind in parsed.kinds for name in known_flags(kind)}
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{command.line}: {error}") from error
    raise AssertionError(f"{command.line}: it has parsed nothing")


def known_flags(kind: Any) -> Iterator[str]:
    """All flags of a parser, `--no-` forms among them."""
    if not is_dataclass(kind):
        yield from kind._option_string_actions
        return
    for flag in flags._flags(kind):
        yield flag
        section, dot, name = flag.removeprefix("--").rpartition(".")
        yield f"--{section}{dot}no-{name}"
