"""Many documents as flat arrays, and how rows are filled from them.

A row takes pieces of documents, which are ranges of such arrays: nothing is copied before the row.

Legend: D documents, N ids of all of them, S spans of all, B rows, L row length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
        tokens = np.empty(starts[-1], TOKEN)
        for name in TOKEN.names or ():
            tokens[name] = np.concatenate([[], *(getattr(stream, name) for stream in streams)])
        spans = [
            (start + span.start, span.length, span.modality, *span.grid)
            for start, stream in zip(starts.tolist(), streams, strict=False)
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

    def pieces(self, references: Sequence[Any]) -> list["Piece"]:
        """Every document as one piece."""
        begins, spans = self.starts.tolist(), self.span_starts.tolist()
        counts = self.counts.tolist()
        return list(
            map(Piece, references, repeat(self), begins, begins[1:], spans, spans[1:], counts)
        )

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
    pieces = [piece for row in rows for piece in row]
    firsts = offsets([len(row) for row in rows])  # of the pieces, by rows
    row = np.repeat(np.arange(len(rows)), np.diff(firsts))
    sizes = np.array([piece.end - piece.begin for piece in pieces], dtype=np.int64)
    starts = offsets(sizes)
    begins = starts[firsts]  # of the rows, in all ids
    used = np.diff(begins)
    if (used > length).any():
        worst = int(used.argmax())
        raise ValueError(f"row {worst} holds {used[worst]} ids, more than {length}; split it")
    memory = b"".join([piece.streams.token_memory[piece.begin : piece.end] for piece in pieces])
    tokens = np.frombuffer(memory, TOKEN)
    filled = np.arange(length) < used[:, None]
    number = np.arange(len(pieces)) - firsts[row]
    columns = {
        "ids": (pad_id, tokens["ids"]),
        "modality": (0, tokens["modality"]),
        "document": (-1, np.repeat(number, sizes)),
        "position": (0, np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)),
    }
    out = {}
    for name, (pad, values) in columns.items():
        out[name] = np.full(filled.shape, pad, dtype=np.int64)
        out[name][filled] = values
    out["loss_weight"] = np.zeros(filled.shape, dtype=np.float32)
    out["loss_weight"][filled] = tokens["loss_weight"]
    out["spans"] = _span_table(pieces, row, starts[:-1] - begins[row])
    return out


def _span_table(pieces: Sequence[Piece], row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """int64 (S, 7) of pieces that stand at these rows and columns."""
    numbers = [piece.last_span - piece.first_span for piece in pieces]
    memory = b"".join(
        [piece.streams.span_memory[piece.first_span : piece.last_span] for piece in pieces]
    )
    spans = np.frombuffer(memory, np.int64).reshape(-1, len(SPAN_COLUMNS) - 1)
    shift = column - np.array([piece.begin for piece in pieces], dtype=np.int64)
    table = np.empty((len(spans), len(SPAN_COLUMNS)), dtype=np.int64)
    table[:, 0] = np.repeat(row, numbers)
    table[:, 1:] = spans
    table[:, 1] += np.repeat(shift, numbers)
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
