"""`benchmarks.counts.roofline`, `cards` and `memory`: arithmetic by hand, and the steps that are traced."""

import json
import os

import pytest
import torch

from benchmarks import RESULTS, cards, structures
from benchmarks.cards import CARDS, Card
from benchmarks.counts import memory, roofline
from bilevel_fast.base import errors
from bilevel_fast.models.architecture import MINI, sites
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.profiling.cost import PRODUCTS, Cost
from bilevel_fast.profiling.memory import largest_batch

SMALL = structures.model(tiny=True)
BATCH = 2


NAMES = ("dense", "0.55")
PLACES = {name: CARDS[name] for name in ("RTX A6000", "H200")}


def shrink(monkeypatch, module):
    """The mini world's UNet in place of SD 2.1."""
    students = {name: structures.structure(name, tiny=True) for name in NAMES}
    monkeypatch.setattr(module, "counted", lambda unet: (SMALL, students))


@pytest.fixture(scope="module")
def projected():
    """Rows of two cards, and the counts that they were made from, by structure and provider."""
    counts = {}

    def count(size, kept, batch, provider):
        counts["dense" if kept.is_dense else "0.55", provider] = found = original(size, kept, batch, provider)
        return found

    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch, roofline)
        original = roofline.count
        monkeypatch.setattr(roofline, "count", count)
        return list(roofline.rows(PLACES, BATCH)), counts


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command; return its exit code and what it wrote to stdout and stderr."""

    def command(module, *arguments):
        monkeypatch.setattr("sys.argv", ["benchmark", *map(str, arguments)])
        return errors.run(module.main), *capsys.readouterr()

    return command


def flops(costs):
    return sum(cost.flops for cost in costs)


def test_projection_by_hand():
    card = Card(sm=90, flops=200.0, matmul=100.0, bytes_per_s=10.0, bytes=0, launch_s=0.25)
    costs = [
        Cost("student", "conv", "a", flops=300, bytes=10),  # 3 s of arithmetic, 1 s of traffic
        Cost("student", "linear", "b", flops=50, bytes=20),  # 0.5 s, 2 s
        Cost("losses", "norm", "c", flops=0, bytes=5),
        Cost("losses", "norm", "d", flops=0, bytes=15),
    ]
    found = roofline.project(costs, card)
    assert found["value"] == pytest.approx(7000)
    assert found["parts_ms"] == pytest.approx({"conv": 3000, "linear": 2000, "norm": 2000})
    assert found["mfu"] == pytest.approx(350 / 7 / 100)
    assert (found["launches"], found["host_ms"]) == (4, pytest.approx(1000))
    assert (found["tflop"], found["gb"]) == (350e-12, 50e-9)


def test_cards():
    names = ["RTX A6000", "RTX 6000 Ada", "RTX 4090", "A100-SXM4-80GB", "H100 80GB HBM3", "H200"]
    assert list(CARDS) == names
    for name, card in CARDS.items():
        assert card.sm in (80, 86, 89, 90)
        assert 0.75 < card.matmul / card.flops < 1.1, name  # a GeForce runs above its nominal clock
        assert 100 < card.matmul / card.bytes_per_s < 300, name
    assert list(roofline.chosen("h200")) == ["H200"]
    assert list(roofline.chosen(None)) == names


def test_this_machine(monkeypatch):
    """2 n^3 FLOPs for a product; a copy reads and writes."""
    measured = cards.this_machine(torch.device("cpu"), seconds=0.05)
    assert 1e8 < measured.matmul < 1e14
    assert 1e8 < measured.copy < 1e13
    monkeypatch.setattr(cards, "_best", lambda call, **_: 0.5)
    pretended = cards.this_machine(torch.device("cpu"))
    assert pretended.matmul == 2 * 1024**3 / 0.5
    assert pretended.copy == 2 * 4 * 2**24 / 0.5


def test_best_of_several_calls():
    calls = []
    found = cards._best(lambda: calls.append(torch.zeros(1)), repeat=3, seconds=0.01, wait=lambda: None)
    assert len(calls) % 3 == 1  # one warms up
    assert 0 < found < 0.01


def padding(kept):
    """Multiply-adds with the channels that bring a ResNet's inner width to a multiple of 8."""
    total = 0
    for site in sites(MINI):
        if site.kind == "resnet" and site.name not in kept.dropped:
            inner = kept.count(site, site.widths[0]) * site.widths[0].unit_size
            pixels = (SMALL.latent // site.stride) ** 2
            total += (-inner % 8) * (9 * (site.in_channels + site.out_channels) * pixels + MINI.time_embed_dim)
    return total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("provider", ["torch", "triton"])
def test_steps_multiply_what_they_should(projected, name, provider):
    """A lower step: the teacher once, the student forward and backward. An upper one: the teacher twice, the student
    once or, with penalty, twice, and no teacher for the penalty."""
    found, kept = projected[1][name, provider], structures.structure(name, tiny=True)
    teacher = 2 * BATCH * count(Structure.dense(MINI), SMALL.latent, SMALL.text).products
    student = 2 * BATCH * (count(kept, SMALL.latent, SMALL.text).products + padding(kept))
    rooms = {case: {room: flops(c for c in costs if c.room == room) for room in ("teacher", "student", "backward")}
             for case, costs in found.items()}  # fmt: skip
    assert rooms["lower"]["teacher"] == teacher
    assert rooms["upper"]["teacher"] == rooms["upper without penalty"]["teacher"] == 2 * teacher
    assert rooms["lower"]["student"] == rooms["upper without penalty"]["student"] == student
    assert rooms["upper"]["student"] == 2 * student
    backward = rooms["lower"]["backward"]
    assert 1.9 * student < backward < 2.3 * student
    assert rooms["upper"]["backward"] == 2 * backward == 2 * rooms["upper without penalty"]["backward"]
    assert {case: flops(costs) for case, costs in found.items()} == {c: sum(r.values()) for c, r in rooms.items()}


@pytest.mark.parametrize(("provider", "moved"), [("triton", 28), ("torch", 28 + 6 + 6)])
def test_the_optimizer(projected, provider, moved):
    """One op of Triton's; torch's casts the gradient, which takes 6 bytes, updates, and rounds to the copy, 6 more."""
    parameters = count(structures.structure("0.55", tiny=True), SMALL.latent, SMALL.text).params
    for costs in projected[1]["0.55", provider].values():
        assert sum(cost.kind == "optimizer" for cost in costs) == 1
        inside = [cost for cost in costs if cost.room == "optimizer"]
        norms = [cost for cost in inside if cost.op in ("aten::linalg_vector_norm", "aten::_foreach_norm")]
        copies = [cost for cost in inside if cost.op == "aten::_foreach_copy_"]
        assert len(norms) == 2  # passes
        assert 1 <= len(copies) <= 2  # of gradients, one for each backward pass
        update = sum(cost.bytes for cost in inside) - sum(cost.bytes for cost in (*norms, *copies))
        assert update == pytest.approx(moved * parameters, rel=0.05)  # and what lies between parameters


def test_triton_ops_save_launches_and_traffic_but_no_products(projected):
    for case in roofline.CASES:
        ours, torchs = projected[1]["0.55", "triton"][case], projected[1]["0.55", "torch"][case]
        assert flops(ours) == flops(torchs)
        assert len(ours) < len(torchs)
        assert sum(c.bytes for c in ours) < 0.95 * sum(c.bytes for c in torchs)
        assert any(c.op == "bilevel_kernels::group_norm_silu_bwd" for c in ours)
        assert not any(c.op.startswith("bilevel_") for c in torchs)
    assert os.environ.get("BILEVEL_FAST_OPS") != "triton"


def check(row):
    """What holds for every projection."""
    assert row["projection"] is True
    assert row["metric"] == "projection"
    assert "max(FLOPs / R, bytes / W)" in row["formula"]
    assert row["value"] == pytest.approx(sum(row["parts_ms"].values()))
    assert row["images_per_second"] == pytest.approx(1e3 * row["config"]["batch"] / row["value"])
    card = CARDS[row["device"]]
    assert row["rates"] == {"matmul_tflop_per_s": card.matmul / 1e12, "gb_per_s": card.bytes_per_s / 1e9}
    assert row["mfu"] == pytest.approx(row["tflop"] / (row["value"] / 1e3) / row["rates"]["matmul_tflop_per_s"])
    assert row["mfu"] <= 1
    assert row["value"] >= 1e3 * row["gb"] / row["rates"]["gb_per_s"] * (1 - 1e-9)
    assert row["provider"] != "products" or set(row["parts_ms"]) <= set(PRODUCTS)


def check_order(found):
    """A bound with less in it is lower; pruning and a missing penalty save time; a faster card takes less."""
    ms = {(r["device"], r["config"]["structure"], r["case"], r["provider"]): r["value"] for r in found}
    assert len(ms) == len(found)
    for (place, name, case, provider), value in ms.items():
        assert ms[place, name, case, "products"] <= value <= ms[place, name, case, "torch"]
        assert provider != "triton" or value < ms[place, name, case, "torch"]
        assert value <= ms[place, "dense", case, provider]
        assert case != "upper without penalty" or value < ms[place, name, "upper", provider]
        assert place != "H200" or value < ms["RTX A6000", name, case, provider]


def test_rows(projected):
    found = projected[0]
    assert len(found) == len(PLACES) * len(NAMES) * 3 * 3
    for row in found:
        check(json.loads(json.dumps(row)))
    check_order(found)


def test_committed_rows():
    """The file is the command's output: every card, structure, case and bound."""
    path = RESULTS / "roofline.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == len(CARDS) * 27
    for row in found:
        assert (row["suite"], row["config"]["unet"], row["config"]["batch"]) == ("roofline", "sd21", 16)
        check(row)
    check_order(found)
    (row,) = [
        r for r in found
        if (r["device"], r["config"]["structure"], r["case"], r["provider"]) == ("H200", "0.80", "lower", "products")
    ]  # fmt: skip
    # three and a half passes of 402.1 GMAC for 16 images; a fifth of the student's are gone
    assert row["tflop"] == pytest.approx(16 * 2 * 0.4021 * (1 + 0.8 * 3), rel=0.05)


def test_output(projected, run, monkeypatch):
    monkeypatch.setattr(roofline, "rows", lambda cards, batch, unet: (r for r in projected[0] if r["device"] in cards))
    code, out, err = run(roofline, "--card", "h200", "--batch", 2)
    assert (code, err) == (0, "")
    lines = out.rstrip().splitlines()
    assert lines[0].startswith("H200: R = 821.2 TFLOP/s (measured by others), W = 4800 GB/s (data sheet)")
    assert "projections, batch 2" in lines[0]
    assert len(lines) == 2 + 2 * 3 * 3
    assert lines[2].split()[:3] == ["dense", "lower", "torch"]
    code, out, _ = run(roofline, "--card", "h200", "--batch", 2, "--json")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [r for r in projected[0] if r["device"] == "H200"]


def test_validation(monkeypatch):
    monkeypatch.setattr(roofline, "this_machine", lambda device, dtype: cards.Ceilings(1e11, 1e10))
    row = roofline.validate(torch.device("cpu"), batch=1, rounds=2)
    assert (row["suite"], row["metric"], row["config"]["dtype"]) == ("roofline_validation", "ms", "float32")
    assert not row.get("projection")
    assert row["p20"] <= row["value"] <= row["p80"]
    assert row["error"] == pytest.approx(row["predicted"] / row["value"] - 1)
    kept = Structure.dense(MINI)
    least = 1e3 * 2 * 3.5 * count(kept, SMALL.latent, SMALL.text).products / 1e11
    assert least < row["predicted"] < 20 * least


def test_memory_rows(run, monkeypatch):
    shrink(monkeypatch, memory)
    monkeypatch.setattr(memory, "SIZES", {1: 2**30, 8: 8 * 2**30})
    code, out, err = run(memory, "--batch", 3, "--json")
    assert (code, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == len(NAMES) * 2 * (1 + 2)
    for row in found:
        assert (row["metric"], row["projection"]) == ("projection", True)
        if row["unit"] == "GiB":
            assert row["value"] == pytest.approx(sum(row["parts_gib"].values()))
        else:
            kept = structures.structure(row["config"]["structure"], tiny=True)
            card = {"1 GB card": 2**30, "8 GB card": 8 * 2**30}[row["device"]]
            recompute = row["config"]["recompute"]
            assert row["value"] == largest_batch(kept, SMALL.latent, SMALL.text, card, recompute=recompute)
    code, out, _ = run(memory, "--batch", 3)
    assert code == 0
    assert out.splitlines()[-1].split()[:2] == ["0.55,", "recompute"]
    assert "-" in out.splitlines()[-1].split()  # nothing fits 1 GiB: what CUDA takes alone is as much


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (roofline, ("--card", "h2oo"), "--card h2oo: 0 cards of that name"),
        (roofline, ("--card", "rtx"), "--card rtx: 3 cards of that name"),
        (roofline, ("--batch", 0), "--batch 0, wanted at least 1"),
        (roofline, ("--cart", "H200"), "there is no flag '--cart'; did you mean '--card'"),
        (memory, ("--batch", -1), "--batch -1, wanted at least 1"),
    ],
)
def test_refusals(run, module, arguments, message):
    code, out, err = run(module, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_validation_without_a_gpu(run):
    code, _, err = run(roofline, "--validate", "--device", "cuda")
    assert code == 2
    assert "this machine has no GPU" in err
