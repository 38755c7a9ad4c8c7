"""What `train` prints when a run is over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel_fast.base.tables import table


def end(summary: Mapping[str, Any], out: Path) -> str:
    """Size, speed, the quality table if there is one, and where student and report lie."""
    macs = summary["macs"]
    lines = [
        f"{macs['dense_g']:.3f} -> {macs['student_g']:.3f} GMAC ({macs['ratio']:.3f}), "
        f"{summary['lower_steps']} lower and {summary['upper_steps']} upper steps, "
        f"{summary['images_per_second']} images/s, {summary['seconds']} s"
    ]
    if summary["quality"]:
        lines.append(table(summary["quality"]))
    return "\n".join([*lines, f"student: {out / 'student'}   report: {out / 'report.html'}"])
