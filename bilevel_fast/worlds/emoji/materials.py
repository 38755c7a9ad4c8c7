"""The emoji world as `worlds.World`."""

from pathlib import Path

from bilevel_fast.worlds.drawn import DrawnWorld
from bilevel_fast.worlds.emoji import TEACHER
from bilevel_fast.worlds.emoji.drawings import NAMES, RELATIVES, SCENES, STUDIOS, is_held_out, labels, render

WORLD = DrawnWorld(
    name="emoji",
    styles=STUDIOS,
    scenes=SCENES,
    heads={"name": len(NAMES), "style": len(STUDIOS)},
    render=lambda scenes, seed, indices: render(*labels(scenes), seed, indices),
    is_held_out=is_held_out,
    teacher=TEACHER,
    probe_file=Path(__file__).parent / "weights" / "probe" / "model.safetensors",
    captions=lambda scene: (scene.caption, *scene.paraphrases),
    relatives=RELATIVES,
)
