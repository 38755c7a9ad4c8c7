import gc
import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the first import of triton
    from interpreting import quicken

    quicken()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of kernels are tests of the GPU where there is one, and of Triton's interpreter elsewhere."""
    for item in items:
        if DEVICE == "cuda" and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)
        elif DEVICE == "cpu" and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What imports have made stays to the end: a search for garbage that walks over it again takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory):
    """Of the mini world, random and with two levels, for runs that nobody judges. To be read and not written to."""
    from mini_folder import TRAINED, make_mini_folder

    return make_mini_folder(tmp_path_factory.mktemp("small") / "teacher", config=TRAINED)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """A small Stable Diffusion XL, to be read and not written to."""
    from sdxl_folder import make_sdxl_folder

    return make_sdxl_folder(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="session")
def sdxl_chain(sdxl, tmp_path_factory):
    """What every command has made of it, from pictures to an erased student; to be read and not written to."""
    from sdxl_chain import make_sdxl_chain

    return make_sdxl_chain(tmp_path_factory.mktemp("chain"), sdxl)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the `main` of a command in this process: its exit code, and what it wrote to stdout and stderr.

    `commands.run_command` is for fixtures of a module, and where log lines matter.
    """
    from bilevel_fast.base import errors  # tests of kernels run where there is no engine

    def run(main, *arguments):
        monkeypatch.setattr("sys.argv", [main.__module__, *map(str, arguments)])
        return errors.run(main), *capsys.readouterr()

    return run
