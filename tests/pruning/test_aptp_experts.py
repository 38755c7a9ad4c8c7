"""Experts: codes to students, the published files, and every file that is refused, with its one line."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21
from bilevel_fast.models.folder import load_folder, read_unet, save_student
from bilevel_fast.models.macs import count
from bilevel_fast.models.vector import from_vector, layout, to_vector
from bilevel_fast.pruning.aptp.experts import experts, find_vector, planned, read_codebook, read_vector
from bilevel_fast.pruning.aptp.gates import gated
from bilevel_fast.pruning.aptp.router import Router
from bilevel_fast.pruning.budget import MacBudget
from mini_folder import TINY, make_mini_folder


def make_vector(config=TINY):
    """Every second unit, and the second depth site gone."""
    plan = layout(config)
    vector = torch.ones(plan.size)
    for s in plan.segments:
        vector[s.start + 1 : s.stop : 2] = 0
    vector[plan.widths + 1] = 0
    return vector


@pytest.fixture
def write(tmp_path):
    def write(value, name="arch_vector.pt"):
        torch.save(value, tmp_path / name)
        return tmp_path / name

    return write


def refused(path, config=TINY, read=read_vector):
    with pytest.raises(UserError) as error:
        read(path, config)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


# --- our own ---


def test_codes_to_structures():
    router = Router(TINY, 16, 3, seed=0)
    assert all(structure.is_dense for structure in experts(TINY, router.gates()))  # as codes start
    with torch.no_grad():
        router.codes.mul_(40).sub_(3)
    gates = router.gates()
    found = experts(TINY, gates)
    assert len(set(map(str, found))) == 3
    for row, structure in zip(gates, found, strict=True):
        hard = (row >= 0.5).float()
        for s in layout(TINY).segments:
            if s.site.name not in structure.dropped:
                assert hard[s.start : s.stop].sum() == structure.count(s.site, s.width) >= 1
        assert structure == from_vector(TINY, hard)


def test_expert_computes_what_its_gates_computed(tmp_path):
    """From the codebook to a student: the function that was trained behind hard gates is the one that is cut."""
    unet = load_folder(make_mini_folder(tmp_path / "teacher")).unet()
    vector = make_vector()
    (structure,) = experts(TINY, 0.3 + 0.4 * vector[None])
    x, t, text = torch.randn(2, 12, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            unet.cut(structure)(x, t, text).out, gated(unet, x, t, text, vector.expand(2, -1)).out, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("ratio", [0.9, 0.7])
def test_planned_experts_meet_the_budget_in_the_order_of_their_gates(ratio):
    """Whatever share the gates ask for; within a width vector the units with the larger gates stay."""
    gates = torch.sigmoid(torch.randn(3, layout(MINI).size, generator=torch.Generator().manual_seed(0)) + 3)
    gates[:, layout(MINI).widths :] = 0.99
    gates[1, layout(MINI).widths + 2] = 1e-4  # the second expert has no use for this site
    found = planned(MINI, gates, MacBudget(ratio, 16, 12))
    for row, structure in zip(gates, found, strict=True):
        assert ratio - 0.002 < count(structure, 16, 12).ratio <= ratio
        for s in layout(MINI).segments:
            if s.site.name not in structure.dropped:
                units, values = list(structure.kept[s.site.name][s.width.name]), row[s.start : s.stop]
                gone = [i for i in range(s.width.units) if i not in units]
                assert not gone or values[units].min() >= values[gone].max()
    assert [layout(MINI).depths[2].name in structure.dropped for structure in found] == [False, True, False]
    assert found[0] != found[2]


def test_planned_is_the_threshold_moved():
    """Units with gates on two levels: all of the upper one stay, and of the lower one what still fits."""
    plan, generator = layout(MINI), torch.Generator().manual_seed(1)
    high = torch.rand(plan.size, generator=generator) < 0.8
    for s in plan.segments:
        high[s.start] = True
    gates = torch.where(high, 0.9, 0.2)[None]
    gates[:, plan.widths :] = 1.0
    (cut,) = experts(MINI, gates)
    (same,) = planned(MINI, gates, MacBudget(count(cut, 16, 12).ratio, 16, 12))
    assert same == cut
    (more,) = planned(MINI, gates, MacBudget(count(cut, 16, 12).ratio + 0.02, 16, 12))
    kept = [set(more.kept[name][w]) >= set(units) for name, widths in cut.kept.items() for w, units in widths.items()]
    assert all(kept)
    with pytest.raises(UserError, match=r"budget 0\.1 is too small: keeping a unit of every width vector"):
        planned(MINI, gates, MacBudget(0.1, 16, 12))


def test_code_without_a_head_is_refused():
    vector = torch.ones(2, layout(TINY).size)
    s = next(s for s in layout(TINY).segments if s.width.name == "attn1")
    vector[1, s.start : s.stop] = 0.49
    with pytest.raises(
        UserError, match=rf"expert 1: .*site {s.site.name} keeps nothing of 'attn1', wanted at least one"
    ):
        experts(TINY, vector)


# --- the published files ---


@pytest.mark.parametrize("shape", [(1, -1), (-1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool])
def test_vector(write, shape, dtype):
    vector = make_vector(SD21)
    structure = read_vector(write(vector.reshape(shape).to(dtype)), SD21)
    assert torch.equal(to_vector(structure)[:64], vector[:64])
    assert structure.dropped == {"down_blocks.0.attentions.1"}
    assert structure == from_vector(SD21, vector)


def test_codebook_is_cut_at_a_half(write):
    """Soft rows, as they are published: a parameter that wants gradients."""
    rows = torch.stack([make_vector(MINI), torch.ones(layout(MINI).size)])
    soft = torch.nn.Parameter(torch.where(rows.bool(), 0.5, 0.4999))
    path = write(soft, "quantizer_embeddings.pt")
    assert read_codebook(path, MINI) == tuple(from_vector(MINI, row) for row in rows)


def make_expert(tmp_path, inside=False):
    """A published expert of a random teacher, with weights that are not the teacher's any more."""
    source = load_folder(make_mini_folder(tmp_path / "teacher"))
    student = source.unet().cut(from_vector(TINY, make_vector()), align=24)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.01)
    folder = tmp_path / "expert"
    (folder / "unet").mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save(make_vector()[None], (folder / "unet" if inside else folder) / "arch_vector.pt")
    return source, student, folder


def read_expert(folder, config):
    """As `python -m bilevel_fast.prune import-aptp --weights` does."""
    path = find_vector(folder)
    return read_unet(folder / "unet", config, read_vector(path, config), path.name)


@pytest.mark.parametrize("inside", [False, True])
def test_expert_to_student_folder(tmp_path, inside):
    source, student, folder = make_expert(tmp_path, inside)
    unet = read_expert(folder, TINY)
    save_student(tmp_path / "student", source, unet)
    again = load_folder(tmp_path / "student")
    assert again.structure == student.structure
    x, t, text = torch.randn(2, 12, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 64)
    with torch.no_grad():
        wanted = student(x, t, text).out
        torch.testing.assert_close(unet(x, t, text).out, wanted)
        torch.testing.assert_close(again.unet()(x, t, text).out, wanted)
    assert not unet.training


def test_expert_refuses_weights_of_another_structure(tmp_path):
    _, _, folder = make_expert(tmp_path)
    torch.save(torch.ones(1, layout(TINY).size), folder / "arch_vector.pt")
    with pytest.raises(UserError, match=r"unet: \d+ weights \(down_blocks.0.attentions.0.* missing"):
        read_expert(folder, TINY)
    vector = make_vector()
    vector[1] = 1
    torch.save(vector, folder / "arch_vector.pt")
    message = r"resnets.0.conv1.bias has shape \[8\], arch_vector.pt wants \[10\]"
    with pytest.raises(UserError, match=message):
        read_expert(folder, TINY)
    (folder / "arch_vector.pt").unlink()
    with pytest.raises(UserError, match=r"arch_vector.pt is missing, and so is .*unet/arch_vector.pt"):
        read_expert(folder, TINY)


# --- refused ---


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["torch", "pickle", "hidden in a list"])
def test_malicious_pickle(tmp_path, kind):
    """A real one: it does its work when it is unpickled, and does not here."""
    path, touched = tmp_path / "arch_vector.pt", tmp_path / "touched"
    value = [make_vector(), Evil(touched)] if "list" in kind else Evil(touched)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path)
    for read in (read_vector, read_codebook):
        message = refused(path, read=read)
        if kind == "pickle":
            assert message == " cannot be read as one tensor that torch.save wrote; nothing in it was run"
        else:
            assert message == " is refused: it holds code (posix.system), wanted one tensor"
        assert not touched.exists()
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert touched.exists()  # the bait was live


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"PK\x03\x04 cut", b"\x80\x02]q\x00."])
def test_unreadable(tmp_path, data):
    path = tmp_path / "arch_vector.pt"
    path.write_bytes(data)
    assert "wanted one" in refused(path) or "cannot be read" in refused(path)


def test_cut_short(write):
    path = write(make_vector())
    path.write_bytes(path.read_bytes()[:-200])
    assert "cannot be read" in refused(path)


def test_missing_or_folder(tmp_path):
    assert refused(tmp_path / "none.pt") == " is missing"
    assert refused(tmp_path) == " is a folder, wanted a file that torch.save wrote"


def test_another_base_model(write):
    size = layout(TINY).size
    wanted = f" has vectors of 1620 entries (those of SD 2.1), this UNet wants {size}: another base model"
    assert refused(write(torch.ones(8, 1620)), read=read_codebook) == wanted
    assert refused(write(torch.ones(1, 1619)), SD21) == (
        " has vectors of 1619 entries, this UNet wants 1620: another base model"
    )


def test_other_contents(write):
    size = layout(TINY).size
    assert refused(write({"arch": torch.ones(size)})) == " holds dict, wanted one dense tensor"
    assert refused(write(torch.ones(2, 3, size))) == (
        f" has a torch.float32 tensor of shape [2, 3, {size}], wanted rows of gates"
    )
    assert "wanted rows of gates" in refused(write(torch.ones(0, size)))
    assert "wanted rows of gates" in refused(write(torch.ones(size, dtype=torch.complex64)))
    assert refused(write(torch.ones(size).to_sparse())) == " holds Tensor, wanted one dense tensor"
    assert refused(write(torch.ones(2, size))) == " has 2 architecture vectors, wanted one; read it as a codebook"
    assert refused(write(torch.full((size,), float("nan")))) == f" has {size} entries that are not finite"
    for low, high in ((-3, 1), (0, 4)):
        wanted = f" has entries from {low} to {high}, wanted gates in 0..1: are they logits?"
        assert refused(write(torch.linspace(low, high, size))) == wanted


@pytest.mark.parametrize("read", [read_vector, read_codebook])
def test_attention_without_heads(write, read):
    vector = make_vector()
    s = next(s for s in layout(TINY).segments if s.width.name == "attn2" and s.site.block == "mid_block")
    vector[s.start : s.stop] = 0
    message = refused(write(vector), read=read)
    assert f"site {s.site.name} keeps nothing of 'attn2', wanted at least one unit" in message
