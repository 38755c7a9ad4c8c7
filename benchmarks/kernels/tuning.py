"""From measured rows to the table of `bilevel_fast.ops.providers`: who wins what, and who comes next."""

import json
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_atomic
from bilevel_fast.ops import providers

PATH = Path(providers.__file__).parent / "providers.json"
MARGIN = 1.03  # how much faster than torch a provider must be to be taken instead: less is noise

Row = dict[str, Any]


def rankings(rows: list[Row]) -> dict[str, dict[str, list[str]]]:
    """op -> size class -> providers from the fastest on, ending with torch, which takes any input.

    Only providers that `ops.dispatch` can call take part. Each is judged by how many times faster than torch it is, the
    geometric mean over the cases of the class that both ran; who is not by MARGIN is not named.
    """
    times: dict[tuple[str, str], dict[str, dict[tuple[str, str], float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["provider"] in providers.PROVIDERS and row["value"] is not None:
            case = row["case"], row["dtype"]
            times[row["op"], providers.size_class(row["numel"])][row["provider"]][case] = row["value"]
    table: dict[str, dict[str, list[str]]] = {}
    for (op, size), by_provider in sorted(times.items()):
        if not (torch_times := by_provider.pop("torch", None)):
            continue
        faster: dict[str, float] = {}
        for name, found in by_provider.items():
            if common := found.keys() & torch_times.keys():
                faster[name] = prod(torch_times[case] / found[case] for case in common) ** (1 / len(common))
        named = sorted((name for name in faster if faster[name] >= MARGIN), key=lambda name: -faster[name])
        table.setdefault(op, {})[size] = [*named, "torch"]
    return table


def tune(rows: list[Row], path: Path = PATH) -> None:
    """Replace what a table, the shipped one, holds of the architectures, ops and size classes of the rows.

    Raises:
        UserError: No row tells anything.
    """
    table, written = json.loads(path.read_text()), []
    for architecture in sorted({_architecture(row) for row in rows}):
        found = rankings([row for row in rows if _architecture(row) == architecture])
        for op, sizes in found.items():
            table.setdefault(architecture, {}).setdefault(op, {}).update(sizes)
        written += [f"{architecture} ({', '.join(found)})"] * bool(found)
    if not written:
        raise UserError("--tune: no case was measured with torch, which all others are judged by; measure first")
    write_atomic(path, (json.dumps(table, indent=2, sort_keys=True) + "\n").encode())
    print(f"{path.name}: {'; '.join(written)} written")


def _architecture(row: Row) -> str:
    """Rows of a CPU were written before rows said so."""
    return row.get("architecture", "cpu")
