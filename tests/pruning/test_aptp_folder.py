"""Mixture folders: what is read is what was written, and nothing of another base model or half a folder is."""

import dataclasses
import json
import shutil
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import aside_of
from bilevel_fast.models.folder import load_folder, load_unet
from bilevel_fast.models.structure import Structure
from bilevel_fast.pruning.aptp.encoders import MpnetPrompts, TextPrompts, centred
from bilevel_fast.pruning.aptp.mixture_folder import Mixture, write_mixture
from bilevel_fast.pruning.aptp.router import Router
from bilevel_fast.pruning.budget import MacBudget
from bilevel_fast.worlds.mini.world import SCENES
from mini_folder import TINY, make_mini_folder

CAPTIONS = [scene.caption for scene in SCENES]
STRUCTURES = tuple(Structure.uniform(TINY, keep) for keep in (0.9, 0.6, 0.3))
BUDGET = MacBudget(0.7, 8, 12)
SETTINGS = {"steps": 3, "weights": {"contrastive": 100.0}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_folder(make_mini_folder(tmp_path_factory.mktemp("models") / "teacher"))


def make_router(width, seed=1):
    router = Router(TINY, width, 3, seed=seed).requires_grad_(False)
    router.predictor.linear.bias += torch.linspace(-3, 3, len(router.predictor.linear.bias))
    return router


def write(path, teacher, encoder=None, embeddings=None):
    """A mixture of three experts; returns its router and encoder."""
    if encoder is None:
        encoder, embeddings = centred(TextPrompts(teacher.text_encoder), CAPTIONS)
    router = make_router(encoder.width)
    router.rebalance(embeddings)
    write_mixture(path, teacher, teacher.unet(), router, encoder, STRUCTURES, BUDGET, SETTINGS)
    return router, encoder


@pytest.fixture(scope="module")
def written(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtures") / "mixture"
    return path, *write(path, teacher)


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "copy")


def test_what_is_read_was_written(written, teacher):
    path, router, encoder = written
    mixture = Mixture.load(path)
    assert mixture.config == TINY
    assert mixture.structures == STRUCTURES
    assert mixture.budget == BUDGET
    assert mixture.settings == SETTINGS
    for name, tensor in router.state_dict().items():
        mine = mixture.router.state_dict()[name]
        assert (mine.dtype, torch.equal(mine, tensor)) == (tensor.dtype, True)
    assert not any(p.requires_grad for p in mixture.router.parameters())
    assert torch.equal(mixture.encoder.centre, encoder.centre)
    assert encoder.centre.abs().max() > 0.01
    assert mixture.parts.text_encoder.encode(["a red star"]).equal(teacher.text_encoder.encode(["a red star"]))
    dense = teacher.unet().state_dict()
    for k, structure in enumerate(STRUCTURES):
        expert = load_unet(mixture.expert_folder(k))
        assert expert.structure == structure
        wanted = structure.slice(dense)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in expert.state_dict().items())
    with pytest.raises(UserError, match="has experts 0 to 2, not 3"):
        mixture.expert_folder(3)


def test_routes_are_those_of_the_router(written):
    """All experts are used, the balance and the centre count, and no caption depends on its neighbours."""
    path, router, encoder = written
    mixture = Mixture.load(path)
    routes = mixture.route(CAPTIONS)
    assert routes.dtype == torch.int64
    assert torch.equal(routes, router.route(torch.cat([encoder.encode([c]) for c in CAPTIONS])))
    assert routes.bincount(minlength=3).min() > 20
    assert torch.equal(mixture.route(CAPTIONS[::-5]), routes.flip(0)[::5])
    assert mixture.route([]).tolist() == []
    router.balance.zero_()
    assert not torch.equal(router.route(torch.cat([encoder.encode([c]) for c in CAPTIONS])), routes)


def test_written_again_after_a_kill(written, teacher, tmp_path, monkeypatch):
    """Half a mixture: an expert is there, another broken, the index missing. No file of the run is touched."""
    path = tmp_path / "run"
    shutil.copytree(written[0], path)
    (path / "mixture.json").unlink()
    (path / "router.safetensors").write_bytes(b"half")
    done = subprocess.Popen(["true"])
    done.wait()
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: done.pid)
        aside_of(path / "experts" / "1").mkdir()
    shutil.rmtree(path / "experts" / "2")
    (path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a mixture: mixture.json is missing; its run is not finished"):
        Mixture.load(path)
    write(path, teacher)
    for file in ("mixture.json", "router.safetensors", "experts/2/unet/diffusion_pytorch_model.safetensors"):
        assert (path / file).read_bytes() == (written[0] / file).read_bytes()
    assert sorted(p.name for p in (path / "experts").iterdir()) == ["0", "1", "2"]
    assert (path / "config.json").read_text() == "{}"


def test_teacher_is_known_again(written, teacher, tmp_path):
    mixture = Mixture.load(written[0])
    mixture.check_teacher(teacher)
    other = load_folder(make_mini_folder(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match=r"other is another base model than that of .*mixture: its UNet is \w{16}, not"):
        mixture.check_teacher(other)
    wider = dataclasses.replace(other, config=dataclasses.replace(TINY, sample_size=16))
    with pytest.raises(UserError, match="the UNets' configs differ"):
        mixture.check_teacher(wider)
    with pytest.raises(UserError, match="is pruned; wanted the dense model"):
        mixture.check_teacher(load_folder(mixture.expert_folder(1)))


# --- refused ---


def refused(path):
    with pytest.raises(UserError) as error:
        Mixture.load(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def edit(path, **changes):
    file = path / "mixture.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def test_missing_files(copy, tmp_path):
    assert refused(tmp_path / "none").endswith("none does not exist")
    shutil.move(copy / "experts" / "1", tmp_path / "1")
    assert refused(copy).startswith("expert 1 is missing: ")
    shutil.move(tmp_path / "1", copy / "experts" / "1")
    structure = copy / "experts" / "1" / "unet" / "structure.json"
    text = structure.read_text()
    structure.write_text(text[:-20])
    assert "structure.json is not JSON" in refused(copy)
    structure.write_text(text)
    assert Mixture.load(copy).structures == STRUCTURES
    (copy / "router.safetensors").unlink()
    assert refused(copy).endswith("router.safetensors is missing")
    (copy / "mixture.json").unlink()
    assert refused(copy).endswith("copy is not a mixture: mixture.json is missing")


def test_damaged_router(copy):
    file = copy / "router.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-8])
    assert "router.safetensors is cut short" in refused(copy)
    file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    assert refused(copy).endswith("was changed after it was written: its SHA-256 is not the one in mixture.json")


def test_router_of_another_base_model(copy, teacher, tmp_path):
    """Of the same shape, but of another teacher; of another shape."""
    other = load_folder(make_mini_folder(tmp_path / "teacher", seed=1))
    write(tmp_path / "other", other)
    shutil.copy(tmp_path / "other" / "router.safetensors", copy)
    assert "router.safetensors is a router for another base model: its UNet is " in refused(copy)

    file = copy / "router.safetensors"
    with safe_open(file, "pt") as handle:
        metadata = {"unet": json.loads((copy / "mixture.json").read_text())["teacher"]["unet"]}
        assert metadata["unet"] != handle.metadata()["unet"]
    tensors = load_file(file)
    save_file(tensors | {"codes": torch.zeros(3, 1620)}, file, metadata)
    entries = tensors["codes"].shape[1]
    assert refused(copy).endswith(f"codes has shape [3, 1620], this UNet wants [3, {entries}]")
    del tensors["balance"]
    save_file(tensors, file, metadata)
    assert refused(copy).endswith("1 weight (balance) missing")


def test_expert_of_another_base_model(copy, tmp_path):
    config = dataclasses.replace(TINY, sample_size=16)
    Structure.dense(config).save(copy / "experts" / "2" / "unet" / "structure.json")
    assert "expert 2 in " in (message := refused(copy))
    assert message.endswith("was cut from another base model than the router's")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": "bilevel_fast.structure"}, "wanted format 'bilevel_fast.mixture'"),
        ({"version": 2}, "has version 2, this release reads 1"),
        ({"experts": 4}, "codes has shape [3, "),
        ({"experts": 0}, "experts is 0, wanted a number of at least 1"),
        ({"experts": None}, "field 'experts' is missing"),
        ({"budget": {"ratio": 2.0, "latent": 8, "text": 12}}, "2.0"),
        ({"budget": [1]}, "a field is not what a mixture holds"),
        ({"teacher": "sd"}, "a field is not what a mixture holds"),
        ({"prompt_encoder": ["text"]}, "prompt encoder ['text'] is unknown"),
        ({"config": {"sample_size": 8}}, "config"),
    ],
)
def test_index_that_is_none(copy, changes, told):
    edit(copy, **changes)
    assert told in refused(copy)


def test_writing_refuses(teacher, tmp_path):
    encoder = TextPrompts(teacher.text_encoder)
    router, unet, out = make_router(64), teacher.unet(), tmp_path / "out"
    with pytest.raises(UserError, match="2 structures came for 3 codes"):
        write_mixture(out, teacher, unet, router, encoder, STRUCTURES[:2], BUDGET, {})
    pruned = dataclasses.replace(teacher, structure=STRUCTURES[0])
    with pytest.raises(UserError, match="is pruned; wanted the dense model"):
        write_mixture(out, pruned, unet, router, encoder, STRUCTURES, BUDGET, {})
    assert not out.exists()


def test_mixture_with_a_sentence_encoder(teacher, tmp_path):
    """The encoder stays outside; where it is now can be said, and it has to be the same one."""
    pytest.importorskip("transformers")
    from mpnet_folder import make_mpnet_folder

    encoder, embeddings = centred(MpnetPrompts.load(make_mpnet_folder(tmp_path / "mpnet")), CAPTIONS)
    path, moved = tmp_path / "mixture", tmp_path / "moved"
    router, _ = write(path, teacher, encoder, embeddings)
    wanted = router.route(embeddings)
    assert torch.equal(Mixture.load(path).route(CAPTIONS), wanted)
    (tmp_path / "mpnet").rename(moved)
    assert "mpnet any more; --prompt-encoder says where it is now" in refused(path)
    assert torch.equal(Mixture.load(path, prompt_encoder=moved).route(CAPTIONS), wanted)
    with pytest.raises(UserError, match="other is another prompt encoder"):
        Mixture.load(path, prompt_encoder=make_mpnet_folder(tmp_path / "other", seed=1))
    tensors = load_file(path / "router.safetensors")
    assert tensors["centre"].eq(0).all()
