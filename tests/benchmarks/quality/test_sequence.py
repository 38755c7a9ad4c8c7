"""Styles erased one after the other: the runs, their rows, and the table."""

from dataclasses import replace

from benchmarks.quality import sequence
from benchmarks.quality.lab import read
from bilevel_fast.runs.config import preset


def brief(teacher):
    smoke = preset("smoke")
    return replace(
        smoke,
        teacher=teacher,
        lower=replace(smoke.lower, steps=2, batch=2, warmup=0),
        upper=replace(smoke.upper, every=1, batch=2, warmup=0),
        mini=replace(smoke.mini, images=16, bank=2, bank_steps=2, judge_erased=2, judge_kept=1, judge_steps=2),
    )


def test_the_second_run_goes_on_from_the_first_and_erases_both(small_teacher, tmp_path, capsys):
    rows, start = tmp_path / "rows.jsonl", brief(small_teacher)
    settings = sequence.Settings(styles=("waves", "mosaic"), cache=tmp_path / "runs")
    sequence.measure(settings, start, rows)
    found = {row["case"]: row for row in read(rows)}
    assert list(found) == ["waves", "waves, then mosaic", "both at once"]
    assert [set(row["hits"]) for row in found.values()] == [{"waves"}, {"waves", "mosaic"}, {"waves", "mosaic"}]
    assert [(row["lower_steps"], row["upper_steps"]) for row in found.values()] == [(2, 2), (4, 4), (4, 4)]
    assert (tmp_path / "runs/waves-mosaic-0/then/student").is_dir()
    before = capsys.readouterr().err
    assert before.count("seed 0") == 3
    sequence.measure(settings, start, rows)
    assert len(read(rows)) == 3, "what has a row is not run again"


def test_the_table_says_what_was_kept():
    quality = {"content_kept": 1.0, "other_style_hit": 0.9, "relative_hit": 0.8, "fid": 4.0}
    rows = [
        {"case": "noto", "seed": seed, "hits": {"noto": 0.2 * seed}, **quality, "lower_steps": 120, "upper_steps": 30}
        for seed in (0, 1)
    ]
    rows.append(rows[0] | {"case": "both at once", "hits": {"noto": 0.5, "twemoji": 0.25}})
    first, second = sequence.table(rows).splitlines()[2:]
    assert first.startswith(
        "| noto, seeds 0, 1 | 0.10 ± 0.10 | kept | 1.00 ± 0.00 | 0.90 ± 0.00 | 0.80 ± 0.00 | 4.0 ± 0.0 |"
    )
    assert second == "| both at once, seed 0 | 0.50 | 0.25 | 1.00 | 0.90 | 0.80 | 4.0 | 120 / 30 |"


def test_two_styles_are_wanted(command):
    code, _, err = command(sequence.main, "--styles", "noto")
    assert code == 2
    assert "--styles names 1 styles, wanted 2" in err
