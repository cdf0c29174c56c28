"""Where the ids of one stream stand on three axes, while it is read and written id by id."""

import numpy as np

from mmpt.decode.sampling import Grammar
from mmpt.model.rotary import GRIDS
from mmpt.vocab import Vocabulary


class Axes:
    """Follows a stream as `Grammar` does, and counts as `axes_of` does on packed rows."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._grammar = Grammar(vocabulary)
        self._next = 0  # the number of the next id, or of the first code of the open grid
        self.last = (0, 0, 0)  # where the last id stands

    def push(self, token: int) -> tuple[int, int, int]:
        """Take the next id; returns where it stands."""
        grid = self._grid()
        self.last = self.ahead(1)[0]
        self._grammar.push(token)
        if grid is None:
            self._next += 1
        elif not self._grammar.in_codes:
            self._next += max(grid)
        return self.last

    def read(self, ids: np.ndarray) -> None:
        """Take many ids (n,)."""
        for token in ids.tolist():
            self.push(token)

    def ahead(self, count: int) -> list[tuple[int, int, int]]:
        """Where the next ids will stand; they are all codes of the open span, or it is one id."""
        grid = self._grid()
        if grid is None:
            return [(number, number, number) for number in range(self._next, self._next + count)]
        places = np.arange(self._grammar.place, self._grammar.place + count)
        time, row, column = (self._next + at for at in np.unravel_index(places, grid))
        return list(zip(time.tolist(), row.tolist(), column.tolist(), strict=True))

    def _grid(self) -> tuple[int, ...] | None:
        """Of the open span, where codes are to come that stand in one."""
        if self._grammar.in_codes and self._grammar.open in GRIDS:
            return (1,) * (3 - len(self._grammar.sizes)) + tuple(self._grammar.sizes)
        return None
