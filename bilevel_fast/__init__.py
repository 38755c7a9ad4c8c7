"""Prune a latent diffusion model, then distil it and suppress concepts in one bilevel loop."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilevel_fast.models.pipeline import load_pipeline as load_pipeline

    __version__: str


def __getattr__(name: str) -> Any:
    """`load_pipeline` and `__version__`, found when they are asked for: importing the package loads nothing.

    The version is that of the installation, which the build takes from the tags of git; `0+unknown` where nothing is
    installed and a checkout is on the path.
    """
    if name == "load_pipeline":
        from bilevel_fast.models.pipeline import load_pipeline

        return load_pipeline
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("bilevel-fast")
        except PackageNotFoundError:
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
