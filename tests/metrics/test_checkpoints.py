"""Weight files: what is read, and what is refused without being run."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bilevel_fast.base.errors import UserError
from bilevel_fast.metrics.checkpoints import fit, read_checkpoint, tensors_of

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_both_ages(tmp_path, zipped):
    torch.save(STATE, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_checkpoint(tmp_path / "w.pth")["weight"], STATE["weight"])


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "w.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "w.safetensors")["weight"], STATE["weight"])


class Trap:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_trap_is_not_sprung(tmp_path, zipped):
    torch.save({**STATE, "extra": Trap(tmp_path / "sprung")}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="holds more than tensors and plain values") as refusal:
        read_checkpoint(tmp_path / "w.pth")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing"])
def test_damaged_files_get_one_line(tmp_path, suffix, damage):
    path = tmp_path / f"w{suffix}"
    torch.save(STATE, path) if suffix == ".pth" else save_file(STATE, path)
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"<html>404</html>"}[damage])
    with pytest.raises(UserError, match=r"w\.") as refusal:
        read_checkpoint(path)
    assert "\n" not in str(refusal.value)


def test_a_list_is_no_state(tmp_path):
    torch.save([1, 2], tmp_path / "w.pth")
    with pytest.raises(UserError, match="found list"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_pickle_without_torch(tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"weight": 1}, protocol=2))
    with pytest.raises(UserError, match=r"w\.pth"):
        read_checkpoint(tmp_path / "w.pth")


def test_names_lose_the_prefix_of_data_parallel_training():
    held = {"state": {"module.a": torch.ones(1), "module.b.module.c": torch.ones(1), "n": 3}}
    assert set(tensors_of(held, "state")) == {"a", "b.module.c"}
    assert set(tensors_of({"a": torch.ones(1)}, "state")) == {"a"}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.ones(2, 3)}, "1 lack, first 'bias'"),
        ({**STATE, "more": torch.ones(1)}, "1 too many, first 'more'"),
        ({**STATE, "bias": torch.ones(3)}, r"'bias' is \(3,\) and not \(2,\)"),
    ],
)
def test_weights_of_another_architecture(tmp_path, state, message):
    module = nn.Linear(3, 2)
    before = module.weight.clone()
    with pytest.raises(UserError, match=message):
        fit(module, state, tmp_path / "w.pth", "a linear layer")
    assert torch.equal(module.weight, before)


def test_every_tensor_is_loaded_and_batch_counters_may_be_missing(tmp_path):
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = {n: torch.rand_like(t) for n, t in module.state_dict().items() if not n.endswith("num_batches_tracked")}
    fit(module, state, tmp_path / "w.pth", "two layers")
    for name, tensor in state.items():
        assert torch.equal(module.state_dict()[name], tensor)
