"""The judge counts right: fed with drawings whose content is known, it must report exactly that."""

from types import SimpleNamespace

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.bank import Concept, anchor_for
from bilevel_fast.models.folder import load_folder
from bilevel_fast.worlds.judge import Samples
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.materials import WORLD
from bilevel_fast.worlds.mini.world import COLORS, OBJECTS, SCENES, STYLES, Scene, is_held_out, labels, render

POINTILLISM, WAVES = STYLES.index("pointillism"), STYLES.index("waves")


erased_scenes, kept_scenes = WORLD.erased_scenes, WORLD.kept_scenes


def judge(images: torch.Tensor, scenes: list[Scene], style: int = POINTILLISM) -> SimpleNamespace:
    return SimpleNamespace(**WORLD.quality(Samples(images, tuple(scenes)), [style]))


def draw(scenes: list[Scene], **change: int) -> torch.Tensor:
    """Drawings of the scenes, all with the same change, such as another style."""
    shown = [Scene(**{**vars(scene), **change}) for scene in scenes]
    return render(*labels(shown), seed=5, indices=range(len(shown)))


def test_perfect_drawings_with_the_concept_still_there():
    scenes = erased_scenes([POINTILLISM], 36) + kept_scenes([POINTILLISM], 36)
    quality = judge(draw(scenes), scenes)
    assert quality.concept_hit > 0.97
    assert min(quality.content_kept, quality.other_style_hit, quality.object, quality.color) > 0.97
    assert quality.fid < 5.0  # few samples of 64 features: perfect drawings are not at 0


def test_a_style_replaced_by_plain_counts_as_suppressed_and_its_content_as_kept():
    erased, kept = erased_scenes([POINTILLISM], 24), kept_scenes([POINTILLISM], 36)
    images = torch.cat([draw(erased, style=0), draw(kept)])
    quality = judge(images, [*erased, *kept])
    assert quality.concept_hit == 0.0
    assert quality.content_kept > 0.95


def test_wrong_content_is_seen():
    erased, kept = erased_scenes([POINTILLISM], 36), kept_scenes([POINTILLISM], 36)
    perfect = judge(torch.cat([draw(erased), draw(kept)]), [*erased, *kept])
    images = torch.cat([draw(erased, object=0), draw(kept, color=1)])
    quality = judge(images, [*erased, *kept])
    assert quality.content_kept == pytest.approx(1 / len(OBJECTS), abs=0.05)
    assert quality.color == pytest.approx(1 / len(COLORS), abs=0.05)
    assert quality.object > 0.95
    assert quality.fid > 3 * perfect.fid


def test_judged_prompts_never_occur_in_a_bank_and_are_balanced():
    held_out = [scene for scene in SCENES if is_held_out(scene) and scene.style == WAVES]
    assert len(held_out) == 12
    for field, count in (("object", len(OBJECTS)), ("color", len(COLORS))):
        assert sorted(getattr(s, field) for s in held_out) == sorted(list(range(count)) * 2)
    assert set(erased_scenes([WAVES], 36)) == set(held_out)
    assert len(erased_scenes([POINTILLISM, WAVES], 5)) == 10
    assert {s.style for s in kept_scenes([WAVES], 3)} == set(range(len(STYLES))) - {WAVES}


def test_training_images_leave_the_erased_style_out():
    folder = load_folder(TEACHER)
    source, vae = WORLD.drawn_source(folder, [WAVES], 180, seed=3), folder.vae
    captions = [source.captions(i)[0] for i in range(len(source))]
    assert len(set(captions)) == 180
    assert not any("waves" in caption for caption in captions)
    mean = source.moments([7], [0])[:, : vae.channels]
    scene = next(s for s in SCENES if s.caption == captions[7])
    assert WORLD.probe.accuracy(vae.decode(mean), [scene]).shares["style"] == 1.0


def test_anchors_are_captions_of_the_plain_style():
    for scene in SCENES:
        if scene.style:
            anchor = anchor_for(scene.caption, Concept(f"in the style of {STYLES[scene.style]}"))
            assert anchor == Scene(scene.object, scene.color, 0).caption


def test_refusals():
    with pytest.raises(UserError, match="style 'pontilism' does not exist; did you mean 'pointillism'"):
        WORLD.numbers(["pontilism"])
    with pytest.raises(UserError, match="'plain' cannot be erased"):
        WORLD.erased_concepts(["plain"])
    with pytest.raises(UserError, match="none is left"):
        WORLD.numbers(STYLES)
