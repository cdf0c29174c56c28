"""Ids + modality + spans: what a model sees.

A `Stream` is one document as ids. A media span is written `<boi> height width codes... <eoi>`
(`<bov>` frames height width, `<boa>` length): the size comes first, so that a parallel decoder
knows the grid before the first code. `Rows` are packed streams of fixed length.

Legend: N ids of a document, B rows, L row length, S spans.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmpt.config import UserError
from mmpt.flat import SPAN_COLUMNS as SPAN_COLUMNS  # to be had from here as well
from mmpt.flat import Streams, pack_arrays
from mmpt.vocab import BEGIN, END, NUM_GRID_SIZES, Modality, Vocabulary

if TYPE_CHECKING:
    import torch  # which processes that only prepare rows need not load


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
        self._ids: list[np.ndarray | list[int]] = []
        self._runs: list[tuple[int, int, Modality, float]] = []  # (start, stop, modality, weight)
        self._spans: list[Span] = []
        self._length = 0

    def structure(self, *names: str, weight: float = 1.0) -> "StreamBuilder":
        """Append structure ids by name."""
        return self._append(
            [self.vocabulary.structure_id(name) for name in names], Modality.TEXT, weight
        )

    def text(self, codes: np.ndarray | Sequence[int], *, weight: float = 1.0) -> "StreamBuilder":
        """Append text codes (n,), which are ids already."""
        codes = np.asarray(codes, dtype=np.int64).reshape(-1)
        if not _within(codes, self.vocabulary.num_text):
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
        return self._append([self.vocabulary.structure_id(END[modality])], Modality.TEXT, weight)

    def header(
        self, modality: Modality, shape: Sequence[int], *, weight: float = 1.0
    ) -> "StreamBuilder":
        """Append the begin id and the sizes of a span, and no codes: the prompt of a generation."""
        if len(shape) != NUM_GRID_SIZES[modality]:
            raise UserError(
                f"{modality.name.lower()} needs {NUM_GRID_SIZES[modality]} sides: {shape}"
            )
        sizes = [self.vocabulary.size_id(side) for side in shape]
        return self._append(
            [self.vocabulary.structure_id(BEGIN[modality]), *sizes], Modality.TEXT, weight
        )

    def build(self) -> Stream:
        """The stream written so far; the builder may go on."""
        if not self._ids:
            empty = np.zeros(0, dtype=np.int64)
            return Stream(empty, empty.astype(np.int8), empty.astype(np.float32))
        # few runs are media, and few weights are not 1
        modality = np.zeros(self._length, dtype=np.int8)
        loss_weight = np.ones(self._length, dtype=np.float32)
        for start, stop, medium, weight in self._runs:
            if medium:
                modality[start:stop] = medium
            if weight != 1.0:
                loss_weight[start:stop] = weight
        ids = np.concatenate(self._ids, dtype=np.int64)
        return Stream(ids, modality, loss_weight, list(self._spans))

    def _append(
        self, ids: np.ndarray | list[int], modality: Modality, weight: float
    ) -> "StreamBuilder":
        if len(ids):
            self._ids.append(ids)
            start = self._length
            self._length += len(ids)
            self._runs.append((start, self._length, modality, weight))
        return self


def _within(codes: np.ndarray, size: int) -> bool:
    """Whether all int64 codes are in [0, size)."""
    return not codes.size or bool(codes.view(np.uint64).max() < size)  # below 0 is very large


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


@dataclass
class Rows:
    """Packed streams. All but `spans` are (B, L); pads have document -1 and weight 0.

    ids: int64. modality: int64, see `Modality`. document: int64, unique within a row.
    position: int64, counted from the start of each document. loss_weight: float32, the weight of
    predicting this id (from the one before it). spans: int64 (S, 7), columns `SPAN_COLUMNS`.
    """

    ids: "torch.Tensor"
    modality: "torch.Tensor"
    document: "torch.Tensor"
    position: "torch.Tensor"
    loss_weight: "torch.Tensor"
    spans: "torch.Tensor"

    def to(self, device: "torch.device | str") -> "Rows":
        """The same rows on another device (the span table stays on the host).

        To a CUDA device they go through pinned memory, so that the copy does not wait.
        """
        import torch

        pin = torch.device(device).type == "cuda" and self.ids.device.type == "cpu"
        moved = {}
        for name in ("ids", "modality", "document", "position", "loss_weight"):
            tensor = getattr(self, name)
            moved[name] = (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True)
        return Rows(**moved, spans=self.spans)

    @classmethod
    def pack(cls, rows: Sequence[Sequence[Stream]], length: int, pad_id: int) -> "Rows":
        """Lay streams side by side: one inner sequence is one row of at most `length` ids."""
        streams = Streams.of([stream for row in rows for stream in row])
        pieces = iter(streams.pieces(range(len(streams))))
        parts = [list(islice(pieces, len(row))) for row in rows]
        return cls.from_arrays(pack_arrays(parts, length, pad_id))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Rows":
        """Tensors that share the memory of what `pack_arrays` gives."""
        import torch

        return cls(**{name: torch.from_numpy(array) for name, array in arrays.items()})
