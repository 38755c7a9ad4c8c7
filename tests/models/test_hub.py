"""Ids on the hub, against a server on this machine that speaks its HTTP: what is fetched, and what is said."""

import json
import shutil

import pytest
from safetensors.torch import save_file

from bilevel_fast import convert, erase
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder, load_unet
from bilevel_fast.models.hub import local, wanted
from bilevel_fast.models.pipeline import load_pipeline
from hub_server import COMMIT, Hub, environment
from single_file import original

SD, UNET = "some-lab/sd-2.1", "unet/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def published(sd, tmp_path_factory):
    """As published: beside the weights lie pickles, code, a second precision, a checkpoint in one file."""
    root = shutil.copytree(sd, tmp_path_factory.mktemp("hub") / "model")
    for name in ("unet/diffusion_pytorch_model.bin", "model.ckpt", "unet/run.py", "README.md", "whole.safetensors"):
        (root / name).write_bytes(b"not to be fetched")
    shutil.copy(root / f"{UNET}.safetensors", root / f"{UNET}.fp16.safetensors")
    (root / "safety_checker").mkdir()
    (root / "safety_checker" / "model.safetensors").write_bytes(b"not to be fetched")
    index = json.loads((root / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="module")
def server(published):
    found = Hub()
    found.repositories |= {SD: published, "some-lab/gated": "GatedRepo"}
    yield found
    found.close()


@pytest.fixture
def online(server, tmp_path):
    server.asked.clear()
    with environment(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home")):
        yield server


def test_what_is_read_is_fetched_and_nothing_else(online, sd, tmp_path):
    path = local(SD)
    assert path.is_relative_to(tmp_path / "home" / "hub")
    assert path.name == COMMIT
    files = {file.relative_to(sd).as_posix() for file in sd.rglob("*") if file.is_file()}
    assert set(online.files()) == files
    assert {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} == files
    before = len(online.asked)
    folder = load_folder(f"{SD}")
    assert folder.path == path
    assert len(online.asked) == before, "one process asks once"
    ours, theirs = load_unet(SD).state_dict(), load_unet(sd).state_dict()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_revision_is_asked_for(online, tmp_path):
    assert local(f"{SD}@v1") == local(f"{SD}@{COMMIT}")
    assert any("/v1" in path for path in online.asked)


def test_a_folder_that_exists_comes_first(online, sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sd, tmp_path / SD)
    assert local(SD) == local(f"./{SD}") == type(sd)(SD)
    assert load_folder(SD).path == type(sd)(SD)
    assert not online.asked


@pytest.mark.situation
@pytest.mark.parametrize(
    "name", ["models/sd21/", "./models/sd21", "/models/sd21", "~/sd21", "sd21", "models/sd.safetensors", "there/sd21"]
)
def test_a_mistyped_path_asks_nobody(online, name, tmp_path, monkeypatch):
    """`--teacher runs/prunde`, of a folder `runs` that is there: it is refused, and no server is asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"does not exist; wanted a folder on this machine"):
        load_folder(name)
    assert not online.asked


@pytest.mark.situation
@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "some-lab/none",
            r"some-lab/none is neither a folder on this machine nor a model on the hub, or it is private",
        ),
        ("some-lab/gated", r"some-lab/gated is gated: accept its terms on its page, then call `hf auth login`"),
        (f"{SD}@v2", r"some-lab/sd-2.1@v2: there is no such revision of the model on the hub"),
        (
            "some-lab/pickles",
            r"has no weights of its unet in safetensors, only unet/diffusion_pytorch_model.bin: a pick",
        ),
        ("some-lab/lora", r"is no model in the diffusers layout: it has no model_index.json, but pytorch_lora_weights"),
        ("some-lab/inpaint", r"^some-lab/inpaint is an inpainting model"),
    ],
)
def test_what_the_hub_refuses_or_we_do(online, published, tmp_path, name, line):
    """An id of a model that is gated, not there, only pickles or of another kind: one line, and no weights come."""
    pickles = shutil.copytree(published, tmp_path / "pickles")
    for file in pickles.glob("unet/*.safetensors"):
        file.unlink()
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"")
    inpaint = shutil.copytree(published, tmp_path / "inpaint")
    config = json.loads((inpaint / "unet/config.json").read_text()) | {"in_channels": 9}
    (inpaint / "unet/config.json").write_text(json.dumps(config))
    online.repositories |= {"some-lab/pickles": pickles, "some-lab/lora": lora, "some-lab/inpaint": inpaint}
    with pytest.raises(UserError, match=line) as refused:
        load_folder(name)
    assert "\n" not in str(refused.value)
    assert not [file for file in online.files() if file.endswith((".safetensors", ".bin", ".ckpt", ".py"))]


@pytest.mark.situation
def test_no_network(server, tmp_path, caplog):
    """A machine without a network: the copy in the cache is read, and an id that was never fetched is refused."""
    home = str(tmp_path / "home")
    with environment(HF_ENDPOINT=server.url, HF_HOME=home):
        path = local(SD)
    server.asked.clear()
    with environment(HF_ENDPOINT=server.url, HF_HOME=home, HF_HUB_OFFLINE="1"):
        assert local(SD) == path
        with pytest.raises(
            UserError, match=r"^some-lab/other is no folder .* HF_HUB_OFFLINE is set; unset it, or call"
        ):
            local("some-lab/other")
    assert not server.asked
    with environment(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=home):
        assert local(SD) == path
        assert "is read from the cache: the hub does not answer" in caplog.text
        with pytest.raises(UserError, match=r"^some-lab/other is no folder .* the hub does not answer: .*; call again"):
            local("some-lab/other")


@pytest.mark.situation
def test_a_copy_in_the_cache_that_lacks_weights(server, tmp_path):
    """No network, and only the configs of a model were ever fetched: said so, with what to do."""
    home = str(tmp_path / "home")
    with environment(HF_ENDPOINT=server.url, HF_HOME=home):
        assert not list(local(SD, weights=False).rglob("*.safetensors"))
    with environment(HF_ENDPOINT=server.url, HF_HOME=home, HF_HUB_OFFLINE="1"):
        assert (local(SD, weights=False) / "tokenizer" / "vocab.json").is_file()
        with pytest.raises(UserError, match=r"in the cache without the weights of its unet, and HF_HUB_OFFLINE is set"):
            local(SD)


def test_convert_fetches_no_weights(online, sd, tmp_path, command):
    file = tmp_path / "model.safetensors"
    save_file(original(sd, open_clip=False), file)
    code, _, said = command(convert.main, "--file", file, "--config-from", SD, "--out", tmp_path / "out")
    assert code == 0, said
    assert not [name for name in online.files() if name.endswith(".safetensors")]
    assert load_folder(tmp_path / "out").config == load_folder(sd).config


def test_an_edited_model_of_the_hub_loads_in_diffusers(online, tmp_path, command):
    """Its safety checker was not fetched: the copy says that it has none, and does not look for it."""
    out = tmp_path / "erased"
    code, _, said = command(erase.main, "uce", "--model", SD, "--erase", "by monet", "--out", out)
    assert code == 0, said
    from diffusers import StableDiffusionPipeline

    assert StableDiffusionPipeline.from_pretrained(out, local_files_only=True).safety_checker is None
    assert load_pipeline(SD).unet.config.in_channels == 4


def test_shards_and_variants():
    """Of a component that is stored twice, one; shards of both ways to name them."""
    new = [f"unet/diffusion_pytorch_model{v}-0000{n}-of-00002.safetensors" for v in ("", ".fp16") for n in (1, 2)]
    old = ["vae/diffusion_pytorch_model-00001-of-00001.fp16.safetensors"]
    lists = [
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    ]
    lists += ["vae/diffusion_pytorch_model.safetensors.fp16.index.json"]
    found = list(wanted(["model_index.json", *new, *old, *lists], "a/b"))
    assert sorted(found) == sorted(["model_index.json", *new[:2], *old, *lists])
