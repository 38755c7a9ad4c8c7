"""Streamed safetensors files: the bytes of the library's own, and never more than a piece beside the tensors."""

import io
import weakref

import pytest
import torch
from safetensors.torch import load_file, save

from bilevel_fast.base import tensors as module
from bilevel_fast.base.tensors import read_tensors, write_tensors

MIXED = {
    "weight": torch.randn(5, 7, 3, 3).to(memory_format=torch.channels_last),
    "crop": torch.randn(6, 10)[:, 1:8],
    "b": torch.arange(3, dtype=torch.bfloat16),
    "a": torch.arange(5, dtype=torch.float16),
    "step": torch.tensor(7.0),
    "mask": torch.tensor([True, False, True]),
    "é": torch.tensor([1, -2]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "none": torch.empty(0, 4),
    "double": torch.tensor([[0.1]], dtype=torch.float64),
}


def written(tensors, **settings) -> bytes:
    file = io.BytesIO()
    write_tensors(file, tensors, **settings)
    return file.getvalue()


@pytest.mark.parametrize("piece", [module.PIECE, 40, 4])
def test_the_bytes_are_the_librarys(monkeypatch, piece):
    """Whatever the size of a piece: rows, parts of rows, or single numbers."""
    monkeypatch.setattr(module, "PIECE", max(piece, 8))
    plain = {name: tensor.contiguous() for name, tensor in MIXED.items()}
    assert written(MIXED) == save(plain)
    assert written(MIXED, metadata={"format": "pt"}) == save(plain, {"format": "pt"})
    floats = {name: tensor for name, tensor in MIXED.items() if tensor.is_floating_point()}
    halves = {name: tensor.half().contiguous() for name, tensor in floats.items()}
    assert written(floats, dtype=torch.float16) == save(halves)


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "some.safetensors"
    path.write_bytes(written(MIXED))
    for found in (read_tensors(path), load_file(path)):
        assert found.keys() == MIXED.keys()
        for name, tensor in MIXED.items():
            assert found[name].dtype == tensor.dtype, name
            assert found[name].is_contiguous(), name
            assert torch.equal(found[name], tensor), name


def test_no_more_than_a_piece_is_copied(monkeypatch):
    """What is handed to the file is a piece at most, and the one before it is gone by then."""
    monkeypatch.setattr(module, "PIECE", 4096)
    big = torch.randn(64, 32, 3, 3).to(memory_format=torch.channels_last)
    alive = []

    class File:
        def write(self, data):
            if not isinstance(data, bytes):
                alive.append((weakref.ref(data), data.nbytes))
                assert data.nbytes <= 4096
                assert sum(ref() is not None for ref, _ in alive) == 1

    write_tensors(File(), {"big": big, "half": big.half()}, dtype=torch.float32)
    assert sum(size for _, size in alive) == 2 * big.nbytes


def test_contiguous_tensors_are_not_copied():
    x, seen = torch.randn(100, 10), []

    class File:
        def write(self, data):
            seen.extend([] if isinstance(data, bytes) else [data.__array_interface__["data"][0]])

    write_tensors(File(), {"x": x})
    assert seen == [x.data_ptr()]


def test_a_dtype_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"^z is torch\.complex64, wanted one of"):
        written({"z": torch.zeros(2, dtype=torch.complex64)})
