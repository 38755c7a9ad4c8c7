"""The card of an exported model: what is known of it and from where, and a header that the Hub takes."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from bilevel_fast import api
from bilevel_fast.base.files import read_json, write_json
from bilevel_fast.exporting.card import licence_of
from bilevel_fast.runs.config import preset
from mini_folder import make_mini_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What `train` leaves: a student, the record of what it erased, the settings and the numbers."""
    path = tmp_path_factory.mktemp("card") / "first"
    path.mkdir()
    api.prune(make_mini_folder(path.parent / "teacher"), "uniform", 0.7, out=path / "student")
    config = replace(preset("smoke"), teacher=path.parent / "teacher", erase=("waves",), seed=3, twin=False)
    write_json(path / "config.json", config.to_dict())
    rows = {"teacher": {"concept_hit": 1.0, "fid": 3.25}, "student": {"concept_hit": 0.0, "fid": 3.5}}
    write_json(path / "summary.json", {"quality": rows})
    concepts = [{"name": "waves", "bank": "concepts", "weight": 1.0}]
    record = {"format": "bilevel_fast.concepts", "version": 1, "teacher": "t", "concepts": concepts}
    write_json(path / "concepts.json", record)
    return path


def card(folder: Path, out: Path) -> tuple[ModelCard, str]:
    text = (api.export(folder, "folder", out=out).path / "README.md").read_text()
    return ModelCard(text), text


def test_what_the_run_knows(tmp_path, run):
    found, text = card(run / "student", tmp_path / "out")
    assert found.data.library_name == "diffusers"
    assert found.data.pipeline_tag == "text-to-image"
    assert found.data.license == "unknown"
    assert "* Licence: unknown: the base model's folder does not say it; ask the base's" in text
    assert "# first: student\n" in text
    assert "* 'waves': upper steps of the run, one after every 4 lower ones, target 'guidance'\n" in text
    command = "    python -m bilevel_fast.train --preset smoke --seed 3 --teacher teacher/ --erase waves --no-twin\n"
    assert command in text
    assert "    student             0.000            3.500\n" in text
    assert str(run.parent) not in text  # no path of this machine
    assert "of the dense UNet's (latents 8x8, 12 text tokens" in text
    assert "heads of self-attention" in text


def test_a_licence_of_the_base_is_handed_on(tmp_path, run):
    teacher = run.parent / "teacher"
    (teacher / "README.md").write_text(
        "---\ntags:\n- x\nlicense: other\nlicense_name: 'own'\n---\n# A model\nlicense: no\n"
    )
    try:
        found, text = card(run / "student", tmp_path / "out")
    finally:
        (teacher / "README.md").unlink()
    assert (found.data.license, found.data.license_name) == ("other", "own")
    assert "* Licence: other" in text


def test_an_edit_of_the_weights(tmp_path):
    api.erase(make_mini_folder(tmp_path / "model"), ["in the style of waves"], out=tmp_path / "edited")
    _, text = card(tmp_path / "edited", tmp_path / "out")
    assert "* 'in the style of waves' became '': an edit of the weights, uce" in text
    assert "Nothing: there is no record of a run beside the model." in text
    assert "nothing is cut" in text
    assert (tmp_path / "out/erased.json").read_bytes() == (tmp_path / "edited/erased.json").read_bytes()
    assert read_json(tmp_path / "out/model_index.json")["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_a_model_that_says_where_it_came_from(tmp_path):
    teacher = make_mini_folder(tmp_path / "teacher")
    for name, said in (("owner/model", "its configs say 'owner/model'"), ("/home/me", "not named in its folder")):
        write_json(teacher / "unet/config.json", read_json(teacher / "unet/config.json") | {"_name_or_path": name})
        student = api.prune(teacher, "uniform", 0.7, out=tmp_path / f"student{len(name)}").path
        assert f"* Base model: {said}\n" in card(student, tmp_path / f"out{len(name)}")[1]


def test_the_licence_is_read_off_the_header_alone(tmp_path):
    for text, found in (
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ('---\nlicense: "mit" # so\r\nlicense_link: a/b\n---\n', {"license": "mit", "license_link": "a/b"}),
        ("# License\n\nlicense: mit\n", {}),
        ("---\nlicense:\n- mit\n---\n", {}),
    ):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(tmp_path) == found, text
    assert licence_of(tmp_path / "none") == {}
