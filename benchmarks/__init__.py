"""Commands that measure, count or project, and what they share. `python -m benchmarks.NAME --help` says more.

measured    train (a whole run), step (both steps against their rivals), unet (latency, dense against pruned), kernels,
            alignment (padded widths), precision (bf16 against fp32), frontier (quality against suppression)
counted     macs, launches, compile_matrix
projected   roofline (time), roofline_sites (time of each site at every width), memory (largest batch)
judged      compare (two files of rows), bench_check (against the committed baseline)
shown       report (one HTML page), readme (the README's tables), kernels_report, frontier_report
on a GPU    gpu.sh, gpu_kernels.sh, once (for sanitizers), aot (what a compiler makes of a kernel)
shared      measure (interleaved timing), machine, cards, structures, peers and diffusers_unet (how others do it), ours,
            cases/ (one file per kernel)
results/    rows: one JSON object each, committed by the machine that made them
"""
