"""The emoji world: drawings of real studios, their captions, and the licences without which there are none."""

import json
import shutil
import sys

import pytest
import torch

from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError
from bilevel_fast.worlds.emoji import make_atlas
from bilevel_fast.worlds.emoji.drawings import (
    ATLAS,
    NAMES,
    SCENES,
    STUDIOS,
    Scene,
    caption,
    drawings,
    is_held_out,
    labels,
    parse,
    read_atlas,
    render,
)
from bilevel_fast.worlds.emoji.materials import WORLD
from bilevel_fast.worlds.emoji.settings import Emoji
from bilevel_fast.worlds.judge import Samples

FEW = Emoji(judge_erased=48, judge_kept=24)
OWL = NAMES.index("owl")
NOTO, TWEMOJI, CONTRAST = (STUDIOS.index(name) for name in ("noto", "twemoji", "contrast"))


def draw(scenes, seed=0, indices=None):
    return render(*labels(scenes), seed=seed, indices=indices or range(len(scenes)))


def test_an_image_is_a_function_of_its_scene_seed_and_index():
    scenes = [Scene(OWL, NOTO), Scene(3, 0), Scene(OWL, CONTRAST)]
    images = draw(scenes, seed=4, indices=[7, 8, 9])
    assert images.shape == (3, 3, 32, 32)
    assert -1 <= images.min() < images.max() <= 1
    torch.testing.assert_close(draw(scenes[1:2], seed=4, indices=[8]), images[1:2], rtol=0, atol=1e-6)
    assert not torch.equal(draw(scenes[:1], seed=4, indices=[8]), images[:1])
    assert not torch.equal(draw(scenes[:1], seed=5, indices=[7]), images[:1])


def test_the_sheets_hold_a_drawing_in_every_cell_and_no_two_are_the_same():
    sheets = drawings()
    assert sheets.shape == (len(STUDIOS), len(NAMES), 4, 64, 64)
    coverage = sheets[:, :, 3].mean((2, 3))
    assert (coverage > 0.08).all()
    assert (coverage < 0.95).all()
    flat = sheets.flatten(0, 1).flatten(1)
    assert torch.pdist(flat).min() > 1


def test_the_contrast_studio_is_black_and_white_and_the_others_are_not():
    colour = drawings()[:, :, :3]
    spread = (colour.amax(2) - colour.amin(2)).mean((1, 2, 3))
    assert spread[CONTRAST] < 1e-6
    assert spread[:CONTRAST].min() > 0.05


def test_captions_and_paraphrases_lead_back_to_their_scene():
    assert caption("owl") == "an owl"
    assert caption("owl", "twemoji") == "an owl in the style of twemoji"
    assert Scene(OWL, TWEMOJI).paraphrases == ("an owl as twemoji draws it", "a twemoji drawing of an owl")
    for scene in SCENES:
        texts = (scene.caption, *scene.paraphrases)
        assert {parse(text) for text in texts} == {scene}
        assert len(set(texts)) == (3 if scene.studio else 1)
    with pytest.raises(UserError, match="'an olw' describes no scene of the emoji world; did you mean 'an owl'"):
        parse("an olw")


def test_a_third_of_the_names_is_held_out_of_every_bank():
    assert {scene.name for scene in SCENES if is_held_out(scene)} == set(range(0, 24, 3))
    prompts, anchors = WORLD.known(NOTO)
    assert len(prompts) == 16
    assert anchors[0] == prompts[0].removesuffix(" in the style of noto")
    assert not set(prompts) & {scene.caption for scene in WORLD.erased_scenes([NOTO], 96)}


def test_what_draws_like_an_erased_studio_is_counted_by_itself():
    scenes = WORLD.asked([NOTO], FEW)
    images = draw([s if s.studio != TWEMOJI else Scene(s.name, CONTRAST) for s in scenes])
    found = WORLD.quality(Samples(images, tuple(scenes)), [NOTO])
    assert found["concept_hit"] > 0.97
    assert found["relative_hit"] == pytest.approx(0.5, abs=0.03)  # emojione alone is as asked
    assert found["other_style_hit"] == pytest.approx(0.75, abs=0.03)
    assert list(found) == [
        "concept_hit", "content_kept", "other_style_hit", "relative_hit", "name", "fid",
    ]  # fmt: skip
    assert WORLD.shares([NOTO], FEW)["relative_hit"] == 2 * FEW.judge_kept


def test_a_style_without_relatives_has_no_such_column():
    scenes = WORLD.asked([CONTRAST], FEW)
    assert "relative_hit" not in WORLD.quality(Samples(draw(scenes), tuple(scenes)), [CONTRAST])


@pytest.mark.situation
def test_an_atlas_without_its_licences(tmp_path):
    """Drawings whose owners nobody names: refused."""
    shutil.copytree(ATLAS, tmp_path / "atlas")
    read_atlas(tmp_path / "atlas")
    text = (tmp_path / "atlas" / "ATTRIBUTION.md").read_text()
    (tmp_path / "atlas" / "ATTRIBUTION.md").write_text(text.replace("`twemoji.png`", "some"))
    with pytest.raises(UserError, match=r"ATTRIBUTION.md does not say whose drawings twemoji.png has"):
        read_atlas(tmp_path / "atlas")
    (tmp_path / "atlas" / "ATTRIBUTION.md").unlink()
    with pytest.raises(UserError, match=r"does not say whose drawings fluent.png has"):
        read_atlas(tmp_path / "atlas")


@pytest.mark.situation
def test_a_damaged_atlas(tmp_path):
    """A sheet of drawings is cut short, or has another size: named, and what was wanted."""
    shutil.copytree(ATLAS, tmp_path / "atlas")
    sheet = tmp_path / "atlas" / "noto.png"
    sheet.write_bytes(sheet.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"noto.png cannot be read"):
        read_atlas(tmp_path / "atlas")
    shutil.copy(ATLAS / "noto.png", sheet)
    from PIL import Image

    Image.new("RGBA", (64, 64)).save(sheet)
    with pytest.raises(UserError, match=r"noto.png has \(64, 64\) pixels; wanted \(192, 512\)"):
        read_atlas(tmp_path / "atlas")


def packages(folder, licence="MIT"):
    """Published sets as npm unpacks them: a square in each cell, its colour left open in one set."""
    for number, name in enumerate(make_atlas.SETS.values()):
        place = folder / name
        place.mkdir(parents=True)
        paint = "currentColor" if name == make_atlas.SETS["contrast"] else f"rgb({50 * number},90,0)"
        icons = {each: {"body": f'<rect x="4" y="4" width="8" height="8" fill="{paint}"/>'} for each in NAMES[1:]}
        held = {"icons": icons, "aliases": {NAMES[0]: {"parent": NAMES[1]}}, "width": 16, "height": 16}
        (place / "icons.json").write_text(json.dumps(held))
        spdx = licence if name == "twemoji" else "MIT"
        info = {"name": name, "author": {"name": "somebody"}, "license": {"spdx": spdx, "url": "https://example.org"}}
        (place / "info.json").write_text(json.dumps(info))
        (place / "package.json").write_text('{"version": "1.0"}')
    return folder


def make(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["make_atlas", *map(str, flags)])
    return errors.run(make_atlas.main), capsys.readouterr().err


def test_an_atlas_from_its_packages(tmp_path, monkeypatch, capsys):
    code, said = make(monkeypatch, capsys, "--packages", packages(tmp_path / "sets"), "--out", tmp_path / "atlas")
    assert (code, said) == (0, "")
    sheets = read_atlas(tmp_path / "atlas")
    middle, corner = sheets[:, :, :, 32, 32], sheets[:, :, :, 4, 4]
    assert (middle[:, :, 3] == 1).all()
    assert (corner == 0).all()
    torch.testing.assert_close(middle[:, 0, 0], torch.tensor([0.0, 50, 100, 150, 0]) / 255)
    assert "[MIT](https://example.org)" in (tmp_path / "atlas" / "ATTRIBUTION.md").read_text()


@pytest.mark.situation
def test_drawings_that_may_not_be_shipped(tmp_path, monkeypatch, capsys):
    """A set of drawings is share-alike, or its licence is unknown: no atlas is made of it."""
    sets = packages(tmp_path / "sets", licence="CC-BY-SA-4.0")
    code, said = make(monkeypatch, capsys, "--packages", sets, "--out", tmp_path / "atlas")
    assert (code, said) == (2, "error: twemoji: licence CC-BY-SA-4.0; wanted one of MIT, Apache-2.0, CC-BY-4.0\n")
    assert not (tmp_path / "atlas" / "ATTRIBUTION.md").exists()
    shutil.rmtree(sets / "noto")
    code, said = make(monkeypatch, capsys, "--packages", sets, "--out", tmp_path / "atlas")
    assert (code, said) == (2, f"error: --packages {sets} has no noto/icons.json\n")
