"""Ids + modality + spans: what a model sees.

A `Stream` is one document as ids. A media span is written `<boi> height width codes... <eoi>`
(`<bov>` frames height width, `<boa>` length): the size comes first, so that a parallel decoder
knows the grid before the first code. `Rows` are packed streams of fixed length.

Legend: N ids of a document, B rows, L row length, S spans.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.vocab import BEGIN, END, NUM_GRID_SIZES, Modality, Vocabulary


class Span(NamedTuple):
    """A run of codes of one medium: `ids[start : start + length]`, row-major over its grid of ids.

    The header (begin id and sizes) stands right before `start`, the end id right after.
    """

    start: int
    length: int
    modality: Modality
    grid: tuple[int, int, int]  # (frames, height, width); speech: (1, 1, length)

    @property
    def num_header(self) -> int:
        """How many ids the header takes: the begin id and the sizes."""
        return 1 + NUM_GRID_SIZES[self.modality]


@dataclass
class Stream:
    """One document: ids int64 (N,), modality int8 (N,), loss_weight float32 (N,), and its spans."""

    ids: np.ndarray
    modality: np.ndarray
    loss_weight: np.ndarray
    spans: list[Span] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


class StreamBuilder:
    """Writes a document's ids from left to right."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._ids: list[np.ndarray] = []
        self._modality: list[np.ndarray] = []
        self._weight: list[np.ndarray] = []
        self._spans: list[Span] = []
        self._length = 0

    def structure(self, *names: str, weight: float = 1.0) -> "StreamBuilder":
        """Append structure ids by name."""
        ids = [self.vocabulary.structure_id(name) for name in names]
        return self._append(np.array(ids, dtype=np.int64), Modality.TEXT, weight)

    def text(self, codes: np.ndarray | Sequence[int], *, weight: float = 1.0) -> "StreamBuilder":
        """Append text codes (n,), which are ids already."""
        codes = np.asarray(codes, dtype=np.int64).reshape(-1)
        if len(codes) and not 0 <= codes.min() <= codes.max() < self.vocabulary.num_text:
            raise UserError(f"text codes must be in [0, {self.vocabulary.num_text})")
        return self._append(codes, Modality.TEXT, weight)

    def media(
        self, modality: Modality, codes: np.ndarray, *, weight: float = 1.0
    ) -> "StreamBuilder":
        """Append a whole span: codes int (h, w), (t, h, w) or (length,) by medium.

        Q codebooks are flattened into the last side, which counts ids: (h, w Q) or (frames Q,).
        """
        codes = np.asarray(codes, dtype=np.int64)
        ids = self.vocabulary.ids_of(modality, codes)
        self.header(modality, codes.shape, weight=weight)
        grid = (1,) * (3 - codes.ndim) + codes.shape
        self._spans.append(Span(self._length, codes.size, modality, grid))  # type: ignore[arg-type] # 3 sides by construction
        self._append(ids.reshape(-1), modality, weight)
        return self.structure(END[modality], weight=weight)

    def header(
        self, modality: Modality, shape: Sequence[int], *, weight: float = 1.0
    ) -> "StreamBuilder":
        """Append the begin id and the sizes of a span, and no codes: the prompt of a generation."""
        if len(shape) != NUM_GRID_SIZES[modality]:
            raise UserError(
                f"{modality.name.lower()} needs {NUM_GRID_SIZES[modality]} sides: {shape}"
            )
        sizes = [self.vocabulary.size_id(side) for side in shape]
        self.structure(BEGIN[modality], weight=weight)
        return self._append(np.array(sizes, dtype=np.int64), Modality.TEXT, weight)

    def build(self) -> Stream:
        """The stream written so far; the builder may go on."""
        if not self._ids:
            empty = np.zeros(0, dtype=np.int64)
            return Stream(empty, empty.astype(np.int8), empty.astype(np.float32))
        return Stream(
            np.concatenate(self._ids),
            np.concatenate(self._modality),
            np.concatenate(self._weight),
            list(self._spans),
        )

    def _append(self, ids: np.ndarray, modality: Modality, weight: float) -> "StreamBuilder":
        self._ids.append(ids)
        self._modality.append(np.full(len(ids), modality, dtype=np.int8))
        self._weight.append(np.full(len(ids), weight, dtype=np.float32))
        self._length += len(ids)
        return self


class Segment(NamedTuple):
    """A piece of a parsed stream: text codes (n,), or a medium's local codes in their grid.

    The codes of Q codebooks are flattened into the last side, frame by frame.
    """

    modality: Modality
    codes: np.ndarray


def parse(ids: np.ndarray | Sequence[int], vocabulary: Vocabulary) -> Iterator[Segment]:
    """The inverse of `StreamBuilder`: segments in order; structure ids that delimit are dropped.

    A span that is cut off or malformed raises UserError: codes never pass for text.
    """
    ids = np.asarray(ids, dtype=np.int64)
    begins = {vocabulary.structure_id(BEGIN[m]): m for m in BEGIN}
    ends = {m: vocabulary.structure_id(END[m]) for m in END}
    outside = set(ends.values())
    position, text = 0, []
    while position < len(ids):
        token = int(ids[position])
        if token in begins:
            if text:
                yield Segment(Modality.TEXT, np.array(text, dtype=np.int64))
                text = []
            modality = begins[token]
            segment, position = _parse_span(ids, position, modality, ends[modality], vocabulary)
            yield segment
            continue
        if 0 <= token < vocabulary.num_text:
            text.append(token)
        elif token in outside or not 0 <= token < vocabulary.num_text + len(vocabulary.structure):
            raise UserError(f"id {token} at position {position} stands outside a media span")
        position += 1
    if text:
        yield Segment(Modality.TEXT, np.array(text, dtype=np.int64))


def _parse_span(
    ids: np.ndarray, begin: int, modality: Modality, end_id: int, vocabulary: Vocabulary
) -> tuple[Segment, int]:
    first = begin + 1 + NUM_GRID_SIZES[modality]
    shape = [vocabulary.size_of(int(token)) for token in ids[begin + 1 : first]]
    if len(shape) < NUM_GRID_SIZES[modality] or None in shape:
        raise UserError(f"the {modality.name.lower()} span at position {begin} has no valid size")
    sides = [side or 0 for side in shape]
    last, codes = first + int(np.prod(sides)), None
    whole_frames = sides[-1] % vocabulary.num_codebooks(modality) == 0
    if last < len(ids) and ids[last] == end_id and whole_frames:
        codes = vocabulary.codes_of(modality, ids[first:last].reshape(sides))
    if codes is None:
        raise UserError(
            f"the {modality.name.lower()} span at position {begin} is cut off or malformed"
        )
    return Segment(modality, codes), last + 1


SPAN_COLUMNS = ("row", "start", "length", "modality", "frames", "height", "width")


@dataclass
class Rows:
    """Packed streams. All but `spans` are (B, L); pads have document -1 and weight 0.

    ids: int64. modality: int64, see `Modality`. document: int64, unique within a row.
    position: int64, counted from the start of each document. loss_weight: float32, the weight of
    predicting this id (from the one before it). spans: int64 (S, 7), columns `SPAN_COLUMNS`.
    """

    ids: torch.Tensor
    modality: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor
    loss_weight: torch.Tensor
    spans: torch.Tensor

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on another device (the span table stays on the host)."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("ids", "modality", "document", "position", "loss_weight")
        }
        return Rows(**moved, spans=self.spans)

    @classmethod
    def pack(cls, rows: Sequence[Sequence[Stream]], length: int, pad_id: int) -> "Rows":
        """Lay streams side by side: one inner sequence is one row of at most `length` ids."""
        shape = (len(rows), length)
        out = cls(
            ids=torch.full(shape, pad_id, dtype=torch.int64),
            modality=torch.zeros(shape, dtype=torch.int64),
            document=torch.full(shape, -1, dtype=torch.int64),
            position=torch.zeros(shape, dtype=torch.int64),
            loss_weight=torch.zeros(shape, dtype=torch.float32),
            spans=torch.zeros((0, len(SPAN_COLUMNS)), dtype=torch.int64),
        )
        table = []
        for row, streams in enumerate(rows):
            total = sum(len(stream) for stream in streams)
            if total > length:
                raise ValueError(f"row {row} holds {total} ids, more than {length}; split it")
            offset = 0
            for number, stream in enumerate(streams):
                place = slice(offset, offset + len(stream))
                out.ids[row, place] = torch.from_numpy(stream.ids)
                out.modality[row, place] = torch.from_numpy(stream.modality.astype(np.int64))
                out.document[row, place] = number
                out.position[row, place] = torch.arange(len(stream))
                out.loss_weight[row, place] = torch.from_numpy(stream.loss_weight)
                table += [
                    (row, offset + span.start, span.length, int(span.modality), *span.grid)
                    for span in stream.spans
                ]
                offset += len(stream)
        if table:
            out.spans = torch.tensor(table, dtype=torch.int64)
        return out
