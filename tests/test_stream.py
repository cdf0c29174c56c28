"""Streams: what is written is what is read, a broken span never passes, rows hold their streams."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.data.layout import speech_span, write_segments
from mmpt.stream import SPAN_COLUMNS, Rows, Segment, Span, Stream, StreamBuilder, parse
from mmpt.vocab import MEDIA, NUM_GRID_SIZES, Modality, Vocabulary

VOCABULARY = Vocabulary.build(
    num_text=300,
    text_fingerprint="text",
    codebooks=[
        ("visual", 64, {"image": "image", "video": "video"}, None),
        ("speech", 512, {"speech": "speech"}, None),
    ],
)
SHAPES = {
    Modality.TEXT: st.tuples(st.integers(1, 12)),
    Modality.IMAGE: st.tuples(st.integers(1, 5), st.integers(1, 5)),
    Modality.VIDEO: st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    Modality.SPEECH: st.tuples(st.integers(1, 40)),
}


@st.composite
def segments(draw: Callable) -> Segment:
    """A run of random codes of any medium."""
    modality = draw(st.sampled_from(list(Modality)))
    text = modality == Modality.TEXT
    top = VOCABULARY.num_text if text else VOCABULARY.range_of(modality).size
    seed = draw(st.integers(0, 2**32 - 1))
    return Segment(modality, np.random.default_rng(seed).integers(0, top, draw(SHAPES[modality])))


def write(document: list[Segment]) -> Stream:
    builder = StreamBuilder(VOCABULARY).structure("<bod>", weight=0.0)
    for modality, codes in document:
        if modality == Modality.TEXT:
            builder.text(codes)
        else:
            builder.media(modality, codes)
    return builder.structure("<eod>").build()


def joined(document: list[Segment]) -> list[Segment]:
    """Adjacent texts as one: nothing in a stream separates them."""
    out: list[Segment] = []
    for segment in document:
        if out and out[-1].modality == segment.modality == Modality.TEXT:
            out[-1] = Segment(Modality.TEXT, np.concatenate([out[-1].codes, segment.codes]))
        else:
            out.append(segment)
    return out


documents = st.lists(segments(), max_size=6)


@given(document=documents)
def test_a_document_of_any_order_of_media_comes_back(document: list[Segment]) -> None:
    stream = write(document)
    assert len(stream) == len(stream.modality) == len(stream.loss_weight)
    read = list(parse(stream.ids, VOCABULARY))
    assert [segment.modality for segment in read] == [s.modality for s in joined(document)]
    for ours, theirs in zip(read, joined(document), strict=True):
        assert np.array_equal(ours.codes, theirs.codes)


@given(document=documents)
def test_spans_say_where_the_codes_stand(document: list[Segment]) -> None:
    stream, media = write(document), [s for s in document if s.modality in MEDIA]
    assert len(stream.spans) == len(media)
    for span, (modality, codes) in zip(stream.spans, media, strict=True):
        place = slice(span.start, span.start + span.length)
        start = VOCABULARY.range_of(modality).start
        assert np.array_equal(stream.ids[place] - start, codes.reshape(-1))
        assert (stream.modality[place] == modality).all()
        assert np.prod(span.grid) == span.length
        header = stream.ids[span.start - span.num_header : span.start]
        assert [VOCABULARY.size_of(int(i)) for i in header[1:]] == list(codes.shape)
    inside = sum(span.length for span in stream.spans)
    assert (stream.modality == Modality.TEXT).sum() == len(stream) - inside


@given(document=documents.filter(lambda d: any(s.modality in MEDIA for s in d)), data=st.data())
def test_a_span_that_is_cut_off_is_never_read_as_something_else(
    document: list[Segment], data: st.DataObject
) -> None:
    stream = write(document)
    span = data.draw(st.sampled_from(stream.spans))
    first, last = span.start - span.num_header + 1, span.start + span.length
    cut = data.draw(st.integers(first, last))
    with pytest.raises(UserError, match=r"cut off or malformed|no valid size") as caught:
        list(parse(stream.ids[:cut], VOCABULARY))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="outside a media span"):  # the beginning is missing
        list(parse(stream.ids[cut:], VOCABULARY))


@given(document=documents.filter(lambda d: any(s.modality in MEDIA for s in d)), data=st.data())
def test_a_span_with_a_foreign_id_inside_is_refused(
    document: list[Segment], data: st.DataObject
) -> None:
    stream = write(document)
    span = data.draw(st.sampled_from(stream.spans))
    codes = VOCABULARY.range_of(span.modality)
    place = data.draw(st.integers(span.start, span.start + span.length))
    foreign = st.integers(-5, len(VOCABULARY) + 5).filter(
        lambda i: not codes.start <= i < codes.stop and i != stream.ids[place]
    )
    stream.ids[place] = data.draw(foreign)
    with pytest.raises(UserError):
        list(parse(stream.ids, VOCABULARY))


@pytest.mark.parametrize("token", [-1, 300 + 20, 300 + 32, len(VOCABULARY) - 1, len(VOCABULARY)])
def test_an_id_that_is_neither_text_nor_delimiter_is_refused_outside_a_span(token: int) -> None:
    with pytest.raises(UserError, match="outside a media span"):
        list(parse([1, token, 2], VOCABULARY))


@given(codes=st.lists(st.integers(0, VOCABULARY.num_text - 1)))
def test_text_codes_never_pass_for_structure(codes: list[int]) -> None:
    stream = StreamBuilder(VOCABULARY).text(codes).build()
    assert not stream.spans
    structure = {VOCABULARY.structure_id(name) for name in VOCABULARY.structure}
    assert not structure & set(stream.ids.tolist())
    assert [s.codes.tolist() for s in parse(stream.ids, VOCABULARY)] == ([codes] if codes else [])


def test_a_structure_id_cannot_be_written_as_text() -> None:
    for token in (VOCABULARY.structure_id("<boi>"), VOCABULARY.num_text, -1, len(VOCABULARY)):
        with pytest.raises(UserError, match=r"text codes must be in \[0, 300\)"):
            StreamBuilder(VOCABULARY).text([token])


@pytest.mark.parametrize(
    ("modality", "codes"),
    [
        (Modality.IMAGE, np.full((2, 2), 64)),
        (Modality.IMAGE, np.full((2, 2), -1)),
        (Modality.IMAGE, np.zeros(4)),
        (Modality.IMAGE, np.zeros((1, 2, 2))),
        (Modality.IMAGE, np.zeros((0, 2))),
        (Modality.VIDEO, np.zeros((2, 2))),
        (Modality.SPEECH, np.zeros(0)),
        (Modality.SPEECH, np.zeros(1025)),
        (Modality.SPEECH, np.full(3, 512)),
    ],
)
def test_a_span_that_cannot_be_is_refused_and_nothing_of_it_is_written(
    modality: Modality, codes: np.ndarray
) -> None:
    builder = StreamBuilder(VOCABULARY).text([1, 2])
    with pytest.raises(UserError):
        builder.media(modality, codes)
    stream = builder.build()
    assert stream.ids.tolist() == [1, 2]
    assert not stream.spans


def test_the_header_alone_is_the_prompt_of_a_generation() -> None:
    whole = StreamBuilder(VOCABULARY).media(Modality.VIDEO, np.zeros((2, 3, 4))).build()
    header = StreamBuilder(VOCABULARY).header(Modality.VIDEO, (2, 3, 4)).build()
    [span] = whole.spans
    assert span.grid == (2, 3, 4)
    assert len(header) == span.num_header == 1 + NUM_GRID_SIZES[Modality.VIDEO]
    assert np.array_equal(header.ids, whole.ids[: span.start])


def test_weights_are_those_that_were_given() -> None:
    builder = StreamBuilder(VOCABULARY).structure("<bod>", weight=0.0).text([1, 2], weight=0.5)
    stream = builder.media(Modality.SPEECH, np.zeros(2), weight=2.0).build()
    assert stream.loss_weight.tolist() == [0.0, 0.5, 0.5] + [2.0] * 5
    assert stream.loss_weight.dtype == np.float32


def test_an_empty_builder_gives_an_empty_stream_and_may_go_on() -> None:
    builder = StreamBuilder(VOCABULARY)
    assert len(builder.build()) == 0
    first = builder.text([1]).build()
    assert len(builder.text([2]).build()) == 2
    assert len(first) == 1
    assert list(parse([], VOCABULARY)) == []


@given(rows=st.lists(st.lists(documents.map(write), max_size=3), min_size=1, max_size=3))
def test_rows_hold_their_streams_side_by_side(rows: list[list[Stream]]) -> None:
    length = max(sum(len(stream) for stream in row) for row in rows) + 3
    pad = VOCABULARY.structure_id("<pad>")
    packed = Rows.pack(rows, length, pad)
    assert packed.ids.shape == (len(rows), length)
    spans = iter(packed.spans.tolist())
    for index, row in enumerate(rows):
        offset = 0
        for number, stream in enumerate(row):
            place = slice(offset, offset + len(stream))
            assert packed.ids[index, place].tolist() == stream.ids.tolist()
            assert packed.modality[index, place].tolist() == stream.modality.tolist()
            assert (packed.document[index, place] == number).all()
            assert packed.position[index, place].tolist() == list(range(len(stream)))
            assert packed.loss_weight[index, place].tolist() == stream.loss_weight.tolist()
            for span in stream.spans:
                want = [index, offset + span.start, span.length, int(span.modality), *span.grid]
                assert next(spans) == want
            offset += len(stream)
        assert (packed.ids[index, offset:] == pad).all()
        assert (packed.document[index, offset:] == -1).all()
        assert (packed.loss_weight[index, offset:] == 0).all()
    assert next(spans, None) is None
    assert packed.spans.shape[1] == len(SPAN_COLUMNS)


def test_a_row_that_is_too_long_is_refused() -> None:
    stream = write([Segment(Modality.TEXT, np.arange(5))])
    with pytest.raises(ValueError, match="row 1 holds 14 ids, more than 10"):
        Rows.pack([[stream], [stream, stream]], 10, 0)


def test_rows_move_with_their_span_table_on_the_host() -> None:
    rows = Rows.pack([[write([Segment(Modality.IMAGE, np.zeros((2, 2), dtype=int))])]], 20, 0)
    moved = rows.to("meta")
    assert moved.ids.device.type == "meta"
    assert torch.equal(moved.spans, rows.spans)


def test_the_header_of_a_span_counts_its_sizes() -> None:
    assert [Span(9, 1, m, (1, 1, 1)).num_header for m in MEDIA] == [3, 4, 2]


def several(count: int) -> Vocabulary:
    """Speech, and pictures, of `count` codebooks."""
    books = [
        (f"{name}-{index}", 16, {name: name}, None)
        for name in ("image", "speech")
        for index in range(count)
    ]
    return Vocabulary.build(num_text=300, text_fingerprint="text", codebooks=books)


@given(count=st.integers(1, 8), frames=st.integers(1, 12), seed=st.integers(0, 99))
def test_spans_of_several_codebooks_hold_an_id_a_code_and_come_back(
    count: int, frames: int, seed: int
) -> None:
    vocabulary, rng = several(count), np.random.default_rng(seed)
    speech = Segment(Modality.SPEECH, rng.integers(0, 16, frames * count))
    image = Segment(Modality.IMAGE, rng.integers(0, 16, (2, frames * count)))
    builder = StreamBuilder(vocabulary).text([1, 2]).media(*speech).media(*image).text([3])
    stream = builder.build()
    assert [span.length for span in stream.spans] == [frames * count, 2 * frames * count]
    assert [span.grid[-1] for span in stream.spans] == [frames * count] * 2
    _, heard, seen, _ = parse(stream.ids, vocabulary)
    assert np.array_equal(heard.codes, speech.codes)
    assert np.array_equal(seen.codes, image.codes)


def test_a_span_with_codebooks_out_of_their_places_does_not_parse() -> None:
    vocabulary = several(2)
    ids = StreamBuilder(vocabulary).media(Modality.SPEECH, np.array([1, 2, 3, 4])).build().ids
    swapped = ids.copy()
    swapped[[2, 3]] = ids[[3, 2]]
    part = np.concatenate([ids[:1], [vocabulary.size_id(3)], ids[2:5], ids[-1:]])
    for broken in (swapped, part):
        with pytest.raises(UserError, match="cut off or malformed"):
            list(parse(broken, vocabulary))
    with pytest.raises(UserError, match="3 speech codes are no whole frames of 2"):
        StreamBuilder(vocabulary).media(Modality.SPEECH, np.array([1, 2, 3]))


@pytest.mark.parametrize(("count", "most"), [(1, 26), (8, 208), (50, 1000)])
def test_speech_is_cut_into_blocks_of_whole_frames(count: int, most: int) -> None:
    vocabulary = several(count)
    assert speech_span(vocabulary) == most
    codes = np.random.default_rng(0).integers(0, 16, 60 * count)
    builder = StreamBuilder(vocabulary)
    write_segments(builder, [Segment(Modality.SPEECH, codes)], np.array([10]))
    stream = builder.build()
    assert all(span.length % count == 0 and span.length <= most for span in stream.spans)
    assert len(stream.spans) == -(-60 * count // most)
    read = [segment.codes for segment in parse(stream.ids, vocabulary)]
    assert np.array_equal(np.concatenate(read), codes)
