"""Packing: streams of any length into rows of one length, by best fit over a bounded buffer.

A row starts with the piece that has waited longest, so that nothing starves, and is filled with
the longest piece that still fits. Media spans are never cut, unless one is longer than a row.
"""

from bisect import bisect_right, insort
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from mmpt.stream import Span, Stream
from mmpt.vocab import END, Modality

R = TypeVar("R", bound=Hashable)
_NAMES = [modality.name.lower() for modality in Modality]


class Piece(NamedTuple, Generic[R]):
    """A stream that fits a row, and where to read it again."""

    reference: R
    stream: Stream


@dataclass
class PackReport:
    """What packing did since the start: plain counts, so that it is a part of the state."""

    rows: int = 0
    capacity: int = 0  # ids that these rows could hold
    pieces: int = 0
    cut: int = 0  # documents that were longer than a row
    ids: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_NAMES, 0))

    @property
    def fill(self) -> float:
        """The share of the rows that holds ids, not padding."""
        return sum(self.ids.values()) / self.capacity if self.capacity else 0.0

    def shares(self) -> dict[str, float]:
        """Modality -> its share of all ids."""
        total = max(sum(self.ids.values()), 1)
        return {name: count / total for name, count in self.ids.items()}


class Packer(Generic[R]):
    """A buffer of pieces from which rows are taken; the choice depends on nothing else."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.report = PackReport()
        self._pieces: dict[int, Piece[R]] = {}  # by age, oldest first
        self._by_length: list[tuple[int, int]] = []  # (length, -age), sorted
        self._age = 0

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def residue(self) -> list[R]:
        """References of the pieces that wait, oldest first: adding them restores the packer."""
        return [piece.reference for piece in self._pieces.values()]

    def add(self, piece: Piece[R]) -> None:
        """Put a piece of at most `length` ids into the buffer."""
        assert 0 < len(piece.stream) <= self.length
        self._pieces[self._age] = piece
        insort(self._by_length, (len(piece.stream), -self._age))
        self._age += 1

    def row(self) -> list[Stream]:
        """Take the streams of the next row out of the buffer."""
        assert self._pieces, "an empty packer has no row"
        streams = [self._take(next(iter(self._pieces)))]
        room = self.length - len(streams[0])
        while (place := bisect_right(self._by_length, (room, 1)) - 1) >= 0:
            streams.append(self._take(-self._by_length[place][1]))
            room -= len(streams[-1])
        self.report.rows += 1
        self.report.capacity += self.length
        for stream in streams:
            counts = np.bincount(stream.modality, minlength=len(Modality)).tolist()
            for name, count in zip(_NAMES, counts, strict=True):
                self.report.ids[name] += count
        self.report.pieces += len(streams)
        return streams

    def _take(self, age: int) -> Stream:
        piece = self._pieces.pop(age)
        place = bisect_right(self._by_length, (len(piece.stream), -age)) - 1
        del self._by_length[place]
        return piece.stream


def split(stream: Stream, length: int) -> list[Stream]:
    """Cut a stream into consecutive pieces of at most `length` ids, whole spans wherever possible.

    Cuts fall at a text position or between spans. A span longer than a row is cut all the same;
    its pieces are plain ids, which no span table lists.
    """
    if len(stream) <= length:
        return [stream]
    free = np.ones(len(stream) + 1, dtype=bool)
    for span in stream.spans:
        begin, end = _bounds(span)
        free[begin + 1 : end] = False
    pieces, begin = [], 0
    while begin < len(stream):
        limit = min(begin + length, len(stream))
        choices = np.flatnonzero(free[begin + 1 : limit + 1])
        end = begin + 1 + int(choices[-1]) if len(choices) else limit
        pieces.append(_slice(stream, begin, end))
        begin = end
    return pieces


def _slice(stream: Stream, begin: int, end: int) -> Stream:
    inside = [
        span._replace(start=span.start - begin)
        for span in stream.spans
        if begin <= _bounds(span)[0] and _bounds(span)[1] <= end
    ]
    place = slice(begin, end)
    return Stream(stream.ids[place], stream.modality[place], stream.loss_weight[place], inside)


def _bounds(span: Span) -> tuple[int, int]:
    """The first id of a span's header, and one past its end id."""
    assert span.modality in END
    return span.start - span.num_header, span.start + span.length + 1
