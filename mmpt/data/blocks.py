"""Many documents laid out at once; what each becomes is what `to_stream` makes of it.

A document is written as runs: a text, or a span of codes with its header and end. The place of
every run follows from the sizes of those before it; then each medium is written by itself.

Legend: D documents, T segments of all of them, R runs of all of them.
"""

from collections.abc import Sequence

import numpy as np

from mmpt.config import UserError
from mmpt.data.draws import draw_many
from mmpt.data.layout import speech_span
from mmpt.data.segments import Segments
from mmpt.flat import TOKEN, Streams, offsets, ranges
from mmpt.vocab import BEGIN, END, MEDIA, NUM_GRID_SIZES, NUM_SIZES, Modality, Vocabulary

HEADERS = np.array([1 + NUM_GRID_SIZES[m] if m in MEDIA else 0 for m in Modality])


class BlockLayout:
    """Lays out documents of shards with these separators (text codes), as `to_stream` does."""

    def __init__(
        self, vocabulary: Vocabulary, separators: Sequence[np.ndarray], condition_drop: float
    ) -> None:
        self._vocabulary, self._condition_drop = vocabulary, condition_drop
        self._separator_starts = offsets([len(separator) for separator in separators])
        self._separators = np.concatenate(separators)
        self._speech_span = NUM_SIZES
        if vocabulary.has(Modality.SPEECH):
            self._speech_span = speech_span(vocabulary)

    def lay_out(self, segments: Segments, keys: np.ndarray) -> Streams:
        """These documents; uint64 (D, 2) are the keys of their chances, see `draw_many`."""
        written, null = self._choose(segments, keys)
        modality = segments.modality[written]
        speech = modality == Modality.SPEECH

        # runs: long speech has several
        sides = segments.grid[written]
        most = self._speech_span
        number = np.where(speech, -(-sides[:, 2] // most), 1)
        segment = np.repeat(np.arange(len(written)), number)
        part = ranges(np.zeros_like(number), number)
        modality, speech, sides = modality[segment], speech[segment], sides[segment]
        sides[speech, 2] = np.minimum(sides[speech, 2] - part[speech] * most, most)
        length = sides.prod(axis=1)
        document = segments.document[written][segment]

        # where they stand
        text = modality == Modality.TEXT
        again = np.zeros(len(text), dtype=bool)
        again[1:] = text[1:] & text[:-1] & (document[1:] == document[:-1])
        shard = segments.shard[document]
        separators = np.where(again, np.diff(self._separator_starts)[shard], 0)
        header = HEADERS[modality] + separators
        sizes = offsets(header + length + ~text)
        frame = offsets(2 + null)  # <bod>, <null> and <eod>
        first = np.searchsorted(document, np.arange(len(segments.num) + 1))  # runs of documents
        starts = sizes[first] + frame
        begin = sizes[:-1] + (frame[:-1] + 1 + null)[document]

        tokens = np.empty(starts[-1], TOKEN)
        tokens["modality"] = Modality.TEXT
        tokens["loss_weight"] = 1
        ids, weights, name = tokens["ids"], tokens["loss_weight"], self._vocabulary.structure_id
        ids[starts[:-1]], ids[starts[1:] - 1] = name("<bod>"), name("<eod>")
        ids[starts[:-1][null] + 1] = name("<null>")
        weights[starts[:-1]] = weights[starts[:-1][null] + 1] = 0
        places = ranges(begin[again], separators[again])
        ids[places] = self._separators[
            ranges(self._separator_starts[shard[again]], separators[again])
        ]
        for medium in Modality:
            runs = np.flatnonzero(modality == medium)
            if not runs.size:
                continue
            codes = segments.codes(written[segments.modality[written] == medium])
            places = ranges(begin[runs] + header[runs], length[runs])
            ids[places] = self._ids(medium, codes, sides[runs, 2])
            if medium in MEDIA:
                tokens["modality"][places] = medium
                self._write_headers(ids, medium, begin[runs], sides[runs])
                ids[begin[runs] + header[runs] + length[runs]] = name(END[medium])
        spans = np.stack([begin + header, length, modality, *sides.T], axis=1)[~text]
        return Streams(tokens, starts, spans, offsets(~text)[first])

    def _choose(self, segments: Segments, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The segments that are written, in order; and which documents lost a condition (D,)."""
        firsts = offsets(segments.num)
        media = offsets(segments.modality != Modality.TEXT)
        candidates = np.where(segments.free, segments.num, np.diff(media[firsts]))
        orders, kept = draw_many(
            keys, segments.num, candidates, segments.free, self._condition_drop
        )
        orders += np.repeat(firsts[:-1], segments.num)
        null = kept >= 0
        chosen = firsts[:-1] + kept
        # in documents of fixed order it counts media alone
        wanted = media[firsts[:-1]] + kept
        chosen = np.where(segments.free, chosen, np.searchsorted(media, wanted, side="right") - 1)
        written = ~null[segments.document]
        written[chosen[null]] = True
        return orders[written], null

    def _ids(self, medium: Modality, codes: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """The ids of codes of whole spans, which have these last sides."""
        starts, sizes = np.array([0]), np.array([self._vocabulary.num_text])
        if medium in MEDIA:
            ranges_of = self._vocabulary.ranges_of(medium)
            starts, sizes = np.array([(r.start, r.size) for r in ranges_of]).T
        name, num = medium.name.lower(), len(starts)
        if (widths % num).any():
            raise UserError(
                f"{widths[widths % num > 0][0]} {name} codes are no whole frames of {num}"
            )
        books = codes.reshape(-1, num)
        if (bad := books.max(axis=0) >= sizes).any():
            raise UserError(f"{name} codes must be in [0, {sizes[bad.argmax()]})")
        return (books + starts).reshape(-1)

    def _write_headers(
        self, ids: np.ndarray, medium: Modality, begin: np.ndarray, sides: np.ndarray
    ) -> None:
        ids[begin] = self._vocabulary.structure_id(BEGIN[medium])
        written = sides[:, 3 - NUM_GRID_SIZES[medium] :]
        if (wrong := (written < 1) | (written > NUM_SIZES)).any():
            self._vocabulary.size_id(int(written[wrong][0]))
        ids[begin[:, None] + np.arange(1, 1 + written.shape[1])] = (
            self._vocabulary.size_id(1) + written - 1
        )
