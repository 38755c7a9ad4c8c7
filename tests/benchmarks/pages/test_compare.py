"""What benchmarks.pages.compare calls worse, what it leaves alone, and what it refuses to compare."""

import json

import pytest

from benchmarks.pages.compare import compare, direction, failed, main, table
from benchmarks.rows import config_text, parse, read
from bilevel_fast.base.errors import UserError
from commands import run_command


def row(value, metric="ms", case="lower", **more):
    shared = {"suite": "step", "provider": "ours", "unit": "", "device": "card", "driver": "580.1", "threads": 8}
    return {**shared, "case": case, "metric": metric, "value": value, **more}


def verdict(old, new, tolerance=0.03):
    (line,) = compare([old], [new], tolerance)
    return line.verdict


@pytest.mark.parametrize(
    ("metric", "up", "down"),
    [
        *((metric, "worse", "better") for metric in ("ms", "us", "peak_GiB", "launches", "bytes", "saved_bytes")),
        *(
            (metric, "better", "worse")
            for metric in (
                *("images_per_second", "mfu", "times_faster_than_released", "realised_speedup"),
                *("GB/s", "TFLOP/s", "gb_per_s", "tflop_per_s"),
            )
        ),
        *((metric, "changed", "changed") for metric in ("macs", "official_macs", "params")),
        ("splines", "direction unknown", "direction unknown"),
    ],
)
def test_every_metric_has_a_way_to_get_worse(metric, up, down):
    assert verdict(row(100, metric), row(110, metric)) == up
    assert verdict(row(100, metric), row(90, metric)) == down
    assert verdict(row(100, metric), row(100, metric)) == "same"
    for new, said in ((110, up), (90, down)):
        failing = {"worse", "changed", "direction unknown"}
        assert failed(compare([row(100, metric)], [row(new, metric)], 0.03)) == (said in failing)


def test_the_unit_helps_where_the_metric_does_not():
    assert direction(row(1.0, "p50", unit="us")) == "lower"
    assert direction(row(1.0, "rate", unit="img/s")) == "higher"


def test_tolerance_is_a_share_of_the_old_value():
    assert verdict(row(200.0), row(206.0)) == "same"
    assert verdict(row(200.0), row(206.1)) == "worse"
    assert verdict(row(200.0), row(206.1), tolerance=0.05) == "same"
    assert verdict(row(1.00, "mfu"), row(0.97, "mfu")) == "same"
    assert verdict(row(1.00, "mfu"), row(0.969, "mfu")) == "worse"
    assert verdict(row(0, "launches"), row(1, "launches")) == "worse", "from nothing to something is no small change"
    assert verdict(row(402_784_000_000, "macs"), row(402_784_000_001, "macs"), tolerance=0.5) == "changed"


def test_overlapping_intervals_are_noise_and_apart_they_are_not():
    old = row(100.0, p20=95.0, p80=107.0)
    assert verdict(old, row(112.0, p20=106.0, p80=120.0)) == "within noise"
    assert verdict(old, row(112.0, p20=107.5, p80=120.0)) == "worse"
    assert verdict(old, row(90.0, p20=80.0, p80=94.0)) == "better"
    assert verdict(old, row(90.0, p20=80.0, p80=96.0)) == "within noise"
    assert verdict(old, row(112.0)) == "worse", "one interval says nothing about the other row"
    (line,) = compare([old], [row(112.0, p20=106.0, p80=120.0)], 0.03)
    assert "12.0%" in table([line])
    assert "within noise (95..107, 106..120)" in table([line])


def test_rows_are_joined_by_all_that_names_them():
    names = [
        {"suite": "unet"},
        {"case": "upper"},
        {"provider": "eager"},
        {"metric": "us"},
        {"config": {"batch": 4}},
        {"op": "geglu"},
        {"dtype": "float16"},
    ]
    for other in names:
        lines = compare([row(1.0)], [{**row(100.0), **other}], 0.03)
        assert [line.verdict for line in lines] == ["only in old", "only in new"], other
    one, other = row(1.0, config={"batch": 4, "rung": "bf16"}), row(9.0, config={"rung": "bf16", "batch": 4})
    assert verdict(one, other) == "worse", "the order of a config's fields is no difference"


def test_what_a_benchmark_found_out_while_setting_up_is_no_setting():
    one, other = ({"batch": 4, "error": e, "prepare_s": 10 * e, "bound": 0.1, "ops": {"geglu": e}} for e in (0.1, 0.2))
    assert verdict(row(1.0, config=one), row(2.0, config=other)) == "worse"


def test_later_rows_replace_earlier_ones():
    (line,) = compare([row(50.0), row(100.0)], [row(500.0), row(101.0)], 0.03)
    assert (line.old, line.new, line.verdict) == (100.0, 101.0, "same")


def test_different_devices_are_never_compared():
    (line, new) = compare([row(100.0)], [row(500.0, device="other card")], 0.03)
    assert (line.verdict, line.new, new.verdict) == ("other device", None, "only in new")
    assert "was card, now other card: not compared" in table([line])
    assert not failed([line, new])
    assert failed([line, new], strict=True)


def test_threads_count_on_a_cpu_only():
    cpu = {"driver": None, "device": "cpu"}
    assert compare([row(1.0, **cpu)], [row(5.0, **{**cpu, "threads": 2})], 0.03)[0].verdict == "other device"
    assert verdict(row(1.0), row(5.0, threads=2)) == "worse"


def test_a_projection_is_not_held_against_a_measurement():
    assert verdict(row(1.0), row(5.0, projection=True)) == "projection"
    assert verdict(row(1.0, projection=True), row(5.0)) == "projection"
    assert verdict(row(1.0, projection=True), row(5.0, projection=True)) == "worse"


def test_rows_of_one_side_are_listed_and_fail_when_strict():
    old, new = [row(1.0), row(2.0, case="gone")], [row(1.0), row(3.0, case="fresh")]
    lines = compare(old, new, 0.03)
    assert [(line.row["case"], line.verdict) for line in lines] == [
        ("lower", "same"),
        ("gone", "only in old"),
        ("fresh", "only in new"),
    ]
    assert not failed(lines)
    assert failed(lines, strict=True)
    assert not failed(compare([row(1.0)], new, 0.03), strict=True), "what only the new file has is no loss"


def test_what_could_not_be_measured_again():
    lines = compare([row(1.0)], [row(None, why="out of memory")], 0.03)
    assert "not measured (out of memory)" in table(lines)
    assert (failed(lines), failed(lines, strict=True)) == (False, True)
    never = compare([row(None)], [row(None)], 0.03)
    assert (failed(never, strict=True), table(never).count("same (not measured)")) == (False, 1)


def test_a_config_is_shown_without_what_is_nested():
    assert config_text(row(1.0, config={"batch": 16, "unet": {"a": 1}, "rung": "bf16"})) == "batch=16 rung=bf16"


GOOD = json.dumps(row(1.0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD[:-20], "not JSON"),
        ("[1, 2]", "wanted a JSON object with a suite"),
        ('{"case": "lower"}', "wanted a JSON object with a suite"),
        (GOOD.replace('"case": "lower", ', ""), "field 'case' is None"),
        (GOOD.replace('"value": 1.0', '"value": "fast"'), "field 'value' is 'fast'"),
        (GOOD.replace('"value": 1.0', '"value": NaN'), "field 'value' is nan"),
        (GOOD.replace('"value": 1.0', '"value": true'), "field 'value' is True"),
        (GOOD.replace('"value": 1.0', '"worth": 1.0'), "a metric, but no value"),
    ],
)
def test_a_damaged_line_is_named(line, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_without_a_metric_are_kept_by_read_and_left_out_of_the_comparison(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"suite": "frontier", "case": "teacher", "fid": 3.0}\n')
    rows = read(path)
    assert rows == [{"suite": "frontier", "case": "teacher", "fid": 3.0}]
    assert compare(rows, rows, 0.03) == []
    assert parse(GOOD, "here") == row(1.0)


def run(*arguments):
    return run_command(main, *arguments)


def test_the_command_prints_a_table_and_fails_on_a_worse_row(tmp_path):
    a, b, c = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    a.write_text(json.dumps(row(100.0, config={"batch": 4})))
    b.write_text(json.dumps(row(110.0, config={"batch": 4})) + '\n{"suite": "frontier"}\n')
    c.write_text("{\n")
    good, bad, damaged = run(a, a), run(a, b), run(a, c)
    assert (good.returncode, bad.returncode, damaged.returncode) == (0, 1, 2)
    assert "lower  ours      ms      batch=4  100  110  +10.0%  worse" in bad.stdout
    assert "1 rows: 1 worse" in bad.stdout
    assert f"{b}: 1 rows without a metric are not compared" in bad.stdout
    assert damaged.stderr == f"error: {c}:1: not JSON (Expecting property name enclosed in double quotes at column 2)\n"
    assert run(a, b, "--tolerance", "0.2").returncode == 0
    assert run(a, tmp_path / "no.jsonl").stderr == f"error: {tmp_path / 'no.jsonl'}: no such file of rows\n"
    assert "--tolerance is 3.0, wanted a share" in run(a, b, "--tolerance", "3").stderr
