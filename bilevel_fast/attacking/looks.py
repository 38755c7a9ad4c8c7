"""What a search over tokens says on its way, and what such searches share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.text_encoder import TokenReader


@dataclass(frozen=True)
class Look:
    """Where a search stands.

    Attributes:
        step: Iterations, generations or steps so far.
        texts: A prompt for each that was given, as somebody would type it.
        losses: What the search makes small, of each.
    """

    step: int
    texts: list[str]
    losses: list[float]


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Without gradients for its parameters; afterwards those that had some want them again."""
    wanted = [p for p in network.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def check_room(reader: TokenReader, tokens: int, behind: Sequence[int] = (), text: str = "") -> None:
    """Refuse a search for more tokens than the text encoder reads, with those of a prompt behind them.

    Raises:
        UserError: Says how many there may be.
    """
    room = reader.length - 2 - len(behind)
    if not 1 <= tokens <= room:
        where = f" before the {len(behind)} of {text!r}" if behind else ""
        raise UserError(f"{tokens} tokens are searched for{where}; the text encoder has room for 1 to {room}")


def check_least(flags: dict[str, tuple[float, float]]) -> None:
    """Refuse settings below their least values: `{name: (value, least)}`.

    Raises:
        UserError: Names the first.
    """
    for name, (value, least) in flags.items():
        if not value >= least:  # NaN as well
            raise UserError(f"--{name} is {value}; wanted {least:g} or more")
