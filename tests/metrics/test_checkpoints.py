"""Weight files: what is read, and what is refused without being run."""

import pickle
import zipfile

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


class Overwrites(nn.Module):
    """Loaded as TorchScript, it writes ones over the file whose name it holds."""

    def __init__(self, path: str):
        super().__init__()
        self.weight, self.path = nn.Parameter(torch.ones(2)), path

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight, self.path, self.training = state
        torch.from_file(self.path, shared=True, size=4).copy_(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.mark.situation
def test_a_script_that_writes_when_it_is_loaded(tmp_path):
    """Weights are a TorchScript archive whose code writes to a file of yours: refused, and the file is as it was."""
    mine = tmp_path / "mine"
    mine.write_bytes(bytes(16))
    torch.jit.script(Overwrites(str(mine))).save(str(tmp_path / "w.pt"))
    mine.write_bytes(bytes(16))  # compiling a script may call it
    with pytest.raises(UserError, match="more than tensors and plain values"):
        read_checkpoint(tmp_path / "w.pt")
    assert mine.read_bytes() == bytes(16)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(3, 4).half(), nn.ModuleList([nn.BatchNorm1d(4), nn.Linear(4, 2)])
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
        self.tied = self.first.weight

    def forward(self, x):
        return self.twice[1](self.twice[0](x @ self.first.weight.float().T)) + self.count + self.turned.sum()


@pytest.mark.situation
def test_an_archive_of_torchscript_is_read_and_not_loaded(tmp_path):
    """Weights are a TorchScript archive, as OpenAI publishes CLIP: the same tensors as loading it would give."""
    torch.jit.trace(Nested().eval(), torch.ones(2, 3)).save(str(tmp_path / "w.pt"))
    wanted = torch.jit.load(str(tmp_path / "w.pt")).state_dict()
    found = read_checkpoint(tmp_path / "w.pt")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.situation
@pytest.mark.parametrize("claim", ["more numbers", "a longer row"])
def test_a_script_whose_tensors_reach_beyond_their_bytes(tmp_path, claim):
    """Weights are a TorchScript archive that claims more than it holds: refused before any of it is read."""
    torch.jit.trace(nn.Linear(3, 2).eval(), torch.ones(1, 3)).save(str(tmp_path / "w.pt"))
    six, more = (
        (b"K\x06", b"J" + (2**28).to_bytes(4, "little")) if claim == "more numbers" else (b"K\x03K\x01", b"K\x09K\x01")
    )
    rewritten(
        tmp_path / "w.pt", lambda m: {n: d.replace(six, more) if n.endswith("/data.pkl") else d for n, d in m.items()}
    )
    with pytest.raises(UserError, match=r"is said to have 1073741824|reaches beyond its storage"):
        read_checkpoint(tmp_path / "w.pt")


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in change(members).items():
            archive.writestr(name, data)


@pytest.mark.situation
def test_a_tensor_that_is_said_to_be_larger_than_its_bytes(tmp_path):
    """Weights claim more numbers than their file holds: refused, and no room is made for them."""
    torch.save({"weight": torch.arange(6.0)}, tmp_path / "w.pth")
    count, more = b"K\x06", b"J" + (2**28).to_bytes(4, "little")

    def lie(members):
        return {n: d.replace(count, more, 1) if n.endswith("data.pkl") else d for n, d in members.items()}

    rewritten(tmp_path / "w.pth", lie)
    with pytest.raises(UserError, match="cut short or of another kind"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.situation
def test_a_bomb(tmp_path):
    """Weights are a zip that unpacks to far more than it is: refused before a byte of it is unpacked."""
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pth")
    rewritten(tmp_path / "w.pth", lambda m: {n: d + bytes(10**6) for n, d in m.items()}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed, which torch never does"):
        read_checkpoint(tmp_path / "w.pth")
