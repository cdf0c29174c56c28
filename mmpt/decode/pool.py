"""Steps of many answers in one pass: rows of different prefixes that come and go at any step.

What a lane pushes waits until one of the lanes is asked for what comes next; then all that wait are
computed together. So answers that step in turn share their passes, each is written by the code that
writes it alone, and one that begins later joins at the next step.

Legend: B rows of all lanes, S slots, D width, V candidates.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple
from weakref import ref

import torch

from mmpt.decode.prefix import Prefix
from mmpt.model.cache import KVCache
from mmpt.model.step import Stepper
from mmpt.model.transformer import Decoder


class Wanted(NamedTuple):
    """What the next ids are drawn from: `spread` makes it of hidden states (n, D).

    Lanes of one sample whose keys are equal spread alike, and do it together; None: alone.
    """

    key: Hashable
    spread: Callable[[torch.Tensor], torch.Tensor]


class _Pushed(NamedTuple):
    """Of each row of a lane: the id, its medium, and whether it takes part."""

    ids: torch.Tensor
    media: Sequence[int]
    live: Sequence[bool]


class Lane:
    """A prefix that steps, alone or in a pool; behind the first push only through its lane."""

    def __init__(self, prefix: Prefix, wanted: Wanted, pool: "Pool | None") -> None:
        self.prefix, self.wanted, self.pushed = prefix, wanted, None
        self.spread: torch.Tensor | None = wanted.spread(prefix.hidden)
        self._pool, self._joined = pool, False

    def push(
        self, ids: torch.Tensor, media: Sequence[int], live: Sequence[bool], wanted: Wanted
    ) -> None:
        """Go on with ids (samples,), as `Prefix.push`; nothing is computed before `take`."""
        self.wanted, self.spread = wanted, None
        self.pushed = _Pushed(ids, media, live)
        if self._pool is not None and not self._joined:
            self._pool.join(self)
            self._joined = True

    def take(self) -> torch.Tensor:
        """What `wanted.spread` gives (samples, V) behind the last push."""
        if self.spread is None and self._pool is not None:
            self._pool.flush()
        elif self.spread is None:
            assert self.pushed is not None
            self.prefix.push(*self.pushed)
            self.spread = self.wanted.spread(self.prefix.hidden)
        if self.spread is None:
            raise RuntimeError("the pass that this answer shared with others failed")
        return self.spread


class Pool:
    """Rows of all lanes in one cache. For one thread; a lane that nobody keeps falls out."""

    def __init__(self, model: Decoder, step: Stepper) -> None:
        self._step, self._device = step, model.embedding.device
        self._new: list[ref[Lane]] = []
        self._clear()

    @classmethod
    def of(cls, model: Decoder) -> "Pool | None":
        """None where the model has options that single steps do not know."""
        step = Stepper.of(model)
        return None if step is None else cls(model, step)

    def join(self, lane: Lane) -> None:
        """Take the lane's rows over at the next flush."""
        self._new.append(ref(lane))

    @torch.inference_mode()
    def flush(self) -> None:
        """One pass over all that was pushed."""
        try:
            self._flush()
        except Exception:
            self._clear()  # its rows are no longer whole; who asks for them is told
            raise

    def _clear(self) -> None:
        self._lanes: list[tuple[ref[Lane], int]] = []  # with their numbers of rows, in order
        self._new = []
        self._cache = KVCache(0)
        self._length = torch.zeros(0, dtype=torch.int64, device=self._device)
        self._bias: torch.Tensor | None = None  # (B, S): -inf where a row has no id

    def _flush(self) -> None:
        self._arrange()
        lanes = [(lane(), rows) for lane, rows in self._lanes]
        parts = [_rows_of(lane, rows, self._device) for lane, rows in lanes]
        ids = torch.cat([part.ids for part in parts])
        media = [medium for part in parts for medium in part.media]
        live = [on for part in parts for on in part.live]
        on = torch.tensor(live, device=self._device)
        self._remember(on[:, None], whole=all(live))
        bias = None if self._bias is None else self._bias[:, None, None]
        hidden = self._step(ids, media, self._length, self._cache, bias)
        self._length = self._length + on
        alike: dict[Hashable, list[tuple[Lane, list[int]]]] = {}
        start = 0
        for number, (lane, rows) in enumerate(lanes):
            if lane is not None and lane.pushed is not None:
                key, single = lane.wanted.key, lane.prefix.num_samples == 1
                key = (number,) if key is None or not single else (rows, key)
                alike.setdefault(key, []).append((lane, list(range(start, start + rows))))
                lane.pushed = None
            start += rows
        for members in alike.values():
            _spread(members, hidden)

    def _arrange(self) -> None:
        """Let new lanes in, and those that are gone out."""
        new = [lane for each in self._new if (lane := each()) is not None]
        gone = sum(rows for lane, rows in self._lanes if lane() is None)
        # moving all rows costs more than a few that nobody needs
        if not new and 4 * gone <= len(self._length):
            return
        kept, start = [], 0
        for lane, rows in self._lanes:
            kept += range(start, start + rows) if lane() is not None else []
            start += rows
        parts = [lane.prefix.release() for lane in new]
        if kept:
            which = torch.tensor(kept, device=self._device)
            bias = None if self._bias is None else self._bias[which]
            parts.insert(0, (self._cache.select(which), self._length[which], bias))
        self._lanes = [each for each in self._lanes if each[0]() is not None]
        self._lanes += [(ref(lane), len(lane.prefix.length)) for lane in new]
        self._new = []
        self._join(parts)

    def _join(self, parts: Sequence[tuple[KVCache, torch.Tensor, torch.Tensor | None]]) -> None:
        firsts = [_first(bias) for _, _, bias in parts]
        caches = [cache for cache, _, _ in parts]
        self._length = torch.cat([length for _, length, _ in parts])
        self._cache = KVCache.beside(caches, firsts)
        num_slots = max(layer.length for layer in self._cache.layers)
        bias = torch.full(
            (len(self._length), num_slots),
            -torch.inf,
            dtype=self._step.attention_dtype,
            device=self._device,
        )
        start = 0
        for first, (cache, length, own) in zip(firsts, parts, strict=True):
            rows, size = slice(start, start + len(length)), cache.layers[0].length - first
            bias[rows, num_slots - size :] = 0.0 if own is None else own[:, first:]
            start = rows.stop
        self._bias = bias if bool(bias.any()) else None

    def _remember(self, live: torch.Tensor, *, whole: bool) -> None:
        if whole and self._bias is None:
            return
        if self._bias is None:
            size = (len(live), self._cache.layers[0].length)
            self._bias = torch.zeros(size, dtype=self._step.attention_dtype, device=self._device)
        column = torch.zeros_like(live, dtype=self._bias.dtype).masked_fill(~live, -torch.inf)
        self._bias = torch.cat((self._bias, column), dim=1)


def _rows_of(lane: Lane | None, rows: int, device: torch.device) -> _Pushed:
    """What a lane pushed, for both branches; nothing where it is gone or does not step now."""
    if lane is None or lane.pushed is None:
        return _Pushed(
            torch.zeros(rows, dtype=torch.int64, device=device), [0] * rows, [False] * rows
        )
    ids, media, live = lane.pushed
    if not lane.prefix.guided:
        return lane.pushed
    return _Pushed(torch.cat((ids, ids)), [*media, *media], [*live, *live])


def _spread(members: Sequence[tuple[Lane, list[int]]], hidden: torch.Tensor) -> None:
    """Of lanes that want the same, or of one. A guided one has its other branch behind it."""
    first, own = members[0]
    if len(members) == 1:
        first.spread = first.wanted.spread(hidden[own[0] : own[-1] + 1])
        return
    rows = [number[branch] for branch in range(len(own)) for _, number in members]
    if rows != list(range(len(hidden))):
        hidden = hidden[torch.tensor(rows, device=hidden.device)]
    spread = first.wanted.spread(hidden)
    for place, (lane, _) in enumerate(members):
        lane.spread = spread[place : place + 1]


def _first(bias: torch.Tensor | None) -> int:
    """The first slot (of S) that any row sees."""
    return 0 if bias is None else int((bias == 0).any(0).int().argmax())
