"""Many prompts to a folder: the images that `generate` draws, and the same bits by whom and in how many pieces ever."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

import drawing
from bilevel_fast.base.devices import Ranks
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.structure import Structure
from bilevel_fast.ops.graphs import WARMUP
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.pruning.aptp.encoders import TextPrompts, centred
from bilevel_fast.pruning.aptp.mixture_folder import Mixture, write_mixture
from bilevel_fast.pruning.aptp.router import Router
from bilevel_fast.pruning.aptp.sampling import load_mixture
from bilevel_fast.pruning.budget import MacBudget
from bilevel_fast.sampling import to_folder as sampling
from bilevel_fast.sampling.captured import Captured
from bilevel_fast.sampling.generate import generate
from bilevel_fast.sampling.image_folder import ImageFolder
from bilevel_fast.sampling.pictures import to_pixels
from bilevel_fast.sampling.prompts import Row
from bilevel_fast.sampling.samplers import guided
from bilevel_fast.sampling.samplers import sample as walk
from bilevel_fast.sampling.to_folder import Recipe, noise_index, sample_folder
from drawing import BATCH, CAPTIONS, RECIPE, ROWS
from forked import processes
from mini_folder import TINY, make_mini_folder
from replay import on_the_cpu
from sd_folder import make_sd_folder

LATENTS = replace(RECIPE, format="latents")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # three rows are not divided evenly among two: see `to_folder`
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_mini_folder(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A folder that was drawn in one piece."""
    return sample_folder(model, ROWS, tmp_path_factory.mktemp("whole") / "images", RECIPE, batch=BATCH)


def pixels(path) -> Tensor:
    image = Image.open(path)
    assert (image.format, image.mode) == ("PNG", "RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def test_images_are_what_the_model_draws(model, whole, tmp_path):
    folder = load_folder(model)
    found = sample_folder(model, ROWS, tmp_path / "latents", LATENTS, batch=BATCH)
    prompts = [row.prompt for row in ROWS]
    expected = generate(
        folder.unet(), folder.schedule, folder.text_encoder, prompts, [int(row.id) for row in ROWS], seed=7,
        size=(8, 8), guidance=3.0, steps=3,
    )  # fmt: skip
    assert expected.std() > 0.5
    for row, latents in zip(ROWS, expected, strict=True):
        torch.testing.assert_close(found.latents(row.id), latents, rtol=1e-4, atol=1e-4)
        picture = to_pixels(folder.vae.decode(found.latents(row.id)[None]))[0]
        assert torch.equal(pixels(whole.path_of(row.id)), picture)
    assert len(torch.unique(picture)) > 20


def test_a_folder_says_what_it_holds(model, whole):
    lines = [json.loads(line) for line in (whole.path / "index.jsonl").read_text().splitlines()]
    assert lines == [{"id": r.id, "prompt": r.prompt, "seed": 7, "file": f"{r.id}.png"} for r in ROWS]
    settings = json.loads((whole.path / "settings.json").read_text())
    assert settings["model"] == str(model)
    recipe = {"steps": 3, "guidance": 3.0, "method": "pndm", "seed": 7, "size": 8, "precision": "fp32", "format": "png"}
    assert settings["recipe"].items() > recipe.items()
    assert settings["runs"] == [{"batch": 2, "device": "cpu", "torch": torch.__version__}]
    assert list(whole.entries) == [row.id for row in ROWS]


def test_an_image_does_not_depend_on_the_others(model, whole, tmp_path):
    """Same batch size: the same bits. Another one: the last bits, a level of 255 at most."""
    backwards = sample_folder(model, ROWS[::-1], tmp_path / "backwards", RECIPE, batch=BATCH)
    alone = sample_folder(model, ROWS[2:3], tmp_path / "alone", RECIPE, batch=BATCH)
    for folder in (backwards, alone):
        for name in folder.entries:
            assert folder.path_of(name).read_bytes() == whole.path_of(name).read_bytes()
    other = sample_folder(model, ROWS, tmp_path / "other", RECIPE, batch=4)
    for row in ROWS:
        a, b = (pixels(folder.path_of(row.id)).int() for folder in (whole, other))
        assert (a - b).abs().max() <= 1


def test_noise_is_of_the_seed_and_the_id():
    rows = [Row("3", "a"), Row("3", "b", 7), Row("3", "b", 8), Row("4", "a"), Row("03", "a"), Row("x", "a")]
    found = sampling.noise(rows, 7, (2, 3))
    assert torch.equal(found[0], normal(7, Stream.INITIAL, [3], (2, 3))[0])
    assert torch.equal(found[0], found[1])
    assert len({tuple(x.flatten().tolist()) for x in found}) == 5
    assert noise_index("139") == 139
    assert noise_index(str(2**63)) != 2**63  # too large to be an index
    assert all(0 <= noise_index(name) < 2**63 for name in ("x", str(2**63), "-1", "٣"))


def test_a_seed_for_each_row(model, whole, tmp_path):
    rows = [replace(ROWS[0], seed=7), replace(ROWS[1], seed=8)]
    folder = sample_folder(model, rows, tmp_path / "images", RECIPE, batch=BATCH)
    assert folder.path_of("3").read_bytes() == whole.path_of("3").read_bytes()
    assert folder.path_of("0").read_bytes() != whole.path_of("0").read_bytes()
    assert [entry.seed for entry in folder.entries.values()] == [7, 8]


def test_two_processes_fill_one_folder(model, whole, tmp_path):
    """As torchrun starts them: the same folder to the bit, index and settings with it."""
    table = tmp_path / "prompts.csv"
    table.write_text("id,prompt\n" + "".join(f"{row.id},{row.prompt}\n" for row in ROWS))
    command = [sys.executable, "-m", "bilevel_fast.sample", "--prompts-file", table, "--folder", tmp_path / "images"]
    command += ["--model", model, "--steps", "3", "--seeds", "7", "--batch", "2", "--device", "cpu"]
    started = []
    for rank in ("0", "1"):
        variables = {**os.environ, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(list(map(str, command)), env=variables, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert any("5 of 5 images" in text for text in said)
    assert drawing.content(tmp_path / "images") == drawing.content(whole.path)


def test_ranks_share_all_rows():
    rows = list(range(7))
    shares = [Ranks(rank, 3).share(rows) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert Ranks.from_environment({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == Ranks(1, 4, 0)
    assert Ranks.from_environment({}) == Ranks()
    for variables, message in (
        ({"RANK": "4", "WORLD_SIZE": "4"}, "rank 4 of 4 does not exist"),
        ({"RANK": "0"}, "only one of RANK and WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK is 'x', wanted a number"),
    ):
        with pytest.raises(UserError, match=message):
            Ranks.from_environment(variables)


def test_kills_change_nothing(model, whole, tmp_path):
    """SIGKILL after each batch and within the next; torn lines and half files on top; then by two ranks to the end."""
    out = tmp_path / "images"
    for moment in (0.0, 0.01, 0.02):
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=drawing.draw, args=(model, ROWS, out, theirs, Ranks()))
        process.start()
        theirs.close()
        try:
            ours.recv()
        except EOFError:
            assert process.exitcode in (None, 0)  # nothing was left to do
        time.sleep(moment)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        with (out / "index.jsonl").open("ab") as file:
            file.write(b'{"id": "12", "prom')
        (out / ".12.png.tmp").write_bytes(b"half")
    (out / ".12.png.tmp").unlink()
    for rank in range(2):
        sample_folder(model, ROWS, out, RECIPE, batch=BATCH, ranks=Ranks(rank, 2))
    assert drawing.content(out) == drawing.content(whole.path)


def test_a_finished_folder_is_not_drawn_again(model, whole, tmp_path, monkeypatch):
    before = {file.name: file.stat().st_mtime_ns for file in whole.path.iterdir()}
    monkeypatch.setattr(sampling, "Captured", None)
    again = sample_folder(model, ROWS, whole.path, RECIPE, batch=BATCH)
    assert again.entries == whole.entries
    assert {file.name: file.stat().st_mtime_ns for file in whole.path.iterdir()} == before


def test_a_deleted_image_is_drawn_again(model, whole, tmp_path):
    folder = sample_folder(model, ROWS, tmp_path / "images", RECIPE, batch=BATCH)
    folder.path_of("4").unlink()
    with pytest.raises(UserError, match=r"4\.png is missing, and index\.jsonl names it"):
        ImageFolder.open(folder.path)
    sample_folder(model, ROWS, folder.path, RECIPE, batch=BATCH)
    assert drawing.content(folder.path) == drawing.content(whole.path)


def test_more_prompts_may_follow(model, whole, tmp_path):
    """And another batch size: the folder says that there were two."""
    sample_folder(model, ROWS[:2], tmp_path / "images", RECIPE, batch=BATCH)
    folder = sample_folder(model, ROWS, tmp_path / "images", RECIPE, batch=4)
    assert list(folder.entries) == [row.id for row in ROWS]
    assert [run["batch"] for run in folder.settings["runs"]] == [2, 4]
    assert folder.path_of("0").read_bytes() == whole.path_of("0").read_bytes()


class Recorder:
    """Records op by op, as `test_graphs`, and counts."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, call):
        replay, answer = on_the_cpu(call)
        self.recorded += 1

        def counted():
            self.replayed += 1
            replay()

        return counted, answer


@pytest.fixture
def torch_ops(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")  # native code reads its numbers on the CPU, as no graph can


@pytest.mark.parametrize("guidance", [1, 3])
def test_a_captured_unet_walks_as_the_unet_does(model, torch_ops, guidance):
    """PNDM keeps earlier answers: a replay must not write over them. Two shapes take turns."""
    folder = load_folder(model)
    unet, recorder = folder.unet().requires_grad_(False), Recorder()
    captured, null = Captured(unet, recorder), folder.text_encoder.encode([""])
    for batch in (2, 3, 2):
        text = folder.text_encoder.encode([row.prompt for row in ROWS[:batch]])
        x = sampling.noise(ROWS[:batch], batch, (12, 8, 8))
        ours, theirs = (walk(guided(m, text, null, guidance), x, folder.schedule, 8) for m in (captured, unet))
        assert torch.equal(ours, theirs)
    assert recorder.recorded == 2
    assert recorder.replayed == 3 * 9 - 2 * WARMUP


def test_a_gpu_records_the_unet(model, whole, torch_ops, tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(sampling, "cuda_recorder", lambda _: recorder)
    folder = sample_folder(model, ROWS, tmp_path / "images", RECIPE, batch=BATCH)
    assert (recorder.recorded, recorder.replayed) == (1, 3 * 4 - WARMUP)  # filled batches: of one shape
    for row in ROWS:
        a, b = (pixels(found.path_of(row.id)).int() for found in (whole, folder))
        assert (a - b).abs().max() <= 1  # torch's ops against native ones
    sample_folder(model, ROWS, tmp_path / "off", RECIPE, batch=BATCH, graphs=False)
    assert recorder.recorded == 1


@pytest.mark.parametrize(
    ("asked", "device", "capability", "wanted"),
    [
        ("auto", "cpu", None, "fp32"),
        ("auto", "cuda", (7, 5), "fp32"),
        ("auto", "cuda", (8, 0), "bf16"),
        ("fp32", "cuda", (9, 0), "fp32"),
        ("bf16", "cpu", None, "bf16"),
    ],
)
def test_the_recipe_says_what_it_is_drawn_in(model, monkeypatch, asked, device, capability, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert Recipe(precision=asked).of(load_folder(model), torch.device(device)).precision == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cuda_graph_draws_the_same(model, tmp_path, precision):
    recipe = replace(RECIPE, precision=precision, format="latents", steps=8)
    found = [
        sample_folder(model, ROWS, tmp_path / str(graphs), recipe, batch=BATCH, device="cuda", graphs=graphs)
        for graphs in (True, False)
    ]
    for row in ROWS:
        torch.testing.assert_close(*(folder.latents(row.id) for folder in found), rtol=1e-4, atol=1e-4)
    assert torch.cuda.get_device_name() == found[0].settings["runs"][0]["device"]


def test_a_recording_that_fails_is_done_without(model, torch_ops, caplog):
    def fails(call):
        raise RuntimeError("out of graphs\nmore")

    folder = load_folder(model)
    unet = folder.unet().requires_grad_(False)
    captured, inputs = (
        Captured(unet, fails),
        (torch.ones(1, 12, 8, 8), torch.ones(1), torch.ones(1, 12, TINY.cross_attention_dim)),
    )
    for _ in range(WARMUP + 2):
        assert torch.equal(captured(*inputs).out, unet(*inputs).out)
    assert caplog.messages == ["no CUDA graph of the UNet, it runs without: out of graphs"]


def test_a_mixture_draws_with_its_experts(model, tmp_path):
    teacher = load_folder(model)
    encoder, embeddings = centred(TextPrompts(teacher.text_encoder), CAPTIONS)
    router = Router(TINY, encoder.width, 2, seed=1).requires_grad_(False)
    router.predictor.linear.bias += torch.linspace(-3, 3, len(router.predictor.linear.bias))
    router.rebalance(embeddings)
    experts = (Structure.uniform(TINY, 0.3), Structure.uniform(TINY, 0.9))
    write_mixture(tmp_path / "mixture", teacher, teacher.unet(), router, encoder, experts, MacBudget(0.7, 8, 12), {})
    mixture = Mixture.load(tmp_path / "mixture")
    rows = [Row(str(n), caption) for n, caption in enumerate(CAPTIONS[:9])]
    routes = mixture.route([row.prompt for row in rows]).tolist()
    assert set(routes) == {0, 1}
    folder = sample_folder(mixture.path, rows, tmp_path / "images", LATENTS, batch=BATCH, load=load_mixture)
    assert list(folder.entries) == [row.id for row in rows]
    for k in (0, 1):
        theirs = [row for row, route in zip(rows, routes, strict=True) if route == k]
        alone = sample_folder(mixture.expert_folder(k), theirs, tmp_path / str(k), LATENTS, batch=BATCH)
        for row in theirs:
            assert torch.equal(folder.latents(row.id), alone.latents(row.id))
    with pytest.raises(UserError, match="made with mixture None, not"):
        sample_folder(mixture.path, theirs, tmp_path / "1", LATENTS, batch=BATCH, load=load_mixture)


def test_a_stable_diffusion_folder(tmp_path):
    """Its VAE decodes some images at a time; the UNet in bf16 draws nearly the same."""
    model, rows = make_sd_folder(tmp_path / "sd"), [Row("a", "a red star"), Row("b", "a blue house"), Row("c", "a")]
    recipe = Recipe(steps=2, method="ddim")
    found = {
        name: sample_folder(model, rows, tmp_path / name, replace(recipe, **change), batch=6)
        for name, change in (("png", {}), ("latents", {"format": "latents"}), ("bf16", {"precision": "bf16"}))
    }
    assert found["png"].settings["recipe"].items() > {"guidance": 7.5, "size": 8}.items()
    vae = load_folder(model).vae
    for row in rows:
        picture = pixels(found["png"].path_of(row.id)).int()
        assert picture.shape == (64, 64, 3)
        exact = to_pixels(vae.decode(found["latents"].latents(row.id)[None]))[0].int()
        assert (picture - exact).abs().max() <= 1
        assert 0 < (pixels(found["bf16"].path_of(row.id)).int() - picture).abs().float().mean() < 5
