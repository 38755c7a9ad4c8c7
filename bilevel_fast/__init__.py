"""Prune a latent diffusion model, then distil it and suppress concepts in one bilevel loop."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilevel_fast.models.pipeline import load_pipeline as load_pipeline

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`bilevel_fast.load_pipeline`, imported when it is asked for: importing the package loads nothing."""
    if name == "load_pipeline":
        from bilevel_fast.models.pipeline import load_pipeline

        return load_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
