"""Each op of `bilevel_kernels` alone: against its rivals on a GPU, and as compiled where there is none."""
