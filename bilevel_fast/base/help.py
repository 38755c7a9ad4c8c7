"""What `--help` shows: the flags that most runs need, in groups; `--help-all` shows every one (`base.flag_list`)."""

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from bilevel_fast.base.flag_list import Flag, flags_of

COMMAND = re.compile(r" *(python|torchrun|nsys|hf|bilevel-fast) ")
WIDEST = 120


def fill(parser: argparse.ArgumentParser, found: Sequence[Flag], everything: bool = True, paths: Any = None) -> None:
    """Give a parser of argparse the flags: it lays out pages, and completion is made of it. It parses nothing.

    Args:
        parser: Gets them, by group.
        found: The flags.
        everything: Those that are not on the short page as well.
        paths: What completes a path, for `shtab`.
    """
    groups: dict[str, Any] = {}
    for flag in found:
        if not (flag.main or everything):
            continue
        if flag.group not in groups:
            about = flag.about.replace("%", "%%") if everything else None
            groups[flag.group] = parser.add_argument_group(flag.group, about)
        more: dict[str, Any] = {"action": "store_true"}
        if flag.metavar:
            more = {"metavar": flag.metavar, "nargs": "*" if flag.several else None}
            more["choices"] = flag.choices or None
        action = groups[flag.group].add_argument(*flag.names, help=flag.text.replace("%", "%%"), **more)
        if flag.path and paths is not None:
            action.complete = paths


def page(kind: Any, module: str, description: str | None, default: Any = None, everything: bool = False) -> str:
    """What `--help` or `--help-all` prints, as wide as the terminal."""
    width = terminal_width()
    found = flags_of(kind, default)
    left_out = sum(not flag.main for flag in found)
    words = "".join(f" {flag.metavar}" for flag in found if flag.word)
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, add_help=False,
        formatter_class=lambda prog: _Layout(prog, max_help_position=24, width=width),
    )  # fmt: skip
    fill(parser, found, everything)
    about = parser.add_argument_group("help")
    about.add_argument("-h", "--help", action="store_true", help="this page" + " in short" * everything)
    if left_out and not everything:
        about.add_argument("--help-all", action="store_true", help=f"{left_out} further flags")
    usage = f"usage: python -m {module}{words} [flags]"
    return "\n\n".join([usage, *filter(None, [laid_out(description or "", width)]), parser.format_help()])


def terminal_width() -> int:
    """Columns of a page: those of the terminal, 80 where there is none."""
    return max(40, min(shutil.get_terminal_size().columns, WIDEST))


def laid_out(text: str, width: int) -> str:
    """A docstring for a terminal: paragraphs are filled, commands and lines of two columns stay lines of their own."""
    out: list[str] = []
    prose: list[str] = []

    def end() -> None:
        out.extend(textwrap.wrap(" ".join(prose), width, break_on_hyphens=False))
        prose.clear()

    # a command that goes on in further lines of the docstring is one
    joined = re.sub(rf"^({COMMAND.pattern}.*)((?:\n +\S.*)+)", _one_line, inspect.cleandoc(text), flags=re.MULTILINE)
    for line in re.sub(r"\n{3,}", "\n\n", joined).splitlines():
        columns = re.fullmatch(r"(\s*\S.*?\s{3,})(\S.*)", line)
        if not line.strip() or COMMAND.match(line) or columns or line.startswith(" "):
            end()
            out += _command(line, width) if COMMAND.match(line) else _columns(line, columns, width)
        else:
            prose.append(line.strip())
    end()
    return "\n".join(out).strip("\n")


def _one_line(found: re.Match[str]) -> str:
    return " ".join(found[0].split()) if "\n" in found[0] else found[0]


def _command(line: str, width: int) -> list[str]:
    """A command over several lines that can be pasted: a flag stays with what follows it, where that fits."""
    words = re.findall(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""", line.strip())
    units: list[str] = []
    for word in words:
        if units and units[-1].startswith("--") and not word.startswith("-") and len(units[-1] + word) < width // 2:
            units[-1] += f" {word}"
        else:
            units.append(word)
    lines = [""]
    for unit in units:
        if len(lines[-1]) + len(unit) + 3 > width and lines[-1].strip():
            lines.append("   ")
        lines[-1] += f" {unit}" if lines[-1] else unit
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _columns(line: str, columns: re.Match[str] | None, width: int) -> list[str]:
    first, rest = (columns[1], columns[2]) if columns else (re.match(r"\s*", line)[0], line.strip())  # type: ignore[index]
    indent = " " * len(first)
    return textwrap.wrap(rest, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False) or [""]


class _Layout(argparse.HelpFormatter):
    """Paragraphs in the text of a flag stay paragraphs; a flag stands once, with what follows it."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        parts = (" ".join(part.split()) for part in text.split("\n\n"))
        return [line for part in parts for line in textwrap.wrap(part, width, break_on_hyphens=False)]

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(action.option_strings) or str(action.metavar)
        return f"{names} {action.metavar}" if action.option_strings and action.metavar else names
