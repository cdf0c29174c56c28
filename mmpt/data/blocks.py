"""Many documents laid out at once; what each becomes is what `to_stream` makes of it.

A document is written as runs: a text, or a span of codes with its header and end. The place of
every run follows from the sizes of those before it; then each medium is written by itself.

Legend: D documents, T segments of all of them, R runs of all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmpt.config import UserError
from mmpt.data.draws import draw_many
from mmpt.data.layout import speech_span
from mmpt.data.segments import Segments
from mmpt.flat import TOKEN, Streams, offsets, ranges
from mmpt.vocab import (
    BEGIN,
    END,
    MEDIA,
    NUM_GRID_SIZES,
    NUM_SIZES,
    ROLES,
    Modality,
    Vocabulary,
)

HEADERS = np.array([1 + NUM_GRID_SIZES[m] if m in MEDIA else 0 for m in Modality])


@dataclass(frozen=True)
class _Runs:
    """Where everything stands, counted over all documents.

    Per document: starts (D + 1,), of its ids; null (D,), whether it lost its condition; first
    (D + 1,), its first run. Per run (R,): segment, whose codes it has; modality; role, as segments
    have it, but 0 where the turn's id is not written; turn, whether that id stands before it;
    sides, (R, 3), of its grid; length, its codes; separator, the shard whose separator it begins
    with, -1 for none; begin, of its separator or header, and codes, of its codes.
    """

    starts: np.ndarray
    null: np.ndarray
    first: np.ndarray
    segment: np.ndarray
    modality: np.ndarray
    role: np.ndarray
    turn: np.ndarray
    sides: np.ndarray
    length: np.ndarray
    separator: np.ndarray
    begin: np.ndarray
    codes: np.ndarray


class BlockLayout:
    """Lays out documents of shards with these separators (text codes), as `to_stream` does."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        separators: Sequence[np.ndarray],
        condition_drop: float,
        *,
        masked_prompts: bool = False,
    ) -> None:
        self._vocabulary, self._condition_drop = vocabulary, condition_drop
        self._masked_prompts = masked_prompts
        # one more that is empty, for where there is none
        self._separator_sizes = np.array([*map(len, separators), 0])
        self._separator_starts = offsets(self._separator_sizes)[:-1]
        self._separators = np.concatenate(separators)
        self._speech_span = NUM_SIZES
        if vocabulary.has(Modality.SPEECH):
            self._speech_span = speech_span(vocabulary)

    def lay_out(self, segments: Segments, keys: np.ndarray, most: int) -> Iterator[Streams]:
        """These documents in parts of at most `most` ids, or of one document.

        keys: uint64 (D, 2), of their chances, see `draw_many`.
        """
        runs = self._place(segments, keys)
        first, end = 0, len(segments.num)
        while first < end:
            fits = np.searchsorted(runs.starts, runs.starts[first] + most, side="right")
            last = max(int(fits) - 1, first + 1)
            yield self._write(segments, runs, first, last)
            first = last

    def _place(self, segments: Segments, keys: np.ndarray) -> _Runs:
        written, null = self._choose(segments, keys)
        modality = segments.modality[written]

        # long speech has several runs
        sides, most = segments.grid[written], self._speech_span
        number = np.where(modality == Modality.SPEECH, -(-sides[:, 2] // most), 1)
        source = np.repeat(np.arange(len(written)), number)
        modality, sides = modality[source], sides[source]
        speech = np.flatnonzero(modality == Modality.SPEECH)
        part = ranges(np.zeros_like(number), number)[speech]
        sides[speech, 2] = np.minimum(sides[speech, 2] - part * most, most)
        length = sides[:, 0] * sides[:, 1] * sides[:, 2]
        document = segments.document[written][source]
        role = np.where(null[document], 0, segments.role[written][source])
        new = np.diff(document, prepend=-1) != 0
        turn = (role > 0) & (new | (np.diff(role, prepend=0) != 0))

        text = modality == Modality.TEXT
        again = np.zeros(len(text), dtype=bool)
        again[1:] = (text & ~new & ~turn)[1:] & text[:-1]
        separator = np.where(again, segments.shard[document], -1)
        header = HEADERS[modality] + self._separator_sizes[separator]
        ends = offsets(turn + header + length + ~text)
        frame = offsets(2 + null)  # <bod>, <null> and <eod>
        begin = ends[:-1] + turn + (frame[:-1] + 1 + null)[document]
        first = np.searchsorted(document, np.arange(len(null) + 1))
        return _Runs(
            starts=ends[first] + frame,
            null=null,
            first=first,
            segment=written[source],
            modality=modality,
            role=role,
            turn=turn,
            sides=sides,
            length=length,
            separator=separator,
            begin=begin,
            codes=begin + header,
        )

    def _write(self, segments: Segments, runs: _Runs, first: int, last: int) -> Streams:
        """Documents first to last - 1."""
        origin, inside = runs.starts[first], slice(runs.first[first], runs.first[last])
        modality, length, sides = runs.modality[inside], runs.length[inside], runs.sides[inside]
        begin, codes = runs.begin[inside] - origin, runs.codes[inside] - origin
        starts = runs.starts[first : last + 1] - origin
        tokens = np.empty(starts[-1], TOKEN)
        tokens["modality"] = Modality.TEXT
        tokens["loss_weight"] = 1
        self._write_frames(tokens, starts, runs.null[first:last])
        self._write_separators(tokens, begin, runs.separator[inside])
        firsts = runs.first[first : last + 1] - runs.first[first]
        if (role := runs.role[inside]).any():
            ends = codes + length + (modality != Modality.TEXT)
            self._write_turns(tokens, firsts, role, runs.turn[inside], begin, ends)
        for medium in Modality:
            chosen = np.flatnonzero(modality == medium)
            if not chosen.size:
                continue
            segment = runs.segment[inside][chosen]
            if medium == Modality.SPEECH:  # of which several runs may be one segment
                segment = segment[np.diff(segment, prepend=-1) != 0]
            places = ranges(codes[chosen], length[chosen])
            tokens["ids"][places] = self._ids(medium, segments.codes(segment), sides[chosen, 2])
            if medium in MEDIA:
                tokens["modality"][places] = medium
                self._write_headers(tokens, medium, begin[chosen], sides[chosen])
                end = codes[chosen] + length[chosen]
                tokens["ids"][end] = self._vocabulary.structure_id(END[medium])

        media = modality != Modality.TEXT
        spans = np.stack([codes, length, modality, *sides.T], axis=1)[media]
        document = np.repeat(np.arange(last - first), np.diff(firsts))[media]
        counts = np.zeros((last - first, len(Modality)), dtype=np.int64)
        np.add.at(counts, (document, modality[media]), length[media])
        counts[:, Modality.TEXT] = np.diff(starts) - counts.sum(axis=1)
        return Streams(tokens, starts, spans, offsets(media)[firsts], counts)

    def _choose(self, segments: Segments, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The segments that are written, in order; and which documents lost a condition (D,)."""
        firsts = offsets(segments.num)
        media = offsets(segments.modality != Modality.TEXT)
        candidates = np.where(segments.free, segments.num, np.diff(media[firsts]))
        answer, answers = self._answers(segments)
        talks = np.diff(offsets(segments.role > 0)[firsts]) > 0
        candidates = np.where(talks, np.diff(answers[firsts]), candidates)
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
        written[chosen[null & ~talks]] = True
        spoken = (null & talks)[segments.document]
        written |= spoken & (answer == (answers[firsts[:-1]] + kept)[segments.document])
        return orders[written], null

    def _answers(self, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
        """The assistant's turn that a segment is of (T,), -1: none; how many began (T + 1,)."""
        mine = segments.role == 1 + ROLES.index("assistant")
        new = np.diff(segments.document, prepend=-1) != 0
        began = offsets(mine & (new | np.diff(mine, prepend=False)))
        return np.where(mine, began[1:] - 1, -1), began

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

    def _write_frames(self, tokens: np.ndarray, starts: np.ndarray, null: np.ndarray) -> None:
        """What stands around documents; nothing predicts `<bod>` and `<null>`."""
        name, first, second = self._vocabulary.structure_id, starts[:-1], starts[:-1][null] + 1
        tokens["ids"][first] = name("<bod>")
        tokens["ids"][second] = name("<null>")
        tokens["ids"][starts[1:] - 1] = name("<eod>")
        tokens["loss_weight"][first] = tokens["loss_weight"][second] = 0

    def _write_turns(
        self,
        tokens: np.ndarray,
        firsts: np.ndarray,
        role: np.ndarray,
        turn: np.ndarray,
        begin: np.ndarray,
        ends: np.ndarray,
    ) -> None:
        """The ids that begin turns, and the weights of what the user says."""
        for number, name in enumerate(ROLES, 1):
            place = begin[turn & (role == number)] - 1
            tokens["ids"][place] = self._vocabulary.structure_id(f"<{name}>")
        if not self._masked_prompts:
            return
        user, new = role == 1 + ROLES.index("user"), np.zeros(len(role), dtype=bool)
        new[firsts[:-1][np.diff(firsts) > 0]] = True
        tokens["loss_weight"][begin[turn & (new | ~user)] - 1] = 0
        last = np.append(new[1:], True)
        ends = ends + last  # <eod> behind it, too
        tokens["loss_weight"][ranges(begin[user], (ends - begin)[user])] = 0

    def _write_separators(
        self, tokens: np.ndarray, begin: np.ndarray, separator: np.ndarray
    ) -> None:
        sizes = self._separator_sizes[separator]
        which = ranges(self._separator_starts[separator], sizes)
        tokens["ids"][ranges(begin, sizes)] = self._separators[which]

    def _write_headers(
        self, tokens: np.ndarray, medium: Modality, begin: np.ndarray, sides: np.ndarray
    ) -> None:
        sides = sides[:, 3 - NUM_GRID_SIZES[medium] :]
        if (wrong := (sides < 1) | (sides > NUM_SIZES)).any():
            self._vocabulary.size_id(int(sides[wrong][0]))  # says so
        places = begin[:, None] + np.arange(1, 1 + sides.shape[1])
        tokens["ids"][begin] = self._vocabulary.structure_id(BEGIN[medium])
        tokens["ids"][places] = self._vocabulary.size_id(1) + sides - 1
