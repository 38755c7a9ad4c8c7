import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """What is measured here is small. On a busy machine two threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(before)
