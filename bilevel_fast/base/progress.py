"""Progress bars: on a terminal only, of the first of several processes only, with log lines above them."""

import contextlib
import os
import sys
from typing import Any, Self, TextIO


class Bar:
    """A progress bar on a terminal, and nothing at all elsewhere. It is drawn from the first call until `close`.

    Lines that are logged meanwhile to the terminal stand above it, whole.

    Args:
        unit: What is counted.
        stream: Standard error if None.
        layout: Of tqdm (`bar_format`); None is its own.
    """

    def __init__(self, unit: str, stream: TextIO | None = None, layout: str | None = None) -> None:
        self._unit, self._stream, self._layout = unit, stream or sys.stderr, layout
        self._bar: Any = None
        self._around = contextlib.ExitStack()
        self.shown = self._stream.isatty() and os.environ.get("RANK", "0") == "0"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, done: int, total: int, note: str | None = None) -> None:
        """Move the bar.

        Args:
            done: Of `total`; where the bar begins at the first call, of which the time that is left is no part.
            note: Stands at its end; the one before it stays if None.
        """
        if not self.shown:
            return
        if self._bar is None:
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._around.enter_context(logging_redirect_tqdm())
            self._bar = tqdm(
                total=total, initial=done, unit=self._unit, file=self._stream, dynamic_ncols=True,
                bar_format=self._layout, delay=sys.float_info.min,
            )  # fmt: skip
            # Not drawn before here: a bar that Ctrl-C finds on the screen is one that is closed.
            self._around.callback(self._bar.close)
            self._bar.refresh()
        if note is not None:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)
        if note is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is, and the cursor at the beginning of a line."""
        self._around.close()
