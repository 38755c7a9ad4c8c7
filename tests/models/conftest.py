from pathlib import Path

import pytest

from sd_folder import make_sd_folder


@pytest.fixture(scope="session")
def sd(tmp_path_factory) -> Path:
    """A small Stable Diffusion: to read, and to copy before it is changed."""
    return make_sd_folder(tmp_path_factory.mktemp("sd"))
