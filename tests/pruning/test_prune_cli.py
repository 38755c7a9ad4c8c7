"""`python -m bilevel_fast.prune` from folder to folder, and what it says when it cannot."""

import io
import re

import pytest
import torch

from bilevel_fast.data.cache import Index
from bilevel_fast.data.writer import CacheWriter
from bilevel_fast.models.architecture import MINI, sites
from bilevel_fast.models.folder import load_folder, load_unet
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.pruning import FIXED, METHODS, MacBudget, bk_sdm, reinitialise
from bilevel_fast.pruning.picture import picture
from bilevel_fast.pruning.sdxl_shapes import SHAPES
from mini_folder import TINY

pytestmark = pytest.mark.usefixtures("few_steps")


FEW = ("--images", 4, "--batch", 2)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in FIXED])
def test_writes_the_student(method, teacher, run, tmp_path):
    out = tmp_path / "student"
    code, stdout, stderr = run(method, "--teacher", teacher, "--budget", "0.7", "--out", out, *FEW)
    assert (code, stderr) == (0, "")

    folder = load_folder(out)
    structure = folder.structure
    assert structure is not None
    macs = count(structure, TINY.sample_size, folder.text_encoder.length)
    assert (0.6 if method == "laptop" else 0.698) <= macs.ratio <= 0.7
    weights = structure.slice(load_unet(teacher).state_dict())
    student = folder.unet().state_dict()
    assert student.keys() == weights.keys()
    assert all(torch.equal(student[k], weights[k]) for k in weights)
    assert folder.text_encoder.encode(["a red star"]).equal(load_folder(teacher).text_encoder.encode(["a red star"]))

    lines = stdout.splitlines()
    assert len(lines) == len(sites(TINY)) + 6
    shows(lines, structure, macs.ratio)
    assert f"{macs.ratio:.4f}, budget 0.7" in stdout
    assert f"-> {macs.params:,}" in stdout


def shows(lines, structure, ratio):
    """The picture says what the structure keeps and drops, site by site, and what is saved adds up."""
    total = 0.0
    for site, line in zip(sites(structure.config), lines[1:], strict=False):
        name, bar, _, saved, *rest = line.split()
        assert name == site.name
        total += float(saved.removesuffix("%")) / 100
        whole = all(structure.count(site, w) == w.units for w in site.widths)
        assert (bar == "█" * 10) == whole == (saved == "0.00%")
        if site.name in structure.dropped:
            assert (bar, rest) == ("░" * 10, ["dropped"])
        else:
            assert bar.startswith("█")
            assert [int(n) for n in re.findall(r"(\d+)/", line)] == [structure.count(site, w) for w in site.widths]
    assert total == pytest.approx(1 - ratio, abs=5e-5 * len(sites(structure.config)))


def test_random_init(teacher, run, tmp_path):
    """The shape is the method's, the weights are those of the seed, and the output says so."""
    out, plain = tmp_path / "fresh", tmp_path / "plain"
    code, stdout, _ = run("magnitude", "--teacher", teacher, "--out", out, "--random-init", "--seed", 3)
    assert code == 0
    assert "weights     random, seed 3" in stdout
    assert run("magnitude", "--teacher", teacher, "--out", plain)[0] == 0
    fresh, pruned = load_folder(out), load_folder(plain)
    assert fresh.structure == pruned.structure
    wanted = reinitialise(pruned.unet(), 3).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in fresh.unet().state_dict().items())


def test_seed_reaches_the_method(teacher, run, tmp_path):
    found = []
    for seed in (0, 1):
        assert run("random", "--teacher", teacher, "--out", tmp_path / str(seed), "--seed", seed)[0] == 0
        found.append(load_folder(tmp_path / str(seed)).structure)
    assert found[0] != found[1]


def test_help_lists_the_methods(run, capsys):
    """With the first line of each docstring."""
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, function in METHODS.items():
        first = function.__doc__.partition("\n")[0]
        assert len(first) > 20
        assert f"{name}: {first}" in shown


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A folder of Stable Diffusion's layout: teacher/, and cache/ of six images' latents."""
    pytest.importorskip("diffusers")
    from sd_folder import make_sd_folder

    root = tmp_path_factory.mktemp("sd")
    folder = load_folder(make_sd_folder(root / "teacher"))
    writer = CacheWriter(root / "cache", Index(kind="images", latent_shape=(4, 8, 8), vae=folder.vae_fingerprint))
    for i in range(6):
        moments = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(i))
        writer.add(moments, [f"a photo of a house {i}"])
    writer.finish()
    return root


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SHAPES])
def test_every_method_runs_on_sd_folders(method, sd, run, tmp_path):
    """BK-SDM needs no budget, and says what it costs."""
    out, fixed = tmp_path / "student", method in FIXED
    size = () if fixed else ("--budget", 0.8)
    code, stdout, stderr = run(method, "--teacher", sd / "teacher", "--data", sd / "cache", "--out", out, *size, *FEW)
    assert (code, stderr) == (0, "")
    folder = load_folder(out)
    assert folder.structure is not None
    ratio = count(folder.structure, 8, folder.text_encoder.length).ratio
    shows(stdout.splitlines(), folder.structure, ratio)
    if fixed:
        assert folder.structure == bk_sdm.structure(folder.config, method.removeprefix("bk-sdm-"))
        assert f"{ratio:.4f}, fixed by {method}" in stdout
    else:
        assert (0.7 if method == "laptop" else 0.798) <= ratio <= 0.8
    latents = torch.randn(1, 4, 8, 8), torch.tensor([500]), folder.text_encoder.encode(["a red star"])
    assert folder.unet()(*latents).out.isfinite().all()


def test_calibration_refusals(sd, run, tmp_path):
    """Data that is missing or not of this model."""
    out, foreign = tmp_path / "student", tmp_path / "foreign"
    writer = CacheWriter(foreign, Index(kind="images", latent_shape=(4, 8, 8), vae="other"))
    writer.add(torch.zeros(1, 8, 8, 8), ["a house"])
    writer.finish()
    base = ("--teacher", sd / "teacher", "--out", out)
    for message, arguments in {
        "laptop tries the teacher on data, and the calibration set is empty": ("laptop", *base),
        "diff-pruning tries the teacher on data, and the calibration set is empty": ("diff-pruning", *base),
        "foreign: latents of VAE other": ("diff-pruning", *base, "--data", foreign),
        "--images is 0, wanted 1 or more": ("laptop", *base, "--images", 0),
        r"budget 0.6 is too small: bk-sdm-base takes 0\.\d{4} of the dense MACs": (
            "bk-sdm-base",
            *base,
            "--budget",
            0.6,
        ),
        "bk-sdm-tiny is a UNet of its own": ("bk-sdm-tiny", *base),
        "vega is a shape of Stable Diffusion XL: wanted down blocks DownBlock2D, CrossAttn": ("vega", *base),
        r"budget 0.05 is too small: dropping all \d+ layers that can go leaves 0\.\d+ of the dense MACs": (
            ("laptop", *base, "--data", sd / "cache", "--budget", 0.05, *FEW)
        ),
    }.items():
        code, stdout, stderr = run(*arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert re.search(message, stderr), stderr
    assert not out.exists()


def test_picture():
    """Bars are the share of the site's MACs. One head of two, one group of eight; norm and projections stay."""
    name, gone, transformer = "down_blocks.0.resnets.0", "up_blocks.2.attentions.1", "down_blocks.0.attentions.0"
    structure, prices = Structure.uniform(TINY, 0.125, [gone]), MacBudget(1.0, 8, 12).prices(TINY)
    head, *rest = picture(structure, prices).splitlines()
    lines = {line.split()[0]: line for line in rest}
    assert list(lines) == [site.name for site in sites(TINY)]
    whole = count(Structure.dense(TINY), 8, 12)
    sizes = {row.name: row.true / whole.true for row in whole.rows}
    left = {row.name: row.true / whole.true for row in count(structure, 8, 12).rows}

    def start(site, bar):
        kept = f"{round(100 * left[site] / sizes[site])}%"
        return f"{site:{len(transformer)}}  {bar} {kept:>5} {100 * (sizes[site] - left[site]):6.2f}%  "

    assert head == f"{'site':{len(transformer)}}  MACs kept          saved  units kept"
    assert lines[name] == start(name, "█░░░░░░░░░") + " 1/8 groups"
    assert lines[gone] == start(gone, "░░░░░░░░░░") + "dropped"
    assert lines[transformer] == start(transformer, "████░░░░░░") + "attn1  1/2 heads  attn2  1/2 heads  ff  1/8 groups"
    assert set(picture(Structure.dense(TINY), prices)) & set("█░") == {"█"}


def test_a_bar_is_full_only_where_everything_is_kept():
    """One group of 16 less is more than 95 % of some site: it shows all the same. So does what hardly is left."""
    prices = MacBudget(1.0, 16, 12).prices(MINI)
    dense = Structure.dense(MINI).kept
    for site in sites(MINI):
        kept = {w.name: tuple(range(w.units - (w == site.widths[-1]))) for w in site.widths}
        lines = picture(Structure(MINI, {**dense, site.name: kept}), prices).splitlines()
        assert [line.split()[0] for line in lines if "░" in line] == [site.name]
        assert next(line for line in lines if "░" in line).split()[1].count("█") >= 8


def test_a_terminal_without_blocks(teacher, run, monkeypatch, tmp_path):
    """The student is written by then; the picture must not end in a traceback."""
    with monkeypatch.context() as patch:
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        patch.setattr("sys.stdout", stdout)
        assert run("uniform", "--teacher", teacher, "--out", tmp_path / "student")[0] == 0
    stdout.seek(0)
    assert {*stdout.read().splitlines()[1].split()[1]} == {"#", "."}


def test_latent_and_text_change_what_fits(teacher, run, tmp_path):
    """At large latents self-attention dominates, and the same budget is met by another structure."""
    found = []
    for latent, text in ((8, 12), (64, 3)):
        out = tmp_path / str(latent)
        sizes = ("--latent", latent, "--text", text)
        assert run("magnitude", "--teacher", teacher, "--budget", "0.6", "--out", out, *sizes)[0] == 0
        structure = load_folder(out).structure
        assert structure is not None
        assert 0.59 <= count(structure, latent, text).ratio <= 0.6
        found.append(structure)
    assert found[0] != found[1]


def test_defaults_prune_the_shipped_teacher(run, tmp_path):
    assert run("magnitude", "--out", tmp_path / "student")[0] == 0
    structure = load_folder(tmp_path / "student").structure
    assert structure is not None
    assert structure.config == MINI
    assert 0.798 <= count(structure, MINI.sample_size, 12).ratio <= 0.8


def test_refusals(teacher, run, tmp_path):
    """One line, exit code 2, and nothing written."""
    out = tmp_path / "student"
    pruned, full = tmp_path / "pruned", tmp_path / "full"
    full.mkdir()
    assert run("uniform", "--teacher", teacher, "--out", pruned)[0] == 0
    cases = {
        "no pruning method 'magnitud'; did you mean 'magnitude'": ("magnitud", "--out", out),
        "no pruning method 'rout'; did you mean 'route'": ("rout", "runs/aptp", "--prompts", "a star"),
        "no pruning method 'aptpp'; did you mean 'aptp'": ("aptpp", "--experts", 4, "--out", out),
        "no pruning method 'unifrom'; did you mean 'uniform'": ("--out", out, "unifrom"),
        r"budget 0.1 is too small: keeping 25% of every width vector takes 0\.\d+ of the dense MACs": (
            ("uniform", "--teacher", teacher, "--budget", 0.1, "--out", out)
        ),
        "budget is 1.5, wanted a share": ("uniform", "--teacher", teacher, "--budget", 1.5, "--out", out),
        "budget is 0.0, wanted a share of the dense MACs, 0 < budget <= 1": (
            ("laptop", "--teacher", teacher, "--budget", 0, "--out", out)
        ),
        "--budget is nan: wanted finite": ("diff-pruning", "--teacher", teacher, "--budget", "nan", "--out", out),
        "batch of the calibration set: 0, wanted 1": ("laptop", "--teacher", teacher, "--batch", 0, "--out", out),
        "model_index.json is missing": ("uniform", "--teacher", full, "--out", out),
        "pruned is pruned already; wanted a dense model": ("laptop", "--teacher", pruned, "--out", out),
        "bk-sdm-base drops nothing of this UNet": ("bk-sdm-base", "--teacher", teacher, "--out", out),
        "seed is -1": ("random", "--teacher", teacher, "--seed", -1, "--out", out),
        "--device nonsense": ("uniform", "--teacher", teacher, "--device", "nonsense", "--out", out),
        "nowhere does not exist": ("uniform", "--teacher", tmp_path / "nowhere", "--out", out),
        "full exists already": ("uniform", "--teacher", teacher, "--out", full),
        "latent size is 0": ("uniform", "--teacher", teacher, "--latent", 0, "--out", out),
    }
    for message, arguments in cases.items():
        code, stdout, stderr = run(*arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert re.search(message, stderr), stderr
    assert not out.exists()
