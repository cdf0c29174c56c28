"""Progress on stderr: a bar on a terminal, a plain line now and then in a file or a pipe.

`TQDM_DISABLE=1` turns it off.
"""

import os
import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between two lines where stderr is no terminal


class Bar(tqdm):
    """tqdm, with whole lines instead of a bar that is drawn anew where nobody could see that.

    Such a line comes at the beginning, at the end and at most every SECONDS.
    """

    def __init__(self, *arguments: Any, disable: bool = False, **options: Any):
        self.plain = not sys.stderr.isatty() or os.environ.get("TERM") == "dumb"
        self.said: tuple[float, int | float | None] = (0.0, None)  # when, and at which number
        shape = {"ncols": 0, "miniters": 1} if self.plain else {"dynamic_ncols": True}
        disable = disable or bool(os.environ.get("TQDM_DISABLE"))
        super().__init__(*arguments, disable=disable, **shape, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or say the line if it is time to."""
        if not self.plain:
            return bool(super().display(msg, pos))
        when, number = self.said
        if number is None or time.monotonic() - when >= SECONDS:
            self._say()
        return True

    def close(self) -> None:
        """End with what was reached."""
        if self.plain and not self.disable:
            if self.said[1] != self.n:
                self._say()
            self.sp = None  # tqdm then draws no more
        super().close()

    def _say(self) -> None:
        self.said = time.monotonic(), self.n
        self.fp.write(f"{self}\n")
        self.fp.flush()
