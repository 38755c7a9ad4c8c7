"""Train a probe of the mini world: python -m bilevel_fast.worlds.mini.probe --out FILE.safetensors"""

from bilevel_fast.base import errors
from bilevel_fast.worlds.mini.materials import WORLD
from bilevel_fast.worlds.probe import command


def main() -> None:
    command(WORLD)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
