"""Prune a latent diffusion model, then distil it and suppress concepts in one bilevel loop."""

__version__ = "0.1.0"
