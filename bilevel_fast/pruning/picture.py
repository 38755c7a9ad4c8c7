"""A picture of what a structure keeps, in characters for a terminal."""

import sys

from bilevel_fast.models.architecture import Site, Width, sites
from bilevel_fast.models.structure import Structure
from bilevel_fast.pruning.budget import Prices

BAR = 10
UNITS = {"groups": "groups", "attn1": "heads", "attn2": "heads", "ff": "groups"}


def picture(structure: Structure, prices: Prices) -> str:
    """One line per site: a bar of the share that stays of what it takes, how much of the whole UNet that saves, and the
    units kept of each width vector. A bar is full where everything is kept, and empty where the site is dropped."""
    members = sites(structure.config)
    pad = max(len(site.name) for site in members)
    full, empty = marks()

    def kept(site: Site) -> str:
        if site.name in structure.dropped:
            return "dropped"
        return "  ".join(units(site, width) for width in site.widths)

    def units(site: Site, width: Width) -> str:
        name = f"{width.name} " if len(site.widths) > 1 else ""
        return f"{name}{structure.count(site, width):2}/{width.units} {UNITS[width.name]}"

    def line(site: Site) -> str:
        dense, left = prices.sites[site.name].dense, prices.site(structure, site.name)
        gone = site.name in structure.dropped
        whole = not gone and all(structure.count(site, width) == width.units for width in site.widths)
        bar = BAR if whole else 0 if gone else min(max(round(BAR * left / dense), 1), BAR - 1)
        saved = (dense - left) / prices.dense
        shown = f"{site.name:{pad}}  {full * bar + empty * (BAR - bar)} {left / dense:5.0%} {saved:7.2%}  {kept(site)}"
        return shown.rstrip()  # of a Transformer whose blocks have lines of their own there is nothing to say

    head = f"{'site':{pad}}  {f'{prices.what} kept':{BAR + 6}} {'saved':>7}  units kept"
    return "\n".join([head, *map(line, members)])


def marks() -> tuple[str, str]:
    """What bars are drawn with: blocks where the terminal has them."""
    try:
        "█░".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#", "."
    return "█", "░"
