"""Keys and values of committed ids, so that a pass over new ids need not repeat the old ones.

A cache remembers the `Layout` of its slots beside the keys, and new ids attend by the same
predicate as in training: prompts of different lengths are rows padded on either side, and nothing
here knows about it. A pass either appends its ids (a commit) or only reads (denoising). What is
kept carries no gradient; what only reads gets its own.

Legend: B batch, T new ids, S slots, K key-value heads, W head width.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mmpt.model.layout import Layout


class LayerCache:
    """One layer's keys and values (B, K, S, W), in buffers that double when they are full."""

    def __init__(self) -> None:
        self.append = True
        self._length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Past keys and values, and behind them those of the new ids, kept if `append`."""
        if not self.append:
            return self._join(self._keys, k), self._join(self._values, v)
        stop = self._length + k.shape[2]
        self._keys, self._values = (
            self._write(buffer, new, stop) for buffer, new in ((self._keys, k), (self._values, v))
        )
        self._length = stop
        return self._keys[:, :, :stop], self._values[:, :, :stop]

    def _join(self, buffer: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        if buffer is None:
            return new
        return torch.cat((buffer[:, :, : self._length].to(new.dtype), new), dim=2)

    def _write(self, buffer: torch.Tensor | None, new: torch.Tensor, stop: int) -> torch.Tensor:
        new = new.detach()
        if buffer is None or stop > buffer.shape[2]:
            size = stop if buffer is None else 2 * stop  # exact at first: a prompt may be all
            grown = new.new_zeros(*new.shape[:2], size, new.shape[3])
            if buffer is not None:
                grown[:, :, : self._length] = buffer[:, :, : self._length]
            buffer = grown
        buffer[:, :, self._length : stop] = new
        return buffer


class KVCache:
    """All layers' keys and values, and the layout of their slots (None while empty)."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.layout: Layout | None = None

    def __len__(self) -> int:
        return 0 if self.layout is None else self.layout.document.shape[1]

    def begin(self, *, append: bool) -> None:
        """Say whether the pass that starts now commits its ids or only reads."""
        for layer in self.layers:
            layer.append = append

    def commit(self, layout: "Layout") -> None:
        """Record the layout of ids whose keys the layers have just appended."""
        self.layout = layout if self.layout is None else self.layout.cat(layout)
