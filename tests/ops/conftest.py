import os
import shutil

import pytest
import torch

from bilevel_fast.ops.native import _C, cuda
from cuda_on_cpu import OnCpu


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Memory that torch hands out uninitialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request):
    """Each of those that this CPU has; the best again afterwards."""
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(_C.instruction_sets()[0])


@pytest.fixture(scope="session")
def built_for_cpu(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no GPU, and no C++ compiler to run the kernels on the CPU with")
    return OnCpu(tmp_path_factory.mktemp("cuda_on_cpu"), compiler)


@pytest.fixture
def csrc_kernels(request, monkeypatch, device):
    """`native.cuda` on a GPU, or as compiled for the CPU."""
    if device == "cpu":
        monkeypatch.setattr(cuda, "_cuda", request.getfixturevalue("built_for_cpu"))
        monkeypatch.setattr(cuda, "_queue", lambda device: (0, 0))
        monkeypatch.setattr(cuda, "_device", lambda name, tensor: tensor.device)


@pytest.fixture
def at_threads():
    """Calls with a number of threads, which is as before afterwards."""
    before = torch.get_num_threads()

    def call(threads, function):
        torch.set_num_threads(threads)
        try:
            return function()
        finally:
            torch.set_num_threads(before)

    return call
