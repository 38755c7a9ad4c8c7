"""The alignment sweep: what is timed, what padding saves, and the rule that comes out."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import Timing
from benchmarks.speed import alignment as bench
from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21, sites

CPU = torch.device("cpu")
LEVEL = bench.Level(32, 4, 16, (18, 24, 32))  # 2 channels in a group


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["alignment", "--tiny", "--batch", "1", "--rounds", "4", *arguments])
    return errors.run(bench.main)


def rows(ms, level=LEVEL, position="conv1", direction="fwd"):
    """Rows as if each width took `ms(width)`."""
    timings = {width: Timing((ms(width) / 1e3,) * 2) for width in level.all_widths()}
    return list(bench.rows_of(timings, level, 1, position, direction))


# --- what is timed ---


@pytest.mark.parametrize(("cin", "cout"), [(32, 18), (18, 32)])
def test_the_calls_are_a_convolution_and_its_gradients(cin, cout):
    numbers = bench.Numbers.make(LEVEL, 2, CPU, torch.float32)
    x = numbers.x[: 2 * 16 * cin].view(2, 4, 4, cin).permute(0, 3, 1, 2).requires_grad_()
    weight = numbers.weight[: 9 * cin * cout].view(cout, 3, 3, cin).permute(0, 3, 1, 2).requires_grad_()
    upstream = numbers.upstream[: 2 * 16 * cout].view(2, 4, 4, cout).permute(0, 3, 1, 2)
    out = F.conv2d(x, weight, padding=1)
    dgrad, wgrad = torch.autograd.grad(out, (x, weight), upstream)
    fwd, (got_dgrad, none, _), (none_too, got_wgrad, _) = (
        bench.convolution(numbers, cin, cout, 4, 2, direction)() for direction in bench.DIRECTIONS
    )
    assert none is None
    assert none_too is None
    for got, expected in ((fwd, out), (got_dgrad, dgrad), (got_wgrad, wgrad)):
        torch.testing.assert_close(got, expected)
    assert fwd.is_contiguous(memory_format=torch.channels_last)
    assert out.abs().mean() > 1, "the numbers are not all zero"


def test_levels_are_those_of_the_networks():
    """A group is as wide as in the UNet, at the size that the level works at."""
    for config, latent, levels in ((SD21, 64, bench.SD21_FULL), (MINI, 16, bench.MINI)):
        there = {
            (s.out_channels, latent // s.stride, s.widths[0].units, s.widths[0].unit_size)
            for s in sites(config)
            if s.kind == "resnet"
        }
        assert {(v.channels, v.size, v.groups, v.unit) for v in levels} <= there


def test_every_group_count_is_measured_with_all_that_it_is_padded_to():
    for level in bench.SD21_FULL:
        widths = set(level.all_widths())
        for count in range(1, 33):
            for align in (1, 8, 16, 32):
                width = count * level.channels // 32
                assert next(w for w in range(width, width + 32) if w % align == 0) in widths
        assert max(widths) == level.channels, "a dense ResNet is never padded"


# --- the rule ---


def test_eight_wins():
    # whole multiples of 8 run at full speed, others at half of it
    found = rows(lambda width: width if width % 8 == 0 else 2 * width)
    sums, number = bench.totals(found)
    assert number == 16
    assert sums == {
        1: sum(2 * k if 2 * k % 8 == 0 else 4 * k for k in range(1, 17)),
        8: 4 * (8 + 16 + 24 + 32),
        16: 8 * (16 + 32),
        32: 16 * 32,
    }
    assert bench.best_align(found) == 8


def test_sixteen_wins():
    assert bench.best_align(rows(lambda width: width if width % 16 == 0 else 3 * width)) == 16


def test_one_wins_where_time_goes_with_the_width():
    assert bench.best_align(rows(lambda width: width)) == 1


def test_the_smaller_of_equals_wins():
    assert bench.best_align(rows(lambda width: 1.0)) == 1
    # every multiple of 8 takes the same, so 8, 16 and 32 do
    assert bench.best_align(rows(lambda width: 1.0 if width % 8 == 0 else 2.0)) == 8


def test_all_convolutions_count():
    """32 wins conv1 by little, 1 wins conv2's weight gradient by more."""
    first = rows(lambda width: 1.0 if width % 32 == 0 else 1.1)
    assert bench.best_align(first) == 32
    other = rows(lambda width: float(width), position="conv2", direction="wgrad")
    assert bench.best_align(first + other) == 1


def test_only_what_was_measured_counts():
    found = rows(lambda width: width if width % 16 == 0 else 3 * width)
    # without the width 32, nothing above 16 channels, and nothing at align 32, was measured
    some = [row for row in found if row["config"]["width"] != 32]
    assert bench.totals(some)[1] == 0
    with pytest.raises(UserError, match="no kept width was measured together with all that it is padded to"):
        bench.best_align(some)
    # 18 -> 24, 32, 32 is measured, 24 -> 24, 32, 32 and 32 too: 3 group counts
    some = [row for row in found if row["config"]["width"] in LEVEL.widths]
    sums, number = bench.totals(some)
    assert number == 3
    assert sums == {1: 54 + 72 + 32, 8: 72 + 72 + 32, 16: 3 * 32, 32: 3 * 32}


def test_sizes_are_not_mixed():
    found = rows(lambda width: 1.0)
    for row in found:
        row["config"]["size"] = 4 if row["config"]["width"] < 20 else 8
    assert bench.totals(found)[1] == 7, "20, 22, ... 32; the width 32 that the smaller ones need is of another size"


# --- rows ---


def test_padding_is_compared_round_by_round():
    timings = {18: Timing((1e-3, 4e-3, 2e-3)), 24: Timing((1e-3, 2e-3, 4e-3)), 32: Timing((2e-3, 2e-3, 4e-3))}
    found = list(bench.rows_of(timings, LEVEL, 3, "conv2", "dgrad"))
    assert [(r["config"]["width"], r["provider"], r.get("aligns")) for r in found] == [
        (18, "unpadded", None),
        (18, "padded to 24", [8]),
        (18, "padded to 32", [16, 32]),
        (24, "unpadded", None),
        (24, "padded to 32", [16, 32]),
        (32, "unpadded", None),
    ]
    assert found[0]["case"] == "32 4x4 b3 conv2 dgrad 18"
    assert found[0]["value"] == pytest.approx(2.0)
    assert found[0]["tflop_per_s"] == pytest.approx(2 * 9 * 32 * 18 * 4 * 4 * 3 / 2e-3 / 1e12)
    assert found[1]["value"] == pytest.approx(1.0)  # 1, 2, 0.5
    assert found[2]["value"] == pytest.approx(0.5)  # 0.5, 2, 0.5


def test_a_width_that_no_group_count_has_is_not_padded():
    level = bench.Level(640, 1, 32, (424, 430, 432))
    timings = {width: Timing((1.0, 1.0)) for width in (430, 432)}
    assert {r["metric"] for r in bench.rows_of(timings, level, 1, "conv1", "fwd")} == {"ms"}


# --- command line ---


def test_rehearsal(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert run(monkeypatch, "--out", str(out)) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    times = [row for row in found if row["metric"] == "ms"]
    assert len(times) == len({row["case"] for row in times}) == 6 * (3 + 4)  # positions x directions x widths
    assert all(row["p20"] <= row["value"] <= row["p80"] and row["tflop_per_s"] > 0 for row in times)
    for field in ("device", "torch", "commit", "date", "dtype"):
        assert times[0][field], field
    *_, total, best = capsys.readouterr().out.splitlines()
    assert best == f"best align: {bench.best_align(found)}"
    assert total.startswith("together ")
    assert total.endswith(f" of {bench.totals(found)[1]} convolutions")
    assert bench.totals(found)[1] == 24  # 27 and 30 of 48 channels, 48 and 54 of 96: two positions, three directions


def test_json_is_rows_alone(monkeypatch, capsys):
    assert run(monkeypatch, "--json") == 0
    assert {json.loads(line)["suite"] for line in capsys.readouterr().out.splitlines()} == {"alignment"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ful"], "there is no flag '--ful'; did you mean '--full'"),
        (["--batch", "0"], "--batch 0: wanted at least 1"),
        (["--rounds", "3"], "--rounds 3: wanted at least 4"),
    ],
)
def test_bad_flags_are_one_line(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    if not torch.cuda.is_available():
        assert run(monkeypatch, "--device", "cuda") == 2
