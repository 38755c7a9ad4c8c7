"""`python -m bilevel_fast.prune import-aptp`: students of the files that APTP's authors publish."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from bilevel_fast.models.folder import load_folder, load_unet
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.vector import from_vector, layout
from mini_folder import TINY


@pytest.fixture
def published(teacher, tmp_path):
    """The authors' three files: a vector, a codebook with it as row 1, and weights of its shape."""
    size = layout(TINY).size
    vector = torch.ones(1, size)
    vector[0, [1, 2, 20, 60]] = 0
    vector[0, -1] = 0
    soft = torch.stack([torch.full((size,), 0.9), 0.3 + 0.4 * vector[0]])
    torch.save(vector, tmp_path / "arch_vector.pt")
    torch.save(soft, tmp_path / "quantizer_embeddings.pt")
    structure = from_vector(TINY, vector[0])
    student = load_unet(teacher).cut(structure)
    weights = {name: x.contiguous() * 1.5 for name, x in student.state_dict().items()}
    (tmp_path / "expert" / "unet").mkdir(parents=True)
    save_file(weights, tmp_path / "expert" / "unet" / "diffusion_pytorch_model.safetensors")
    return tmp_path, structure, student.state_dict(), weights


def imported(out, structure, weights):
    unet = load_folder(out).unet()
    assert unet.structure == structure
    assert all(torch.equal(x, weights[name]) for name, x in unet.state_dict().items())


def test_import(published, teacher, run):
    """A vector or a row of a codebook says what is kept; the weights are the teacher's, or those that came with it."""
    place, structure, cut, weights = published
    vector, codebook, expert = place / "arch_vector.pt", place / "quantizer_embeddings.pt", place / "expert"
    ratio = count(structure, 8, 12).ratio
    ways = {
        "vector": (("--vector", vector), cut, f"{ratio:.4f}, arch_vector.pt"),
        "both": (("--vector", vector, "--weights", expert), weights, str(expert / "unet")),
        "row": (("--codebook", codebook, "--expert", 1), cut, "expert 1 of quantizer_embeddings.pt"),
        "whole": (("--codebook", codebook, "--expert", 1, "--weights", expert), weights, str(expert / "unet")),
    }
    for name, (flags, wanted, told) in ways.items():
        code, stdout, stderr = run("import-aptp", "--teacher", teacher, "--out", place / name, *flags)
        assert (code, stderr) == (0, "")
        assert told in stdout
        imported(place / name, structure, wanted)
    (expert / "arch_vector.pt").write_bytes(vector.read_bytes())
    assert run("import-aptp", "--teacher", teacher, "--out", place / "alone", "--weights", expert)[0] == 0
    imported(place / "alone", structure, weights)


def test_codebook_is_listed(published, teacher, run):
    place, structure, *_ = published
    code, stdout, _ = run("import-aptp", "--teacher", teacher, "--codebook", place / "quantizer_embeddings.pt")
    assert code == 0
    dense = count(Structure.dense(TINY), 8, 12)
    macs = count(structure, 8, 12)
    assert [line.split(maxsplit=3) for line in stdout.splitlines()[1:]] == [
        ["0", "1.0000", f"{dense.params:,}", "none"],
        ["1", f"{macs.ratio:.4f}", f"{macs.params:,}", ", ".join(sorted(structure.dropped))],
    ]
    assert structure.dropped


class Evil:
    def __reduce__(self):
        return print, ("code of a pickle ran",)


def test_import_refuses(published, teacher, run, tmp_path):
    place, *_ = published
    vector, codebook, evil = place / "arch_vector.pt", place / "quantizer_embeddings.pt", place / "evil.pt"
    torch.save(Evil(), evil)
    assert b"code of a pickle ran" in evil.read_bytes()
    (place / "plain.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(torch.ones(8, 1620), place / "sd.pt")
    other = torch.load(vector, weights_only=True)
    other[0, 1] = 1
    torch.save(other, place / "other.pt")
    out = ("--out", place / "out")
    for message, flags in {
        "evil.pt is refused: it holds code (builtins.print), wanted one tensor": ("--vector", evil, *out),
        "plain.pt cannot be read as one tensor": ("--codebook", place / "plain.pt"),
        "sd.pt has vectors of 1620 entries (those of SD 2.1), this UNet wants": ("--codebook", place / "sd.pt"),
        "--expert is 2, ": ("--codebook", codebook, "--expert", 2, *out),
        "conv1.bias has shape [12], other.pt wants [14]": (
            ("--vector", place / "other.pt", "--weights", place / "expert", *out)
        ),
        "arch_vector.pt is missing, and so is ": ("--weights", place / "expert", *out),
        "unet/diffusion_pytorch_model.safetensors is missing": ("--vector", vector, "--weights", place, *out),
        "--vector and --codebook both say what the expert keeps": ("--vector", vector, "--codebook", codebook, *out),
        "nothing to import; --vector, --codebook or --weights name it": out,
        "--expert is a number in a codebook, and --codebook is missing": ("--vector", vector, "--expert", 1, *out),
        "a codebook has several experts; --expert says which one": ("--codebook", codebook, *out),
        "--out is missing: the folder for the student": ("--vector", vector),
        "expert exists already; delete it": ("--vector", vector, "--out", place / "expert"),
    }.items():
        code, stdout, stderr = run("import-aptp", "--teacher", teacher, *flags)
        assert (code, stderr.count("\n")) == (2, 1), stderr
        assert message in stderr, stderr
        assert "ran" not in stdout
    assert not (place / "out").exists()
