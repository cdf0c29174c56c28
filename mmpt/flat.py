"""Many documents as flat arrays, and how rows are filled from them.

A row takes pieces of documents, which are ranges of such arrays: nothing is copied before the row.

Legend: D documents, N ids of all of them, S spans of all, B rows, L row length.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mmpt.vocab import Modality

if TYPE_CHECKING:
    from mmpt.stream import Stream

# all that is known of an id as one item, so that a range is one slice
TOKEN = np.dtype([("ids", "<i8"), ("modality", "<i4"), ("loss_weight", "<f4")])
SPAN_COLUMNS = ("row", "start", "length", "modality", "frames", "height", "width")


@dataclass(frozen=True)
class Streams:
    """Documents one after another.

    tokens: `TOKEN` (N,). starts: int64 (D + 1,), where each begins, and the end. spans: int64
    (S, 6), `SPAN_COLUMNS` without the row, `start` in all tokens. span_starts: int64 (D + 1,).
    counts: int64 (D, media), how many ids of each medium every document has.
    """

    tokens: np.ndarray
    starts: np.ndarray
    spans: np.ndarray
    span_starts: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def of(cls, streams: Sequence["Stream"]) -> "Streams":
        """Documents that were laid out one by one."""
        starts = offsets([len(stream) for stream in streams])
        tokens, spans = np.empty(starts[-1], TOKEN), []
        for start, stream in zip(starts.tolist(), streams, strict=False):
            for name in TOKEN.names or ():
                tokens[name][start : start + len(stream)] = getattr(stream, name)
            spans += [
                (start + span.start, span.length, span.modality, *span.grid)
                for span in stream.spans
            ]
        table = np.array(spans, dtype=np.int64).reshape(-1, len(SPAN_COLUMNS) - 1)
        counts = [np.bincount(stream.modality, minlength=len(Modality)) for stream in streams]
        return cls(
            tokens,
            starts,
            table,
            offsets([len(stream.spans) for stream in streams]),
            np.array(counts, dtype=np.int64).reshape(-1, len(Modality)),
        )

    def pieces(self, references: Iterable[Any]) -> list["Piece"]:
        """Every document as one piece."""
        begins, spans = self.starts.tolist(), self.span_starts.tolist()
        counts = zip(*self.counts.T.tolist(), strict=True)
        columns = zip(references, repeat(self), begins, begins[1:], spans, spans[1:], counts)
        return list(map(tuple.__new__, repeat(Piece), columns))  # half the time of Piece(...)

    # slices of memory are made faster than those of arrays

    @cached_property
    def token_memory(self) -> memoryview:
        """The tokens."""
        return self.tokens.data

    @cached_property
    def span_memory(self) -> memoryview:
        """The table of spans, row by row."""
        return self.spans.data


class Piece(NamedTuple):
    """A part of a document: `streams.tokens[begin:end]`, and the spans that are whole in it.

    reference: where to read it again. counts: how many ids of each medium it has.
    """

    reference: Any
    streams: Streams
    begin: int
    end: int
    first_span: int
    last_span: int  # one past it
    counts: Sequence[int]

    @property
    def size(self) -> int:
        """How many ids it has."""
        return self.end - self.begin


def pack_arrays(rows: Sequence[Sequence[Piece]], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """The fields of `Rows` as arrays; a row without pieces is all padding."""
    padding = _padding(length, pad_id)
    whole: list[Piece] = []  # which fill the rows, with padding
    sizes: list[int] = []
    numbers: list[int] = []  # of their documents
    for row, pieces in enumerate(rows):
        filled = [piece.end - piece.begin for piece in pieces]
        room = length - sum(filled)
        if room < 0:
            raise ValueError(f"row {row} holds {length - room} ids, more than {length}; split it")
        whole += pieces
        sizes += filled
        numbers += range(len(pieces))
        if room:
            whole.append(Piece(None, padding, 0, room, 0, 0, ()))
            sizes.append(room)
            numbers.append(-1)
    memory = b"".join([piece.streams.token_memory[piece.begin : piece.end] for piece in whole])
    tokens = np.frombuffer(memory, TOKEN).reshape(-1, length)
    starts = offsets(sizes)[:-1]
    document = np.repeat(np.array(numbers, dtype=np.int64), sizes).reshape(tokens.shape)
    position = np.arange(document.size) - np.repeat(starts, sizes)
    position = position.reshape(tokens.shape)
    position[document < 0] = 0
    return {
        "ids": tokens["ids"].copy(),
        "modality": tokens["modality"].astype(np.int64),
        "document": document,
        "position": position,
        "loss_weight": tokens["loss_weight"].copy(),
        "spans": _span_table(whole, starts, length),
    }


@lru_cache(maxsize=8)
def _padding(length: int, pad_id: int) -> Streams:
    tokens = np.zeros(length, TOKEN)
    tokens["ids"] = pad_id
    none = np.zeros((0, len(SPAN_COLUMNS) - 1), dtype=np.int64)
    return Streams(tokens, np.array([0, length]), none, np.zeros(2, dtype=np.int64), none)


def _span_table(pieces: Sequence[Piece], starts: np.ndarray, length: int) -> np.ndarray:
    """int64 (S, 7) of pieces that stand at these places of rows of this length."""
    numbers = [piece.last_span - piece.first_span for piece in pieces]
    memory = b"".join(
        [piece.streams.span_memory[piece.first_span : piece.last_span] for piece in pieces]
    )
    spans = np.frombuffer(memory, np.int64).reshape(-1, len(SPAN_COLUMNS) - 1)
    begins = np.array([piece.begin for piece in pieces], dtype=np.int64)
    place, begin = np.repeat([starts, begins], numbers, axis=1)
    table = np.empty((len(spans), len(SPAN_COLUMNS)), dtype=np.int64)
    table[:, 0] = place // length
    table[:, 1:] = spans
    table[:, 1] += place % length - begin
    return table


def offsets(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 (n + 1,): where ranges of these sizes begin, one after another, and the end."""
    out = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=out[1:])
    return out


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64: the numbers of [start, start + size) of every range, one after another."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)
