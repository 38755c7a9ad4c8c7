"""The planned structures: committed files are what the planner says today, and no plan of that price is worth more."""

import json
import math

import pytest

from benchmarks import structures
from benchmarks.structures import FOLDER, NAMES, PLANNED, model, plan, structure
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure


def worth(found: Structure) -> float:
    """Sum of the logarithms of all kept shares, each unit counting alike."""
    return sum(math.log(len(found.kept[s.name][w.name]) / w.units) for s in sites(found.config) for w in s.widths)


@pytest.mark.parametrize("name", PLANNED)
def test_committed_files(name):
    """What `write` writes, with numbers that can be counted again, within 0.2 % of the budget."""
    size, ratio = model(), float(name.removeprefix("planned-"))
    kept = structure(name)
    assert kept == plan(name, size)
    macs, dense = count(kept, size.latent, size.text), count(Structure.dense(size.config), size.latent, size.text)
    assert ratio - 0.002 <= macs.ratio <= ratio
    provenance = json.loads((FOLDER / f"{name}.json").read_text())["provenance"]
    assert (provenance["true_macs"], provenance["official_macs"]) == (macs.true, macs.official)
    assert (provenance["true_ratio"], provenance["official_ratio"]) == (macs.ratio, macs.official / dense.official)
    assert provenance["params"] == macs.params


def test_write_makes_the_committed_files(tmp_path, capsys):
    structures.write(tmp_path / "structures")
    written = {path.name: path.read_bytes() for path in (tmp_path / "structures").iterdir()}
    assert written == {f"{name}.json": (FOLDER / f"{name}.json").read_bytes() for name in PLANNED}
    assert [line.split()[1:3] for line in capsys.readouterr().out.splitlines()] == [
        ["322.209", "GMAC"],
        ["221.531", "GMAC"],
    ]


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize(("planned", "even"), [("planned-0.80", "0.80"), ("planned-0.55", "0.55")])
def test_planned_beats_even(planned, even, tiny):
    """On its own objective; the old names stay what they were: an even share of every vector."""
    size = model(tiny)
    assert worth(structure(planned, tiny)) > worth(structure(even, tiny)) + 1
    assert abs(count(structure(planned, tiny), size.latent, size.text).ratio - float(even)) < 0.002
    shares = [structure(even, tiny).count(s, w) / w.units for s in sites(size.config) for w in s.widths if w.units > 10]
    assert max(shares) - min(shares) <= 0.15


def test_names_are_apart():
    assert not {*NAMES} & {*PLANNED}
