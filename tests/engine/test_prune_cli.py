"""`python -m bilevel_fast.prune` from folder to folder, and what it says when it cannot."""

import re

import pytest
import torch

from bilevel_fast import errors, prune
from bilevel_fast.architecture import MINI, sites
from bilevel_fast.folder import load_folder, load_unet
from bilevel_fast.macs import count
from bilevel_fast.structure import Structure
from mini_folder import TINY, make_mini_folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_mini_folder(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; return its exit code and what it wrote to stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["prune", *map(str, arguments)])
        return errors.run(prune.main), *capsys.readouterr()

    return command


@pytest.mark.parametrize("method", ["uniform", "magnitude"])
def test_writes_the_student(method, teacher, run, tmp_path):
    out = tmp_path / "student"
    code, stdout, stderr = run(method, "--teacher", teacher, "--budget", "0.7", "--out", out)
    assert (code, stderr) == (0, "")

    folder = load_folder(out)
    structure = folder.structure
    assert structure is not None
    macs = count(structure, TINY.sample_size, folder.text_encoder.length)
    assert 0.698 <= macs.ratio <= 0.7
    weights = structure.slice(load_unet(teacher).state_dict())
    student = folder.unet().state_dict()
    assert student.keys() == weights.keys()
    assert all(torch.equal(student[k], weights[k]) for k in weights)
    assert folder.text_encoder.encode(["a red star"]).equal(load_folder(teacher).text_encoder.encode(["a red star"]))

    lines = stdout.splitlines()
    assert len(lines) == len(sites(TINY)) + 5
    for site, line in zip(sites(TINY), lines, strict=False):
        counts = [int(n) for n in re.findall(r"(\d+)/", line)]
        assert line.startswith(site.name)
        assert counts == [structure.count(site, width) for width in site.widths]
    assert f"{macs.ratio:.4f}, budget 0.7" in stdout
    assert f"-> {macs.params:,}" in stdout


def test_picture():
    """Bars are the share of the site's MACs. One head of two, one group of eight; norm and projections stay."""
    name, gone = "down_blocks.0.resnets.0", "up_blocks.2.attentions.1"
    structure = Structure.uniform(TINY, 0.125, [gone])
    lines = {line.split()[0]: line for line in prune.picture(structure, 8, 12).splitlines()}
    assert list(lines) == [site.name for site in sites(TINY)]
    pad = len("down_blocks.0.attentions.0")
    assert lines[name] == f"{name:{pad}}  █░░░░░░░░░  1/8 groups"
    assert lines[gone] == f"{gone:{pad}}  ░░░░░░░░░░  dropped"
    transformer = "down_blocks.0.attentions.0"
    assert lines[transformer] == f"{transformer}  ████░░░░░░  attn1 1/2 heads  attn2 1/2 heads  ff 1/8 groups"
    assert set(prune.picture(Structure.dense(TINY), 8, 12)) & set("█░") == {"█"}


def test_latent_and_text_change_what_fits(teacher, run, tmp_path):
    """At large latents self-attention dominates, and the same budget is met by another structure."""
    found = []
    for latent, text in ((8, 12), (64, 3)):
        out = tmp_path / str(latent)
        sizes = ("--latent", latent, "--text", text)
        assert run("magnitude", "--teacher", teacher, "--budget", "0.6", "--out", out, *sizes)[0] == 0
        structure = load_folder(out).structure
        assert structure is not None
        assert 0.59 <= structure.macs(latent, text).ratio <= 0.6
        found.append(structure)
    assert found[0] != found[1]


def test_defaults_prune_the_shipped_teacher(run, tmp_path):
    assert run("magnitude", "--out", tmp_path / "student")[0] == 0
    structure = load_folder(tmp_path / "student").structure
    assert structure is not None
    assert structure.config == MINI
    assert 0.798 <= structure.macs(MINI.sample_size, 12).ratio <= 0.8


def test_refusals(teacher, run, tmp_path):
    """One line, exit code 2, and nothing written."""
    out = tmp_path / "student"
    pruned, full = tmp_path / "pruned", tmp_path / "full"
    full.mkdir()
    assert run("uniform", "--teacher", teacher, "--out", pruned)[0] == 0
    cases = {
        "no pruning method 'magnitud'; did you mean 'magnitude'": ("magnitud", "--out", out),
        r"budget 0.1 is too small: keeping 25% of every width vector takes 0\.\d+ of the dense MACs": (
            ("uniform", "--teacher", teacher, "--budget", 0.1, "--out", out)
        ),
        "budget is 1.5, wanted a share": ("uniform", "--teacher", teacher, "--budget", 1.5, "--out", out),
        "pruned is pruned already; wanted a dense model": ("uniform", "--teacher", pruned, "--out", out),
        "nowhere does not exist": ("uniform", "--teacher", tmp_path / "nowhere", "--out", out),
        "full exists already": ("uniform", "--teacher", teacher, "--out", full),
        "latent size is 0": ("uniform", "--teacher", teacher, "--latent", 0, "--out", out),
    }
    for message, arguments in cases.items():
        code, stdout, stderr = run(*arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert re.search(message, stderr), stderr
    assert not out.exists()
