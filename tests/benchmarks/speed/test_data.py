"""The benchmark of data: every rival gives all images once per round, the same pictures, and rows say what they are."""

import itertools
import multiprocessing
import sys
import time

import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("torchvision")
pytest.importorskip("webdataset")

from benchmarks import rows as benchmark_rows
from benchmarks.speed import data
from bilevel_fast.data.pictures import Framing

SETTINGS = data.Settings(images=10, resolution=64, batch=5, rounds=2, samples=32, workers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def entries(folder):
    return data.make_images(folder, SETTINGS.images)


def test_every_rival_gives_the_same_pictures(folder, entries, monkeypatch):
    """Crops are random; what is left of the average colour tells the pictures apart."""
    monkeypatch.setattr(data, "Framing", lambda side, seed: Framing(side, seed, crop="center"))
    tar = data.make_tars(folder, entries, SETTINGS.workers)
    rivals = {
        "dali": data.through_dali(folder, entries, SETTINGS, 2),
        "loader": data.through_loader(folder, entries, SETTINGS, 2),
        "webdataset": data.through_webdataset(tar, SETTINGS, 2),
    }
    means = {}
    for name, batches in rivals.items():
        for _ in range(2):  # two epochs: the second is like the first
            found = torch.cat(list(itertools.islice(batches, 2)))
            assert (found.shape, found.dtype) == ((10, 3, 64, 64), torch.float32), name
            assert found.min() >= -1
            assert found.max() <= 1
            means[name] = found.mean(dim=(2, 3))
    torch.testing.assert_close(means["loader"], means["dali"], rtol=0, atol=0.1)
    order = torch.cdist(means["webdataset"], means["dali"]).argmin(dim=1)
    assert sorted(order.tolist()) == list(range(10)), "each picture once, in another order"
    between = torch.cdist(means["dali"], means["dali"]) + torch.eye(10)
    assert between.min() > 0.1, "or the averages would not tell the pictures apart"


@pytest.fixture
def threads():
    """The benchmark chooses torch's threads, for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_rows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    flags = [
        "--images",
        "10",
        "--resolution",
        "64",
        "--batch",
        "5",
        "--rounds",
        "2",
        "--samples",
        "32",
        "--workers",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["data", *flags, "--out", str(out)])
    data.main()
    rows = [benchmark_rows.parse(line, "row") for line in out.read_text().splitlines()]
    assert len(benchmark_rows.latest(rows)) == len(rows) == 12, "rows of one run have keys of their own"
    rivals = ["dali", data.LOADER, "webdataset", "cache", "cache, drawn"]
    wall, cores = ([row for row in rows if row["metric"] == metric] for metric in ("img_per_s", "img_per_core_s"))
    assert [row["provider"] for row in wall] == [row["provider"] for row in cores] == rivals
    assert [row["images"] for row in wall] == [10, 10, 10, 30, 30], "of 32 samples in whole batches"
    ratios = {row["metric"]: row["value"] for row in rows if row["provider"] == data.RATIO}
    assert ratios["ratio"] == pytest.approx(wall[0]["value"] / wall[1]["value"], rel=0.6)
    assert set(ratios) == {"ratio", "core_ratio"}, "which at this size is a few ticks of the clock"
    for row in rows:
        assert 0 <= row["p20"] <= 1.001 * row["value"] <= 1.01 * row["p80"]
        assert (row["suite"], row["config"]) == ("data", {"batch": 5, "workers": 2})
        assert row["case"] == ("latents 64" if row["provider"].startswith("cache") else "images 64")
        assert {"device", "torch", "commit", "date", "load_before", "load_after", "kilobytes"} <= set(row)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*rivals, data.RATIO, "load average"))


def test_the_time_of_workers_counts():
    """A worker that computes while this process sleeps."""
    worker = multiprocessing.get_context("fork").Process(target=_compute)
    before = data.cpu_seconds()
    worker.start()
    try:
        while data.cpu_seconds() - before < 0.2:
            assert worker.is_alive(), "it ended, and nobody had seen it"
            time.sleep(0.02)
    finally:
        worker.kill()
        worker.join()


def _compute() -> None:
    deadline = time.process_time() + 30
    while time.process_time() < deadline:
        pass
