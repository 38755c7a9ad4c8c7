import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.worlds.judge import Samples
from bilevel_fast.worlds.likeness import likeness
from bilevel_fast.worlds.mini.materials import WORLD
from bilevel_fast.worlds.mini.world import STYLES, Scene, labels, render

STYLE = STYLES.index("waves")
SCENES = tuple(Scene(i % 6, (i // 2) % 6, STYLE) for i in range(8))


@pytest.fixture(scope="module")
def probe():
    return WORLD.probe


def drawn(scenes, shown=None, seed=0):
    """Drawings of `shown`, which claim to be of `scenes`."""
    return Samples(render(*labels(shown or scenes), seed=seed, indices=range(len(scenes))), tuple(scenes))


def test_a_model_against_itself(probe):
    found = likeness(drawn(SCENES), drawn(SCENES), [STYLE], probe)
    assert found.cp == 0
    assert found.style == pytest.approx(100)


def test_another_style_is_told_by_both(probe):
    plain = [Scene(s.object, s.color, 0) for s in SCENES]
    again, gone = (likeness(x, drawn(SCENES), [STYLE], probe) for x in (drawn(SCENES, seed=1), drawn(SCENES, plain)))
    assert gone.cp == 100, "every image shows less clearly what was asked"
    assert again.style > 90
    assert gone.style < 50
    assert (again.plain, gone.plain) == (0, 100)


def test_a_style_in_the_place_of_another_is_not_plain(probe):
    swapped = [Scene(s.object, s.color, STYLES.index("mosaic")) for s in SCENES]
    found = likeness(drawn(SCENES, swapped), drawn(SCENES), [STYLE], probe)
    assert (found.cp, found.plain) == (100, 0)
    assert found.style < 50


def test_the_other_direction_scores_nothing(probe):
    """The reference shows another style, the images what was asked: no prompt has become less clear."""
    plain = [Scene(s.object, s.color, 0) for s in SCENES]
    assert likeness(drawn(SCENES), drawn(SCENES, plain), [STYLE], probe).cp == 0


def test_object_and_color_count_as_well(probe):
    recolored = [Scene(s.object, (s.color + 1) % 6, STYLE) for s in SCENES]
    found = likeness(drawn(SCENES, recolored), drawn(SCENES), [STYLE], probe)
    assert found.cp == 100
    assert found.style > 60, "the style has stayed"


def test_only_erased_styles_are_compared(probe):
    kept = [Scene(s.object, s.color, 0) for s in SCENES]
    both, before = (drawn([*SCENES, *kept]) for _ in range(2))
    both.images[8:] = torch.randn(both.images[8:].shape).clamp(-1, 1)
    assert likeness(both, before, [STYLE], probe).cp == 0


def test_bad_input_is_one_line(probe):
    with pytest.raises(UserError, match="drawn for different prompts"):
        likeness(drawn(SCENES), drawn(SCENES[::-1]), [STYLE], probe)
    with pytest.raises(UserError, match="none of the samples"):
        likeness(drawn(SCENES), drawn(SCENES), [0], probe)
