"""`python -m benchmarks.counts.macs`: numbers, table, every way to name a structure, and refusals."""

import json
import re

import pytest

from benchmarks.counts import macs
from bilevel_fast.base import errors
from bilevel_fast.models.architecture import MINI, SD21, sites
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from mini_folder import TINY, make_mini_folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; return its exit code and what it wrote to stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["macs", *map(str, arguments)])
        return errors.run(macs.main), *capsys.readouterr()

    return command


@pytest.fixture
def run_json(run):
    def command(*arguments):
        code, stdout, stderr = run(*arguments, "--json")
        assert (code, stderr) == (0, "")
        return json.loads(stdout)

    return command


def test_dense_sd21(run_json):
    found = run_json("--model", "sd21", "--latent", 64, "--text", 77)
    assert round(found["true_g"], 3) == 402.784
    assert round(found["official_g"], 3) == 464.327
    assert found["params"] == 865_910_724
    assert found["ratio"] == 1.0
    assert list(found["sites"]) == [site.name for site in sites(SD21)]
    assert found["sites"]["down_blocks.0.resnets.0"]["params"] == 2_255_040
    for part in ("true_g", "official_g", "params"):
        rows = [row[part] for rows in (found["sites"], found["other"]) for row in rows.values()]
        assert sum(rows) == pytest.approx(found[part], rel=1e-12)


def test_defaults(run_json):
    assert run_json() == run_json("--model", "sd21", "--latent", 96, "--text", 77)
    assert run_json("--model", "mini") == run_json("--model", "mini", "--latent", MINI.sample_size, "--text", 12)


def test_ways_to_name_a_structure(run_json, tmp_path):
    dropped = ["up_blocks.3.attentions.2", "mid_block.resnets.0"]
    structure = Structure.uniform(SD21, 0.5, dropped)
    wanted = count(structure, 64, 77)
    structure.save(tmp_path / "structure.json")
    for arguments in (["--keep", 0.5, "--drop", ",".join(dropped)], ["--structure", tmp_path / "structure.json"]):
        found = run_json("--latent", 64, *arguments)
        assert found["true_g"] == wanted.true / 1e9
        assert found["ratio"] == wanted.ratio
        assert found["params"] == wanted.params
        assert found["sites"][dropped[0]] == {"true_g": 0, "official_g": 0, "params": 0}
    shallow = run_json("--latent", 64, "--drop", dropped[0])
    assert shallow["true_g"] == count(Structure.uniform(SD21, 1.0, dropped[:1]), 64, 77).true / 1e9


def test_model_folder(run_json, tmp_path):
    """A dense folder, and one with a structure.json, which --keep overrides."""
    folder = make_mini_folder(tmp_path / "model")
    sizes = ("--latent", 8, "--text", 12)
    dense = run_json("--model", folder, *sizes)
    assert (dense["ratio"], dense["true_g"]) == (1.0, count(Structure.dense(TINY), 8, 12).true / 1e9)
    structure = Structure.uniform(TINY, 0.5)
    structure.save(folder / "unet" / "structure.json")
    assert run_json("--model", folder, *sizes)["ratio"] == count(structure, 8, 12).ratio
    assert run_json("--model", folder, *sizes, "--keep", 1)["ratio"] == 1.0


def test_table(run):
    """Aligned plain text: one row per module, dense beside pruned, and the total."""
    code, stdout, _ = run("--latent", 64, "--keep", 0.5, "--drop", "up_blocks.3.attentions.2")
    assert code == 0
    lines = stdout.splitlines()
    table = lines[2:-2]
    assert len({len(line) for line in table}) == 1
    # head and rule, 38 sites, 6 resamplers, conv_in, time embedding, conv_norm_out, conv_out, SiLU, rule and total
    assert len(table) == 2 + 38 + 6 + 5 + 2
    resnet = "down_blocks.0.resnets.0"
    assert table[4].split() == [resnet, "16/32", "7.558", "3.781", "7.558", "3.781", "2,255,040", "1,128,000"]
    gone = next(line for line in table if line.startswith("up_blocks.3.attentions.2"))
    assert gone.split()[1:] == ["dropped", "19.470", "0.000", "30.088", "0.000", "2,710,080", "0"]
    assert table[-1].split() == ["total", "402.784", "215.217", "464.327", "236.948", "865,910,724", "482,433,540"]
    assert lines[-1] == "0.5343 of the dense MACs (true), 482,433,540 parameters"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "sd12"), "--model 'sd12' is neither a known model nor a folder; did you mean 'sd21'"),
        (("--laten", 64), "unknown argument '--laten'; did you mean '--latent'"),
        (("--latent", "x"), "argument --latent: invalid int value: 'x'"),
        (("--latent", 0), "latent size is 0, wanted at least 1"),
        (("--text", -1), "text length is -1, wanted at least 1"),
        (("--keep", 2), "keep is 2.0, wanted 0 < keep <= 1"),
        (("--drop", "mid_block.atentions.0"), "no site 'mid_block.atentions.0'.*did you mean 'mid_block.attentions.0'"),
        (("--drop", "down_blocks.1.resnets.0"), "down_blocks.1.resnets.0 cannot be dropped"),
        (("--structure", "nowhere.json"), "nowhere.json is missing"),
        (("--structure", "mini.json"), "mini.json: the structure belongs to another UNet than --model sd21"),
        (("--structure", "mini.json", "--keep", 0.5), "--structure says what is kept; it cannot go with --keep"),
        (("--model", "."), "unet/config.json is missing"),
    ],
)
def test_refusals(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Structure.dense(MINI).save(tmp_path / "mini.json")
    code, stdout, stderr = run(*arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), stderr), stderr


# --- compare ---


def test_compare_json(run_json, tmp_path):
    """Blocks add up to what the structure costs, and a block is the sum of its sites and resamplers."""
    dropped = ["up_blocks.3.attentions.2", "mid_block.resnets.0"]
    path = tmp_path / "structure.json"
    Structure.uniform(SD21, 0.5, dropped).save(path)
    found = run_json("--latent", 64, "--compare", path, "planned-0.55", "bk-sdm-small")["structures"]
    assert list(found) == ["dense", str(path), "planned-0.55", "bk-sdm-small"]
    assert list(found["dense"]) == [*SD21.blocks, "other", "total"]
    for name, wanted in (("dense", Structure.dense(SD21)), (str(path), Structure.load(path))):
        macs_of = count(wanted, 64, 77)
        totals = {"true": macs_of.true, "official": macs_of.official, "params": macs_of.params}
        assert found[name]["total"] == totals
        for part, total in totals.items():
            assert sum(found[name][block][part] for block in (*SD21.blocks, "other")) == total
    one = run_json("--latent", 64, "--structure", path)
    rows = one["sites"] | one["other"]
    for block in SD21.blocks:
        true = sum(row["true_g"] for name, row in rows.items() if name.startswith(block + "."))
        assert found[str(path)][block]["true"] == pytest.approx(1e9 * true, rel=1e-12)
    assert found["bk-sdm-small"]["mid_block"] == {"true": 0, "official": 0, "params": 0}


def test_compare_table(run):
    code, stdout, _ = run("--latent", 64, "--compare", "0.55", "planned-0.55")
    table = stdout.splitlines()[2:]
    assert code == 0
    assert len({len(line) for line in table}) == 1
    assert [line.split()[0] for line in table if line[0] != "-"] == ["GMAC", *SD21.blocks, "other", "total"]
    uniform, planned = (["221.518", "55.00%", "247.365", "53.27%"], ["221.531", "55.00%", "282.688", "60.88%"])
    assert table[-1].split() == ["total", "402.784", "464.327", *uniform, *planned]
    mid = next(line for line in table if line.startswith("mid_block"))
    assert mid.split()[3:5] == ["3.178", "52.08%"]


def test_compare_of_the_mini_unet(run_json):
    found = run_json("--model", "mini", "--compare", "planned-0.80")["structures"]
    assert found["dense"]["total"]["true"] == count(Structure.dense(MINI), 16, 12).true
    assert 0.798 <= found["planned-0.80"]["total"]["true"] / found["dense"]["total"]["true"] <= 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--compare", "planed-0.80"),
            "--compare 'planed-0.80' is neither a file nor a name; did you mean 'planned-0.80'",
        ),
        (("--compare", "nowhere.json"), "nowhere.json is missing"),
        (("--compare", "mini.json"), "--compare mini.json: a UNet of 3 levels, that of --model sd21 has 4"),
        (("--compare", "bk-sdm-tiny"), "--compare bk-sdm-tiny: a UNet of 3 levels"),
        (("--compare", "dense", "dense"), "--compare names 'dense' twice"),
        (("--compare", "0.55", "--keep", 0.5), "--compare says what is counted; it cannot go with --structure, --keep"),
        (("--compare",), "argument --compare: expected at least one argument"),
    ],
)
def test_compare_refuses(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Structure.dense(MINI).save(tmp_path / "mini.json")
    code, stdout, stderr = run(*arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert message in stderr
