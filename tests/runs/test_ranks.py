"""The folder of a run whose release had fewer settings."""

from dataclasses import replace

import pytest

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, write_json
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
