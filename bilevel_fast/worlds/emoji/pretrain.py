"""Train the emoji world's teacher, from the mini world's UNet, or measure it.

python -m bilevel_fast.worlds.emoji.pretrain --out FOLDER
"""

from bilevel_fast.base import errors
from bilevel_fast.models.family import EMOJI_INDEX
from bilevel_fast.worlds import mini
from bilevel_fast.worlds.emoji.drawings import WORDS
from bilevel_fast.worlds.emoji.materials import WORLD
from bilevel_fast.worlds.pretrain import PretrainConfig, Subject, command

SUBJECT = Subject(WORLD, WORDS, EMOJI_INDEX, start=mini.TEACHER)


def main() -> None:
    command(SUBJECT, PretrainConfig(steps=3400, lr=8e-4, decay=0.2, rephrase=0.2, every=250), per_scene=4)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
