import numpy as np
import pytest

from mmpt.data.pack import PACKERS, BestFit, PackReport, split, stream_of
from mmpt.flat import Streams
from mmpt.stream import StreamBuilder
from mmpt.vocab import Modality


def text_stream(vocabulary, length):
    return StreamBuilder(vocabulary).text(np.arange(length) % 300).build()


def mixed_stream(vocabulary, rng):
    """Text and images in turn."""
    builder = StreamBuilder(vocabulary).structure("<bod>")
    for _ in range(rng.integers(1, 8)):
        builder.text(rng.integers(0, 300, rng.integers(1, 30)))
        builder.media(Modality.IMAGE, rng.integers(0, 64, (4, 4)))
    return builder.structure("<eod>").build()


def piece_of(reference, stream):
    [piece] = Streams.of([stream]).pieces([reference])
    return piece


def take(packer):
    """The next row as streams."""
    return list(map(stream_of, packer.row()))


def header(stream, vocabulary, span):
    return stream.ids[span.start - 3 : span.start].tolist() == [
        vocabulary.structure_id("<boi>"),
        *(vocabulary.size_id(side) for side in span.grid[1:]),
    ]


@pytest.mark.parametrize("length", [24, 32, 57, 100])
def test_pieces_put_together_are_the_stream_and_spans_stay_whole(vocabulary, length):
    rng = np.random.default_rng(length)
    for _ in range(30):
        stream = mixed_stream(vocabulary, rng)
        pieces = split(stream, length)
        assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), stream.ids)
        assert max(map(len, pieces)) <= length
        spans = [(piece, span) for piece in pieces for span in piece.spans]
        assert len(spans) == len(stream.spans)
        for (piece, span), whole in zip(spans, stream.spans, strict=True):
            place = slice(span.start, span.start + span.length)
            original = stream.ids[whole.start : whole.start + whole.length]
            assert np.array_equal(piece.ids[place], original)
            assert header(piece, vocabulary, span)


def test_a_cut_is_as_late_as_spans_allow(vocabulary):
    builder = StreamBuilder(vocabulary).text(np.arange(10))
    stream = builder.media(Modality.IMAGE, np.zeros((4, 4))).text(np.arange(10)).build()
    assert [len(piece) for piece in split(stream, 29)] == [10, 29, 1]
    assert [len(piece) for piece in split(stream, 30)] == [30, 10]
    assert [len(piece) for piece in split(stream, 31)] == [31, 9]


def test_a_span_longer_than_a_row_is_cut_and_listed_no_more(vocabulary):
    stream = StreamBuilder(vocabulary).media(Modality.IMAGE, np.zeros((8, 8))).build()
    pieces = split(stream, 32)
    assert [len(piece) for piece in pieces] == [32, 32, 4]
    assert not any(piece.spans for piece in pieces)


def test_packing_loses_no_piece_and_repeats_none(vocabulary):
    rng = np.random.default_rng(0)
    packer = BestFit(64)
    given, taken = [], []
    for number in range(300):
        stream = text_stream(vocabulary, rng.integers(1, 65))
        given.append(stream.ids.sum() + 1000 * len(stream))
        packer.add(piece_of(number, stream))
        if len(packer) == 40:
            taken += take(packer)
    while len(packer):
        taken += take(packer)
    assert sorted(given) == sorted(stream.ids.sum() + 1000 * len(stream) for stream in taken)
    assert packer.report.pieces == 300
    assert sum(packer.report.ids.values()) == sum(map(len, taken))


def test_rows_are_nearly_full(vocabulary):
    rng = np.random.default_rng(0)
    packer = BestFit(512)
    lengths = np.clip(rng.lognormal(4.4, 0.9, 4000), 1, 512).astype(int)
    for number, length in enumerate(lengths):
        packer.add(piece_of(number, text_stream(vocabulary, length)))
        if len(packer) == 256:
            take(packer)
    assert packer.report.fill > 0.99


def test_the_oldest_piece_is_in_the_next_row(vocabulary):
    packer = BestFit(64)
    packer.add(piece_of("old", text_stream(vocabulary, 40)))
    for number in range(20):
        packer.add(piece_of(number, text_stream(vocabulary, 64)))
    assert [len(stream) for stream in take(packer)] == [40]
    assert packer.residue == list(range(20))


def test_a_packer_restored_from_its_residue_goes_on_alike(vocabulary):
    rng = np.random.default_rng(1)
    streams = [text_stream(vocabulary, length) for length in rng.integers(1, 65, 100)]
    packer = BestFit(64)
    for number, stream in enumerate(streams):
        packer.add(piece_of(number, stream))
    take(packer)
    restored = BestFit(64)
    for number in packer.residue:
        restored.add(piece_of(number, streams[number]))
    while len(packer):
        ours, theirs = take(packer), take(restored)
        assert [len(stream) for stream in ours] == [len(stream) for stream in theirs]
        assert packer.residue == restored.residue


def packed(packer, streams):
    """All rows of these streams, with the buffer kept as full as the packer likes."""
    rows, waiting = [], list(enumerate(streams))[::-1]
    while waiting or len(packer):
        while packer.hungry and waiting:
            number, stream = waiting.pop()
            for piece in packer.split(piece_of(number, stream)):
                packer.add(piece)
        rows.append(take(packer))
    return rows


@pytest.mark.parametrize("kind", sorted(PACKERS))
def test_every_packer_gives_every_id_once_in_rows_that_fit_and_whole_spans(vocabulary, kind):
    rng = np.random.default_rng(3)
    streams = [mixed_stream(vocabulary, rng) for _ in range(60)]
    packer = PACKERS[kind](100, buffer=12)
    rows = packed(packer, streams)
    assert all(0 < sum(map(len, row)) <= 100 for row in rows)
    ids = np.concatenate([stream.ids for row in rows for stream in row])
    assert sorted(ids) == sorted(np.concatenate([stream.ids for stream in streams]))
    spans = [(stream, span) for row in rows for stream in row for span in stream.spans]
    assert len(spans) == sum(len(stream.spans) for stream in streams)
    assert all(header(stream, vocabulary, span) for stream, span in spans)
    assert packer.report.rows == len(rows)
    assert packer.report.fill == pytest.approx(len(ids) / (100 * len(rows)))


def test_packers_fill_differently(vocabulary):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.0, 0.9, 800), 1, 512).astype(int)
    streams = [text_stream(vocabulary, length) for length in lengths]
    fill = {}
    for kind in PACKERS:
        packer = PACKERS[kind](512, buffer=64)
        packed(packer, streams)
        fill[kind] = packer.report.fill
    assert fill["none"] < 0.2
    assert 0.9 < fill["first-fit"] <= fill["best-fit"] < fill["concatenation"]


def test_first_fit_takes_the_oldest_that_fits(vocabulary):
    packer = PACKERS["first-fit"](64)
    for number, length in enumerate((40, 30, 10, 24, 14)):
        packer.add(piece_of(number, text_stream(vocabulary, length)))
    assert [len(stream) for stream in take(packer)] == [40, 10, 14]
    assert packer.residue == [1, 3]


def test_concatenation_cuts_at_the_end_of_a_row_but_not_in_a_span(vocabulary):
    picture = StreamBuilder(vocabulary).media(Modality.IMAGE, np.zeros((4, 4))).build()  # 20 ids
    packer = PACKERS["concatenation"](32)
    rows = packed(packer, [text_stream(vocabulary, 25), picture, text_stream(vocabulary, 40)])
    assert [[len(stream) for stream in row] for row in rows] == [[25], [20, 12], [28]]
    assert packer.report.cut == 1
    long = StreamBuilder(vocabulary).media(Modality.IMAGE, np.zeros((8, 8))).build()  # 68 ids
    rows = packed(packer, [text_stream(vocabulary, 5), long])
    assert [[len(stream) for stream in row] for row in rows] == [[5], [32], [32], [4]]
    assert packer.report.cut == 2


@pytest.mark.parametrize("kind", ["best-fit", "first-fit"])
def test_no_row_breaks_a_quota_but_one_that_a_piece_breaks_alone(vocabulary, kind):
    rng = np.random.default_rng(1)
    streams = [mixed_stream(vocabulary, rng) for _ in range(100)]
    packer = PACKERS[kind](300, buffer=20, quotas={Modality.IMAGE: 40, Modality.TEXT: 150})
    over = 0
    for row in packed(packer, streams):
        modality = np.concatenate([stream.modality for stream in row])
        counts = np.bincount(modality, minlength=4)
        if counts[Modality.IMAGE] > 40 or counts[Modality.TEXT] > 150:
            assert len(row) == 1
            over += 1
    assert packer.report.over_quota == over > 5
    assert max(len(row) for row in packed(PACKERS[kind](300), streams)) > 2


def test_reports_add_up():
    one, two = PackReport(rows=2, capacity=20, cut=1), PackReport(rows=1, capacity=10, pieces=3)
    one.ids["text"], two.ids["text"] = 9, 3
    total = PackReport.sum([one, two])
    assert (total.rows, total.capacity, total.cut, total.pieces) == (3, 30, 1, 3)
    assert total.fill == 0.4
