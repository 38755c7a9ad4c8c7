"""`python -m benchmarks.speed.ranks` by one rank, and what two of them send."""

import json

from benchmarks.speed import ranks
from ranked import Crew


def test_one_rank(command):
    code, out, err = command(ranks.main, "--images", 1, "--steps", 1)
    assert (code, err) == (0, "")
    row = json.loads(out)
    assert (row["ranks"], row["sent_mb"], row["metric"]) == (1, 0, "ms")
    assert row["value"] > 0
    assert command(ranks.main, "--steps", 0)[0] == 2


def test_two_ranks_send_half_a_gradient_and_half_the_weights(tmp_path):
    crew = Crew(2, "ranks", "--images", "1", "--steps", "1", log=tmp_path / "log", package="benchmarks.speed.")
    assert crew.wait() == [0, 0], crew.said()
    row = json.loads(crew.said())
    elements = 2_902_248  # of the student, fp32 both; rows are padded to an even number
    assert row["ranks"] == 2
    assert 1 <= row["sent_mb"] / (elements / 2 * (4 + 4) / 1e6) <= 1.05
    assert row["collectives_ms"] <= row["value"]
