"""Small teachers and students of Stable Diffusion and of XL: whole layers cut, or widths as well."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bilevel_fast.models.architecture import sites
from bilevel_fast.models.folder import load_folder, save_student
from bilevel_fast.models.structure import Structure
from bilevel_fast.pruning import bk_sdm
from sd_folder import make_sd_folder
from sdxl_folder import make_sdxl_folder
from unets import random_structure, randomise


@pytest.fixture(scope="session")
def sd21(tmp_path_factory) -> Path:
    """The layout of 2.1: linear projections, v-prediction, a text encoder without its last layer."""
    return make_sd_folder(tmp_path_factory.mktemp("teachers") / "sd21", text_layers=3)


@pytest.fixture(scope="session")
def sd15(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teachers") / "sd15"
    return make_sd_folder(path, linear=False, prediction_type="epsilon", heads=(4, 4, 4, 4))


@pytest.fixture(scope="session")
def make_student(tmp_path_factory) -> Callable[[Path, Structure], Path]:
    """Write the student of a teacher, with weights away from their initial values."""

    def make(teacher: Path, structure: Structure, name: str = "student") -> Path:
        source, out = load_folder(teacher), tmp_path_factory.mktemp("students") / name
        unet = source.unet().cut(structure)
        randomise(unet, 0.05)
        save_student(out, source, unet)
        return out

    return make


@pytest.fixture(scope="session")
def bk_sdm_base(sd21, make_student) -> Path:
    return make_student(sd21, bk_sdm.structure(load_folder(sd21).config, "base"))


@pytest.fixture(scope="session")
def xl(tmp_path_factory) -> Path:
    return make_sdxl_folder(tmp_path_factory.mktemp("teachers") / "xl", depths=(1, 1, 2))


@pytest.fixture(scope="session")
def shallow_xl(xl, make_student) -> Path:
    """Without the mid block, a layer of every level, and a transformer block."""
    config = load_folder(xl).config
    ends = ("resnets.1", "attentions.1")
    gone = [site.name for site in sites(config) if site.block == "mid_block" or site.name.endswith(ends)]
    return make_student(xl, Structure.uniform(config, 1.0, [*gone, "up_blocks.0.attentions.0.transformer_blocks.0"]))


@pytest.fixture(scope="session")
def narrow(sd21, make_student) -> Path:
    """Any units of everything, and some layers gone."""
    return make_student(sd21, random_structure(load_folder(sd21).config, seed=1, drop=0.3))


@pytest.fixture(scope="session")
def narrow_xl(xl, make_student) -> Path:
    return make_student(xl, random_structure(load_folder(xl).config, seed=2, drop=0.3))
