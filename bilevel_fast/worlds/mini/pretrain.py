"""Train the mini world's teacher, from nothing, or measure it: `python -m bilevel_fast.worlds.mini.pretrain`."""

from bilevel_fast.base import errors
from bilevel_fast.models.family import MINI_INDEX
from bilevel_fast.worlds.mini.materials import WORLD
from bilevel_fast.worlds.mini.world import WORDS
from bilevel_fast.worlds.pretrain import PretrainConfig, Subject, command

SUBJECT = Subject(WORLD, WORDS, MINI_INDEX)


def main() -> None:
    command(SUBJECT, PretrainConfig())


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
