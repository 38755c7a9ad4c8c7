"""The folder of a run: one of an earlier release, and one that is not free."""

from dataclasses import replace

import pytest

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, write_json
from bilevel_fast.runs import session
from bilevel_fast.runs.config import VOLATILE, preset
from bilevel_fast.runs.ranks import run_folder
from bilevel_fast.scale.team import ALONE


@pytest.mark.situation
def test_a_run_of_an_earlier_release_goes_on(tmp_path):
    """A release has a setting that the run's release had not: `--resume` goes on, unless the setting is given."""
    config = replace(preset("mini"), out=tmp_path / "run")
    with run_folder(config, VOLATILE, {}, ALONE) as place:
        saved = read_json(place.config)
    del saved["lower"]["weights"]
    write_json(place.config, saved)
    again = replace(config, resume=True)
    heavier = replace(config.lower, weights=replace(config.lower.weights, output=0.5))
    refused = run_folder(replace(again, lower=heavier), VOLATILE, {}, ALONE)
    with pytest.raises(UserError, match=r"lower\.weights\.output was absent, is 0\.5"), refused:
        pass
    with run_folder(again, VOLATILE, {}, ALONE) as place:
        assert read_json(place.config)["lower"]["weights"] == config.to_dict()["lower"]["weights"]


@pytest.mark.situation
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_cannot_be_the_runs_is_refused_before_the_work(tmp_path, resume):
    """--out holds something else, or no run to resume: said before a model is read or pruned, which takes minutes."""
    (tmp_path / "mine.txt").write_text("mine")
    config = replace(preset("smoke"), out=tmp_path, resume=resume, teacher=tmp_path / "read later, and missing")
    with pytest.raises(UserError, match="no run to resume" if resume else "already holds a run"):
        session.run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
