"""Where a student's MACs went, site by site: a table with a bar for each."""

from bilevel_fast.models.architecture import sites
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.pruning.picture import UNITS
from bilevel_fast.runs.page.charts import bar
from bilevel_fast.runs.page.document import Html, escape, join, legend, table


def by_site(structure: Structure, text: int) -> Html:
    """A line for each site and each module that pruning leaves alone, in the order in which data passes them.

    Args:
        structure: Of the student; MACs are counted at the UNet's sample size.
        text: Text tokens.
    """
    latent = structure.config.sample_size
    dense = count(Structure.dense(structure.config), latent, text)
    kept = {row.name: row.true for row in count(structure, latent, text).rows}
    units = {site.name: _units(structure, site.name) for site in sites(structure.config)}
    rows = [row for row in dense.rows if row.true]
    most = max(row.true for row in rows)
    scale, unit = (1e9, "GMAC") if most >= 1e9 else (1e6, "MMAC")
    lines = [
        [
            Html(escape(row.name).replace(".", ".<wbr>")),
            bar(row.true / most, kept[row.name] / most),
            f"{kept[row.name] / row.true:.0%}".replace("%", " %"),
            f"{row.true / scale:.2f}",
            f"{kept[row.name] / scale:.2f}",
            units.get(row.name, "not prunable"),
        ]
        for row in rows
    ]
    head = ["module", f"{unit} of one forward pass", "kept", "dense", "student", "units kept"]
    names = legend([("kept by the student", "one block"), ("only in the dense teacher", "block")])
    return join((names, table(head, lines, label="MACs by site", bars=[1], text=[5], tall=len(lines) > 60)))


def _units(structure: Structure, name: str) -> str:
    if name in structure.dropped:
        return "dropped"
    site = next(site for site in sites(structure.config) if site.name == name)
    shown = (
        (f"{width.name} " if len(site.widths) > 1 else "")
        + f"{structure.count(site, width)}/{width.units}"
        + (f" {UNITS[width.name]}" if len(site.widths) == 1 else "")
        for width in site.widths
    )
    return ", ".join(shown)
