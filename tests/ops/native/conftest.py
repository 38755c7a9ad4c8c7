import pytest
import torch

from bilevel_fast.ops.native import _C


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request):
    """Each of those that this CPU has."""
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(_C.instruction_sets()[0])


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
