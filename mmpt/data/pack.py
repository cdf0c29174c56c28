"""Packing: streams of any length into rows of one length.

`BestFit`, the default, starts a row with the piece that has waited longest, so that nothing
starves, and fills it with the longest that still fit; `FirstFit` fills it with the oldest that fit;
`OnePiece` does not pack. All three cut only documents longer than a row. `Concatenation` fills row
after row and cuts where a row ends. Nothing cuts a media span, unless it is longer than a row.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmpt.flat import Piece, Streams
from mmpt.stream import Span, Stream
from mmpt.vocab import NUM_GRID_SIZES, Modality

_NAMES = [modality.name.lower() for modality in Modality]
_HEADERS = np.array([1 + NUM_GRID_SIZES.get(modality, 0) for modality in Modality])
_AGES = 48  # bits of an age


@dataclass
class PackReport:
    """What packing did since the start: plain counts, so that it is a part of the state."""

    rows: int = 0
    capacity: int = 0  # ids that these rows could hold
    pieces: int = 0
    cut: int = 0  # documents that are in more rows than one
    over_quota: int = 0  # pieces that alone break a quota, each in a row of its own
    ids: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_NAMES, 0))

    @property
    def fill(self) -> float:
        """The share of the rows that holds ids, not padding."""
        return sum(self.ids.values()) / self.capacity if self.capacity else 0.0

    def shares(self) -> dict[str, float]:
        """Modality -> its share of all ids."""
        total = max(sum(self.ids.values()), 1)
        return {name: count / total for name, count in self.ids.items()}

    @classmethod
    def sum(cls, reports: Iterable["PackReport"]) -> "PackReport":
        """The report of several packers together."""
        total = cls()
        for report in reports:
            for name in ("rows", "capacity", "pieces", "cut", "over_quota"):
                setattr(total, name, getattr(total, name) + getattr(report, name))
            for name, count in report.ids.items():
                total.ids[name] += count
        return total


class Packer(ABC):
    """A buffer of pieces from which rows are taken; the choice depends on nothing else.

    buffer: pieces to choose from. quotas: medium -> the most ids of it in a row; what would break
    one waits, and what breaks it alone gets a row of its own. `taken`: ids of the oldest piece that
    rows have already.
    """

    def __init__(
        self, length: int, *, buffer: int = 256, quotas: Mapping[Modality, int] | None = None
    ) -> None:
        self.length, self.buffer = length, buffer
        self.taken = 0
        self._report = PackReport()
        self._counts: list[Sequence[int]] = []  # of pieces in rows, which the report lacks
        self._quotas = [(quotas or {}).get(modality, length) for modality in Modality]
        self._limited = bool(quotas)
        self._pieces: dict[int, Piece] = {}  # by their keys, oldest first
        self._age = 0

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def hungry(self) -> bool:
        """Whether the next row should wait for more pieces, as long as there are any."""
        return len(self._pieces) < self.buffer

    @property
    def residue(self) -> list[Any]:
        """References of the pieces that wait, oldest first: adding them restores the packer."""
        return [piece.reference for piece in self._pieces.values()]

    @property
    def report(self) -> PackReport:
        """What was packed so far."""
        for name, *counts in zip(_NAMES, *self._counts, strict=True):
            self._report.ids[name] += sum(counts)
        self._counts.clear()
        return self._report

    @report.setter
    def report(self, report: PackReport) -> None:
        self._report = report
        self._counts.clear()

    def split(self, document: Piece) -> list[Piece]:
        """The pieces as which a document is added."""
        return cut(document, self.length)

    def add(self, piece: Piece) -> None:
        """Put a piece of `split` into the buffer."""
        self._add(piece)

    def row(self) -> list[Piece]:
        """Take the pieces of the next row out of the buffer; none when it is empty."""
        pieces = self._fill() if self._pieces else []
        if pieces:
            self._report.rows += 1
            self._report.capacity += self.length
            self._report.pieces += len(pieces)
            self._counts += [piece.counts for piece in pieces]
        return pieces

    def _add(self, piece: Piece) -> int:
        # sorted, keys stand by size, and the oldest of a size stands last
        key = (piece.end - piece.begin << _AGES) - self._age
        self._age += 1
        self._pieces[key] = piece
        return key

    def _take(self, key: int) -> Piece:
        return self._pieces.pop(key)

    @abstractmethod
    def _fill(self) -> list[Piece]:
        """Take the pieces of a row out of the buffer, which is not empty."""


class Fitting(Packer):
    """Starts a row with the oldest piece, and fills it with those that still fit."""

    @abstractmethod
    def _next(self, room: int, left: list[int] | None) -> int | None:
        """The key of the next piece of a row with this room, and this left of each quota."""

    def _fill(self) -> list[Piece]:
        pieces = [self._take(next(iter(self._pieces)))]
        left = _left(self._quotas, pieces[0]) if self._limited else None
        if left and min(left) < 0:
            self._report.over_quota += 1
            return pieces
        room = self.length - (pieces[0].end - pieces[0].begin)
        while room and (key := self._next(room, left)) is not None:
            pieces.append(piece := self._take(key))
            room -= piece.end - piece.begin
            if left:
                left = _left(left, piece)
        return pieces

    def _fits(self, key: int, left: list[int] | None) -> bool:
        return left is None or min(_left(left, self._pieces[key])) >= 0


class BestFit(Fitting):
    """The longest piece that fits, the oldest of equals."""

    def __init__(
        self, length: int, *, buffer: int = 256, quotas: Mapping[Modality, int] | None = None
    ) -> None:
        super().__init__(length, buffer=buffer, quotas=quotas)
        self._keys: list[int] = []  # sorted

    def add(self, piece: Piece) -> None:
        """Put a piece of `split` into the buffer."""
        insort(self._keys, self._add(piece))

    def _take(self, key: int) -> Piece:
        del self._keys[bisect_left(self._keys, key)]
        return self._pieces.pop(key)

    def _next(self, room: int, left: list[int] | None) -> int | None:
        place = bisect_right(self._keys, room << _AGES)
        while place:
            place -= 1
            if left is None or self._fits(self._keys[place], left):
                return self._keys[place]
        return None


class FirstFit(Fitting):
    """The oldest piece that fits."""

    def _next(self, room: int, left: list[int] | None) -> int | None:
        for key in self._pieces:
            if key <= room << _AGES and self._fits(key, left):
                return key
        return None


class OnePiece(Fitting):
    """One piece a row."""

    @property
    def hungry(self) -> bool:
        """Whether it is empty."""
        return not self._pieces

    def _next(self, room: int, left: list[int] | None) -> int | None:
        return None


class Concatenation(Packer):
    """Documents one after another, cut where a row ends.

    A cut falls at a text position or between spans; where the span at the row's end is whole, the
    row ends before it, in padding. Quotas are not kept.
    """

    @property
    def hungry(self) -> bool:
        """Whether less than a row waits."""
        waiting = sum(piece.size for piece in self._pieces.values())
        return waiting - self.taken < self.length

    def split(self, document: Piece) -> list[Piece]:
        """The document as it is."""
        return [document]

    def _fill(self) -> list[Piece]:
        pieces: list[Piece] = []
        room = self.length
        while self._pieces and room:
            key, document = next(iter(self._pieces.items()))
            begin = document.begin + self.taken
            end = _last_cut(document, begin, begin + room)
            if end is None and pieces:
                break
            end = end or begin + room
            pieces.append(_part(document, begin, end))
            room -= end - begin
            self._report.cut += self.taken == 0 and end < document.end
            self.taken = end - document.begin
            if end == document.end:
                self._take(key)
                self.taken = 0
        return pieces


PACKERS = {
    "best-fit": BestFit,
    "first-fit": FirstFit,
    "concatenation": Concatenation,
    "none": OnePiece,
}


def split(stream: Stream, length: int) -> list[Stream]:
    """`cut` for a single stream."""
    if len(stream) <= length:
        return [stream]
    [document] = Streams.of([stream]).pieces([None])
    return list(map(stream_of, cut(document, length)))


def stream_of(piece: Piece) -> Stream:
    """A piece as a stream of its own."""
    tokens = piece.streams.tokens[piece.begin : piece.end]
    spans = [
        Span(start - piece.begin, length, Modality(modality), tuple(grid))
        for start, length, modality, *grid in piece.streams.spans[
            piece.first_span : piece.last_span
        ].tolist()
    ]
    return Stream(
        tokens["ids"].copy(),
        tokens["modality"].astype(np.int8),
        tokens["loss_weight"].copy(),
        spans,
    )


def cut(document: Piece, length: int) -> list[Piece]:
    """Cut into consecutive pieces of at most `length` ids, whole spans wherever possible.

    Cuts fall at a text position or between spans. A span longer than a row is cut all the same;
    its pieces are plain ids, which no span table lists.
    """
    pieces, begin = [], document.begin
    while begin < document.end:
        end = _last_cut(document, begin, begin + length) or begin + length
        pieces.append(_part(document, begin, end))
        begin = end
    return pieces


def _last_cut(document: Piece, begin: int, limit: int) -> int | None:
    """The last place in (begin, limit] that is inside of no span; None when there is none."""
    if document.end <= limit:
        return document.end
    firsts, ends = _bounds(document)
    place = int(np.searchsorted(firsts, limit)) - 1
    if place < 0 or ends[place] <= limit:
        return limit
    return int(firsts[place]) if firsts[place] > begin else None


def _part(document: Piece, begin: int, end: int) -> Piece:
    if begin == document.begin and end == document.end:
        return document
    firsts, ends = _bounds(document)
    first, last = np.searchsorted(firsts, begin), np.searchsorted(ends, end, side="right")
    modality = document.streams.tokens["modality"][begin:end]
    return document._replace(
        begin=begin,
        end=end,
        first_span=document.first_span + int(first),
        last_span=document.first_span + int(max(first, last)),
        counts=np.bincount(modality, minlength=len(Modality)).tolist(),
    )


def _bounds(document: Piece) -> tuple[np.ndarray, np.ndarray]:
    """int64 (S,): the first id of every span's header, and one past its end id."""
    spans = document.streams.spans[document.first_span : document.last_span]
    start, length, modality = spans[:, :3].T
    return start - _HEADERS[modality], start + length + 1


def _left(left: list[int], piece: Piece) -> list[int]:
    return [most - count for most, count in zip(left, piece.counts, strict=True)]
