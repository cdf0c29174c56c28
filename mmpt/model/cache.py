"""Keys and values of committed ids, so that a pass over new ids need not repeat the old ones.

A cache remembers the `Layout` of its slots beside the keys, and new ids attend by the same
predicate as in training: prompts of different lengths are rows padded on either side, and nothing
here knows about it. A pass either appends its ids (a commit) or only reads (denoising). What is
kept carries no gradient; what only reads gets its own.

Legend: B batch, T new ids, S slots, K key-value heads, W head width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mmpt.model.layout import Layout


ROOM = 64  # free slots of caches that are joined


class LayerCache:
    """One layer's keys and values, in a buffer (B, K, 2, S, W) that doubles when it is full."""

    def __init__(self) -> None:
        self.append = True
        self._length = 0
        self._slots: torch.Tensor | None = None

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Past keys and values (B, K, S, W), and behind them the new ones, kept if `append`."""
        if not self.append:
            return self._join(0, k), self._join(1, v)
        start, stop = self._length, self._length + k.shape[2]
        slots = self._with_room(k, stop)
        slots[:, :, 0, start:stop], slots[:, :, 1, start:stop] = k.detach(), v.detach()
        self._length = stop
        return slots[:, :, 0, :stop], slots[:, :, 1, :stop]

    def push(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep one more key and value (B, K, W) of each row; returns all, as `extend` does."""
        slots = self._with_room(k, self._length + 1)
        torch.stack((k, v), dim=2, out=slots.select(3, self._length))
        self._length += 1
        keys, values = slots.narrow(3, 0, self._length).unbind(2)
        return keys, values

    def select(self, rows: slice | torch.Tensor) -> "LayerCache":
        """Of some rows; a slice of them is a view, only to be read."""
        chosen = LayerCache()
        chosen._length = self._length
        chosen._slots = None if self._slots is None else self._slots[rows]
        return chosen

    @classmethod
    def beside(cls, parts: Sequence["LayerCache"], firsts: Sequence[int]) -> "LayerCache":
        """Rows of all parts, of each from slot `first` on; they end together, zeros stand before.

        There is room for some more.
        """
        joined, buffers = cls(), [part._slots for part in parts]
        joined._length = max(p._length - first for p, first in zip(parts, firsts, strict=True))
        kept = [slots for slots in buffers if slots is not None]
        assert len(kept) == len(parts)  # rows of a prefix have ids
        shape = (sum(map(len, kept)), *kept[0].shape[1:3], joined._length + ROOM, kept[0].shape[4])
        joined._slots, row = kept[0].new_zeros(shape), 0
        for part, first, slots in zip(parts, firsts, kept, strict=True):
            start = joined._length - (part._length - first)
            place = joined._slots[row : row + len(slots), :, :, start : joined._length]
            place.copy_(slots[:, :, :, first : part._length])
            row += len(slots)
        return joined

    @property
    def length(self) -> int:
        """How many slots are filled."""
        return self._length

    def shorten(self, length: int) -> None:
        """Keep the first `length` slots; the others are free again."""
        self._length = length

    def _join(self, which: int, new: torch.Tensor) -> torch.Tensor:
        if self._slots is None:
            return new
        return torch.cat((self._slots[:, :, which, : self._length].to(new.dtype), new), dim=2)

    def _with_room(self, new: torch.Tensor, stop: int) -> torch.Tensor:
        slots = self._slots
        if slots is None or stop > slots.shape[3]:
            size = stop if slots is None else 2 * stop  # exact at first: a prompt may be all
            grown = new.new_zeros(*new.shape[:2], 2, size, new.shape[-1])
            if slots is not None:
                grown[:, :, :, : self._length] = slots[:, :, :, : self._length]
            self._slots = slots = grown
        return slots


class KVCache:
    """All layers' keys and values, and the layout of their slots."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self._layouts: list[Layout] = []  # of each commit, joined when somebody asks
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def layout(self) -> "Layout | None":
        """Of all slots; None while there are none."""
        if len(self._layouts) > 1:
            self._layouts = [self._layouts[0].cat(*self._layouts[1:])]
        return self._layouts[0] if self._layouts else None

    def select(self, rows: slice | torch.Tensor) -> "KVCache":
        """A cache of some rows, in any order and number; of a slice it is only to be read."""
        chosen = KVCache(0)
        chosen.layers = [layer.select(rows) for layer in self.layers]
        layout = self.layout
        if layout is not None:
            chosen.commit(layout.select(rows))
        return chosen

    @classmethod
    def beside(cls, parts: Sequence["KVCache"], firsts: Sequence[int]) -> "KVCache":
        """As that of layers, for who knows himself which slots are seen: there is no layout."""
        joined = cls(0)
        layers = zip(*(part.layers for part in parts), strict=True)
        joined.layers = [LayerCache.beside(each, firsts) for each in layers]
        return joined

    def begin(self, *, append: bool) -> None:
        """Say whether the pass that starts now commits its ids or only reads."""
        for layer in self.layers:
            layer.append = append

    def commit(self, layout: "Layout") -> None:
        """Record the layout of ids whose keys the layers have just appended."""
        self._layouts.append(layout)
        self._length += layout.document.shape[1]

    def retract(self, kept: torch.Tensor) -> None:
        """Of the last T ids keep those of bool (B, T): nobody sees the others any more.

        Slots at the end that no row keeps are free again.
        """
        layout, width = self.layout, kept.shape[1]
        assert layout is not None
        column = torch.arange(1, width + 1, device=kept.device)
        self._length += int((kept.any(0) * column).max()) - width
        document = layout.document.clone()
        document[:, -width:].masked_fill_(~kept, -1)
        self._layouts = [replace(layout, document=document).first(self._length)]
        for layer in self.layers:
            layer.shorten(self._length)
