"""What a finished run shows: a table, a picture, a page."""

import base64
import html
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel_fast.base.files import read_json_lines

if TYPE_CHECKING:  # imported where it is used: the engine alone needs torch, triton, numpy and safetensors only
    pass


def curves(stats: Mapping[str, Path]) -> bytes:
    """Losses over images seen, one line per term and training, as PNG.

    Args:
        stats: `stats.jsonl` per training.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    terms = ("lower/diffusion", "lower/output", "lower/feature", "upper/suppression")
    figure, axes = plt.subplots(1, len(terms), figsize=(13, 2.8), layout="constrained")
    for axis, term in zip(axes, terms, strict=True):
        for label, path in stats.items():
            records = [record for _, record in read_json_lines(path)]
            points = [(r["images"], r[term]) for r in records if type(r.get(term)) is float and "images" in r]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1.5)
        axis.set(title=term, xlabel="images seen", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def page(title: str, summary: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """One self-contained HTML page: the quality table, the pictures, the whole summary."""
    quality: Mapping[str, Mapping[str, float]] = summary.get("quality") or {}
    cells = ""
    if quality:
        columns = list(next(iter(quality.values())))
        cells = "<tr><th></th>" + "".join(f"<th>{html.escape(c)}</th>" for c in columns) + "</tr>"
        for name, row in quality.items():
            cells += f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{row[c]:.3f}</td>" for c in columns) + "</tr>"
        cells = f"<h2>Quality</h2><table>{cells}</table>"
    figures = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, data in pictures.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#28282e}"
        "table{border-collapse:collapse}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:right}"
        "th:first-child{text-align:left}figure{margin:1.5rem 0}img{max-width:100%;height:auto}"
        "figcaption{color:#666}pre{background:#f5f5f7;padding:1rem;overflow:auto}</style>"
        f"<h1>{html.escape(title)}</h1>{cells}{figures}"
        f"<h2>Summary</h2><pre>{html.escape(json.dumps(summary, indent=2))}</pre></html>\n"
    )
