"""The drawn world: an image is a function of its scene, seed and index, and shows what its caption says."""

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.worlds.mini.world import COLORS, OBJECTS, SCENES, STYLES, Scene, caption, labels, parse, render


def draw(scenes: list[Scene], seed: int = 0, start: int = 0) -> torch.Tensor:
    return render(*labels(scenes), seed, range(start, start + len(scenes)))


def test_images_are_in_range_and_light_around_the_object():
    images = draw(list(SCENES))
    assert images.shape == (216, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    corners = images[:, :, ::31, ::31]
    assert corners.mean() > 0.5


def test_an_image_depends_on_its_own_index_only():
    scenes = [SCENES[(17 * i) % len(SCENES)] for i in range(50)]
    together = draw(scenes)
    again = render(*labels(scenes[::-1]), 0, range(49, -1, -1)).flip(0)
    assert torch.equal(together, again)
    alone = torch.cat([draw([scene], start=i) for i, scene in enumerate(scenes)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("style", range(len(STYLES)))
def test_seed_and_index_change_the_drawing(style):
    scene = [Scene(3, 0, style)]
    image = draw(scene)
    assert (draw(scene, start=1) - image).abs().mean() > 0.01
    assert (draw(scene, seed=1) - image).abs().mean() > 0.01


@pytest.mark.parametrize("field", ["object", "color", "style"])
def test_each_label_changes_the_drawing(field):
    """Same jitter, one label changed: the drawings differ, whatever the other labels are."""
    scenes = [Scene(**{**vars(scene), field: value}) for scene in SCENES[::7] for value in range(6)]
    images = render(*labels(scenes), 0, [i // 6 for i in range(len(scenes))]).unflatten(0, (-1, 6)).flatten(2)
    apart = torch.cdist(images, images, p=1) / images.shape[-1] + torch.eye(6)
    assert apart.min() > 0.02


def test_the_object_has_its_colour():
    """A plain disc is one flat colour in the middle, and the six are far apart."""
    middles = draw([Scene(0, c, 0) for c in range(6)])[:, :, 12:20, 12:20]
    assert middles.std(dim=(2, 3)).max() < 1e-6
    apart = torch.pdist(middles.mean(dim=(2, 3)))
    assert apart.min() > 0.3


def test_styles_mark_the_background_too():
    """In a strip that no object reaches, only the plain style is flat."""
    strip = draw([Scene(0, c, s) for s in range(6) for c in range(6)])[:, :, :3, :].unflatten(0, (6, 6))
    busy = strip.std(dim=(3, 4)).mean(dim=(1, 2))
    assert busy[0] < 1e-6
    assert busy[1:].min() > 0.03


def test_captions_name_every_scene_once_and_parse_back():
    captions = [scene.caption for scene in SCENES]
    assert len(set(captions)) == 216 == len(OBJECTS) * len(COLORS) * len(STYLES)
    assert [parse(text) for text in captions] == list(SCENES)
    assert caption("star", "red") == "a red star"
    assert caption("ring", "orange", "line art") == "an orange ring in the style of line art"
    assert parse("  A Red  star ") == Scene(OBJECTS.index("star"), COLORS.index("red"), 0)


def test_a_caption_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"'a red sta' describes no scene.*did you mean 'a red star'"):
        parse("a red sta")
