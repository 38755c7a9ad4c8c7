"""The model card of an exported model: README.md with a header that the Hugging Face Hub reads.

It says what is known of a model and from where, and what is not: nothing in it is a guess.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bilevel_fast.base.files import read_file
from bilevel_fast.base.tables import table

UNKNOWN = "unknown"
_HEADER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"^(license(?:_name|_link)?):[ \t]*[\"']?([^\"'\n#]+?)[\"']?[ \t]*(?:#.*)?\r?$", re.MULTILINE)


@dataclass(frozen=True)
class Measured:
    """Numbers of a run, and the command that it was.

    Attributes:
        command: That measures them again.
        rows: Numbers by column, for each model; the exported one is `student` or `distilled`.
    """

    command: str
    rows: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Attributes:
        name: Of the model: the heading.
        base: What is known of the base model, in words.
        licence: Fields `license`, `license_name` and `license_link` of the base's card, as it has them; empty if there
            is none.
        structure: Lines: MACs, parameters, what was cut.
        suppressed: Lines: which concepts, and how.
        measured: By the run that made it; None if no run is known.
        unmeasured: Lines: what was not measured.
        library: Of the Hub: `diffusers`, `onnx`, `pytorch`.
        snippet: Python that loads the model from the folder of the card.
        more: Lines about the files.
    """

    name: str
    base: str
    licence: Mapping[str, str]
    structure: Sequence[str]
    suppressed: Sequence[str]
    measured: Measured | None
    unmeasured: Sequence[str]
    library: str
    snippet: str
    more: Sequence[str] = field(default_factory=tuple)


def render(facts: Facts) -> str:
    """The text of README.md."""
    licence = dict(facts.licence) or {"license": UNKNOWN}
    header = {**licence, "library_name": facts.library, "pipeline_tag": "text-to-image"}
    said = licence["license"] if facts.licence else "unknown: the base model's folder does not say it; ask the base's"
    fields = "".join(f"{key}: {json.dumps(value)}\n" for key, value in header.items())
    blocks = [
        f"---\n{fields}tags: [bilevel-fast]\n---",
        f"# {facts.name}",
        _lines([f"Base model: {facts.base}", f"Licence: {said}", *facts.more]),
        "## Loading\n\n```python\n" + facts.snippet.strip() + "\n```",
        "## Structure\n\n" + _lines(facts.structure),
        "## Suppressed concepts\n\n" + (_lines(facts.suppressed) or "None that its folder or its run records."),
        "## Measured\n\n" + _measured(facts.measured),
        "## Not measured\n\n" + _lines(facts.unmeasured),
    ]
    return "\n\n".join(blocks) + "\n"


def licence_of(folder: Path) -> dict[str, str]:
    """What the card of a folder (README.md, its header) says of the licence; empty if nothing."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    header = _HEADER.match(read_file(path).decode(errors="replace"))
    found = {key: value.strip() for key, value in _LICENSE.findall(header[1])} if header else {}
    return found if "license" in found else {}


def _measured(measured: Measured | None) -> str:
    if measured is None:
        return "Nothing: there is no record of a run beside the model."
    if not measured.rows:
        return f"Nothing, by the run that made it:\n\n    {measured.command}"
    numbers = "\n".join(f"    {line}" for line in table(measured.rows).splitlines())
    return f"By the run that made it, of which the model is one row:\n\n    {measured.command}\n\n{numbers}"


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line if line.isprintable() else repr(line)}" for line in lines)
