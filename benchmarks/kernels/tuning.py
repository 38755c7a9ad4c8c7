"""From measured rows to the table of `bilevel_fast.ops.providers`: who wins what."""

import json
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

import torch

from bilevel_fast.base.files import write_atomic
from bilevel_fast.ops import providers

PATH = Path(providers.__file__).parent / "providers.json"
MARGIN = 1.03  # how much faster than torch a provider must be to be taken instead: less is noise


def winners(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """op -> size class -> the provider with the least time, geometric mean over the cases of the class.

    Only providers that `ops.dispatch` can call take part, and of those only the ones measured on every case of
    the class; torch stays where nobody beats it by MARGIN.
    """
    times: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["provider"] in providers.PROVIDERS and row["value"] is not None:
            times[row["op"], providers.size_class(row["numel"])][row["provider"]][row["case"]] = row["value"]
    table: dict[str, dict[str, str]] = {}
    for (op, size), by_provider in sorted(times.items()):
        if not (torch_times := by_provider.get("torch")):
            continue
        ratios = {
            name: prod(torch_times[case] / t for case, t in found.items()) ** (1 / len(found))
            for name, found in by_provider.items()
            if found.keys() == torch_times.keys()
        }
        best = max(ratios, key=lambda name: ratios[name])
        table.setdefault(op, {})[size] = best if ratios[best] >= MARGIN else "torch"
    return table


def tune(rows: list[dict[str, Any]], device: torch.device) -> None:
    """Replace the rows' architecture, op by op, in the shipped table."""
    table = json.loads(PATH.read_text())
    table.setdefault(providers.architecture(device), {}).update(winners(rows))
    write_atomic(PATH, (json.dumps(table, indent=2, sort_keys=True) + "\n").encode())
    print(f"{PATH.name}: {providers.architecture(device)} written")
