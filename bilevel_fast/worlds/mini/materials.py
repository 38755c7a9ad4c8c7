"""The mini world as `worlds.World`."""

from pathlib import Path

from bilevel_fast.worlds.drawn import DrawnWorld
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.world import COLORS, OBJECTS, SCENES, STYLES, is_held_out, labels, render

WORLD = DrawnWorld(
    name="mini",
    styles=STYLES,
    scenes=SCENES,
    heads={"object": len(OBJECTS), "color": len(COLORS), "style": len(STYLES)},
    render=lambda scenes, seed, indices: render(*labels(scenes), seed, indices),
    is_held_out=is_held_out,
    teacher=TEACHER,
    probe_file=Path(__file__).parent / "weights" / "probe" / "model.safetensors",
)
