"""Commands that measure, count or project, and what they share. `python -m benchmarks.FOLDER.NAME --help` says more.

counts/     what needs no clock: macs, launches, memory (largest batch), roofline (time by card), roofline_sites
speed/      what a clock says: step, unet, train, data, alignment, mixture, against peers
kernels/    each op alone: sweep (against its rivals), tuning, once (for sanitizers), aot and compile_matrix (what a
            compiler makes of it), page (kernels/README.md); cases/ has one file per op
quality/    what students of the mini world are worth: frontier, controller, methods, aptp, planner, precision
real_size/  every command at the size of Stable Diffusion 2.1, one stage after the other
pages/      readme (the tables of README.md and docs/), site (all of it as one HTML page), screenshots, reproduced,
            compare (two files of rows), bench_check (against the baseline), verdict
soak        one long run, killed again and again, beside the same one that is not
shared      measure (interleaved timing), rows, machine, cards, structures
on a GPU    gpu.sh, all of it in nine minutes; pages/verdict holds what it found against the goals
results/    rows: one JSON object each, committed by the machine that made them
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
