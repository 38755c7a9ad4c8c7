"""The paper's tables and figures (arXiv:2412.15341), on the mini world or on Stable Diffusion 2.1: the same code."""
