"""Packing: streams of any length into rows of one length.

`BestFit`, the default, starts a row with the piece that has waited longest, so that nothing
starves, and fills it with the longest that still fit; `FirstFit` fills it with the oldest that fit;
`OnePiece` does not pack. All three cut only documents longer than a row. `Concatenation` fills row
after row and cuts where a row ends. Nothing cuts a media span, unless it is longer than a row.
"""

from bisect import bisect_right, insort
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from mmpt.stream import Span, Stream
from mmpt.vocab import END, Modality

R = TypeVar("R", bound=Hashable)
_NAMES = [modality.name.lower() for modality in Modality]


class Piece(NamedTuple, Generic[R]):
    """A stream that waits, and where to read it again."""

    reference: R
    stream: Stream


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


class Packer(Generic[R]):
    """A buffer of pieces from which rows are taken; the choice depends on nothing else.

    buffer: pieces to choose from. quotas: medium -> the most ids of it in a row; what would break
    one waits, and what breaks it alone gets a row of its own. `taken`: ids of the oldest piece that
    rows have already.
    """

    def __init__(
        self, length: int, *, buffer: int = 256, quotas: Mapping[Modality, int] | None = None
    ) -> None:
        self.length, self.buffer = length, buffer
        self.report = PackReport()
        self.taken = 0
        self._quotas = [(quotas or {}).get(modality, length) for modality in Modality]
        self._limited = bool(quotas)
        self._pieces: dict[int, Piece[R]] = {}  # by age, oldest first
        self._age = 0

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def hungry(self) -> bool:
        """Whether the next row should wait for more pieces, as long as there are any."""
        return len(self._pieces) < self.buffer

    @property
    def residue(self) -> list[R]:
        """References of the pieces that wait, oldest first: adding them restores the packer."""
        return [piece.reference for piece in self._pieces.values()]

    def split(self, stream: Stream) -> list[Stream]:
        """The pieces as which a document is added."""
        return split(stream, self.length)

    def add(self, piece: Piece[R]) -> None:
        """Put a piece of `split` into the buffer."""
        assert len(piece.stream)
        self._pieces[self._age] = piece
        self._added(self._age)
        self._age += 1

    def row(self) -> list[Stream]:
        """Take the streams of the next row out of the buffer; none when it is empty."""
        streams = self._fill() if self._pieces else []
        if streams:
            self.report.rows += 1
            self.report.capacity += self.length
            self.report.pieces += len(streams)
            modality = np.concatenate([stream.modality for stream in streams])
            for name, count in zip(_NAMES, _counts(modality), strict=True):
                self.report.ids[name] += count
        return streams

    def _added(self, age: int) -> None:
        """A piece of this age came into the buffer."""

    def _removed(self, age: int) -> None:
        """A piece of this age is about to leave it."""

    def _next(self, room: int, left: list[int] | None) -> int | None:
        """The age of the next piece of a row with this room, and this left of each quota."""
        raise NotImplementedError

    def _fill(self) -> list[Stream]:
        streams = [self._take(next(iter(self._pieces)))]
        left = self._left(self._quotas, streams[0]) if self._limited else None
        if left and min(left) < 0:
            self.report.over_quota += 1
            return streams
        room = self.length - len(streams[0])
        while room and (age := self._next(room, left)) is not None:
            streams.append(self._take(age))
            room -= len(streams[-1])
            left = left and self._left(left, streams[-1])
        return streams

    def _take(self, age: int) -> Stream:
        self._removed(age)
        return self._pieces.pop(age).stream

    def _fits(self, age: int, left: list[int] | None) -> bool:
        return left is None or min(self._left(left, self._pieces[age].stream)) >= 0

    def _left(self, left: list[int], stream: Stream) -> list[int]:
        return [most - count for most, count in zip(left, _counts(stream.modality), strict=True)]


class BestFit(Packer[R]):
    """The longest piece that fits, the oldest of equals."""

    def __init__(
        self, length: int, *, buffer: int = 256, quotas: Mapping[Modality, int] | None = None
    ) -> None:
        super().__init__(length, buffer=buffer, quotas=quotas)
        self._by_length: list[tuple[int, int]] = []  # (length, -age), sorted

    def _added(self, age: int) -> None:
        insort(self._by_length, (len(self._pieces[age].stream), -age))

    def _removed(self, age: int) -> None:
        entry = (len(self._pieces[age].stream), -age)
        del self._by_length[bisect_right(self._by_length, entry) - 1]

    def _next(self, room: int, left: list[int] | None) -> int | None:
        for place in range(bisect_right(self._by_length, (room, 1)) - 1, -1, -1):
            if self._fits(age := -self._by_length[place][1], left):
                return age
        return None


class FirstFit(Packer[R]):
    """The oldest piece that fits."""

    def _next(self, room: int, left: list[int] | None) -> int | None:
        for age, piece in self._pieces.items():
            if len(piece.stream) <= room and self._fits(age, left):
                return age
        return None


class OnePiece(Packer[R]):
    """One piece a row."""

    @property
    def hungry(self) -> bool:
        """Whether it is empty."""
        return not self._pieces

    def _next(self, room: int, left: list[int] | None) -> int | None:
        return None


class Concatenation(Packer[R]):
    """Documents one after another, cut where a row ends.

    A cut falls at a text position or between spans; where the span at the row's end is whole, the
    row ends before it, in padding. Quotas are not kept.
    """

    @property
    def hungry(self) -> bool:
        """Whether less than a row waits."""
        waiting = sum(len(piece.stream) for piece in self._pieces.values())
        return waiting - self.taken < self.length

    def split(self, stream: Stream) -> list[Stream]:
        """The document as it is."""
        return [stream]

    def _fill(self) -> list[Stream]:
        streams: list[Stream] = []
        room = self.length
        while self._pieces and room:
            age, (_, stream) = next(iter(self._pieces.items()))
            begin = self.taken
            end = _last_cut(stream, begin, begin + room)
            if end is None and streams:
                break
            end = end or begin + room
            streams.append(_slice(stream, begin, end))
            room -= end - begin
            self.report.cut += begin == 0 and end < len(stream)
            self.taken = end
            if end == len(stream):
                self._take(age)
                self.taken = 0
        return streams


PACKERS = {
    "best-fit": BestFit,
    "first-fit": FirstFit,
    "concatenation": Concatenation,
    "none": OnePiece,
}


def split(stream: Stream, length: int) -> list[Stream]:
    """Cut a stream into consecutive pieces of at most `length` ids, whole spans wherever possible.

    Cuts fall at a text position or between spans. A span longer than a row is cut all the same;
    its pieces are plain ids, which no span table lists.
    """
    if len(stream) <= length:
        return [stream]
    pieces, begin = [], 0
    while begin < len(stream):
        end = _last_cut(stream, begin, begin + length) or begin + length
        pieces.append(_slice(stream, begin, end))
        begin = end
    return pieces


def _last_cut(stream: Stream, begin: int, limit: int) -> int | None:
    """The last place in (begin, limit] that is inside of no span; None when there is none."""
    limit = min(limit, len(stream))
    for span in stream.spans:
        first, end = _bounds(span)
        if first < limit < end:
            return first if first > begin else None
    return limit


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


def _counts(modality: np.ndarray) -> list[int]:
    return np.bincount(modality, minlength=len(Modality)).tolist()
