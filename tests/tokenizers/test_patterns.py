"""Several codebooks or tracks as one stream: every layout is exactly reversible."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.tokenizers.patterns import (
    HOLE,
    DelayStream,
    TrackStream,
    UndelayStream,
    delay,
    flatten,
    interleave,
    separate,
    undelay,
    unflatten,
)

SIZE = 7
counts = st.integers(1, 5)


@st.composite
def codes_of(draw: st.DrawFn, *, least: int = 0) -> torch.Tensor:
    shape = (draw(st.integers(least, 9)), draw(counts))
    seed = draw(st.integers(0, 99))
    return torch.randint(SIZE, shape, generator=torch.Generator().manual_seed(seed))


@given(codes=codes_of())
def test_flattened_codes_come_back_and_tell_their_codebook(codes: torch.Tensor) -> None:
    ids = flatten(codes, SIZE)
    num_codebooks = codes.shape[1]
    assert ids.shape == (codes.numel(),)
    assert torch.equal(unflatten(ids, SIZE, num_codebooks), codes)
    assert torch.equal(ids // SIZE, torch.arange(len(ids)) % num_codebooks)


@given(codes=codes_of())
def test_delayed_codes_come_back(codes: torch.Tensor) -> None:
    rows = delay(codes)
    length, num_codebooks = codes.shape
    assert rows.shape == (length + num_codebooks - 1 if length else 0, num_codebooks)
    assert int((rows == HOLE).sum()) == (num_codebooks * (num_codebooks - 1) if length else 0)
    for t in range(len(rows)):
        for q in range(num_codebooks):
            inside = 0 <= t - q < length
            assert rows[t, q] == (codes[t - q, q] if inside else HOLE)
    assert torch.equal(undelay(rows), codes)


@given(codes=codes_of(), cuts=st.lists(st.integers(0, 4), max_size=5))
def test_streams_give_the_rows_of_the_whole_however_they_are_cut(
    codes: torch.Tensor, cuts: list[int]
) -> None:
    num_codebooks, place, rows = codes.shape[1], 0, []
    forth, back = DelayStream(num_codebooks), UndelayStream(num_codebooks)
    for size in [*cuts, len(codes)]:
        rows.append(forth.push(codes[place : place + size]))
        place += size
    rows.append(forth.flush())
    assert torch.equal(torch.cat(rows), delay(codes))
    assert torch.equal(torch.cat([back.push(piece) for piece in rows]), codes)
    back.flush()
    # both begin anew
    assert torch.equal(torch.cat([forth.push(codes), forth.flush()]), delay(codes))
    assert torch.equal(back.push(delay(codes)), codes)


@given(codes=codes_of(least=1), data=st.data())
def test_a_hole_too_many_or_too_few_is_refused(codes: torch.Tensor, data: st.DataObject) -> None:
    rows = delay(codes)
    row = data.draw(st.integers(0, len(rows) - 1))
    book = data.draw(st.integers(0, codes.shape[1] - 1))
    rows[row, book] = HOLE if rows[row, book] != HOLE else 0
    with pytest.raises(UserError):
        undelay(rows)


@given(codes=codes_of(least=1), missing=st.integers(1, 3))
def test_delayed_codes_that_are_cut_off_or_go_on_are_refused(
    codes: torch.Tensor, missing: int
) -> None:
    rows = delay(codes)
    if codes.shape[1] > 1:  # one codebook has no end to see
        with pytest.raises(UserError):
            undelay(rows[: len(rows) - min(missing, codes.shape[1] - 1)])
    beyond = torch.full((missing, codes.shape[1]), HOLE)
    with pytest.raises(UserError, match="hole"):
        undelay(torch.cat([rows, beyond]))


def test_ids_out_of_turn_and_parts_of_positions_are_refused() -> None:
    ids = flatten(torch.tensor([[1, 2], [3, 4]]), SIZE)
    with pytest.raises(UserError, match="out of order"):
        unflatten(ids.flip(0), SIZE, 2)
    with pytest.raises(UserError, match="whole positions"):
        unflatten(ids[:3], SIZE, 2)
    with pytest.raises(UserError, match=r"in \[0, 7\)"):
        flatten(torch.tensor([[7]]), SIZE)
    with pytest.raises(UserError, match="0 or more"):
        delay(torch.tensor([[HOLE]]))


@given(num_tracks=st.integers(1, 4), length=st.integers(0, 6), width=st.integers(1, 3))
def test_tracks_come_back(num_tracks: int, length: int, width: int) -> None:
    tracks = torch.arange(num_tracks * length * width).reshape(num_tracks, length, width)
    stream = interleave(tracks)
    assert stream.shape == (num_tracks * length, width)
    assert torch.equal(stream[1:num_tracks], tracks[1:num_tracks, 0] if length else stream[:0])
    assert torch.equal(separate(stream, num_tracks), tracks)
    assert torch.equal(interleave(separate(stream, num_tracks)), stream)


@given(pushes=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4)), max_size=8))
def test_tracks_that_come_at_their_own_pace_are_one_stream(pushes: list[tuple[int, int]]) -> None:
    stream, ends, rows = TrackStream(2), [0, 0], [torch.zeros(0, 1, dtype=torch.int64)]
    for track, size in pushes:
        codes = torch.arange(ends[track], ends[track] + size)[:, None] * 2 + track
        ends[track] += size
        rows.append(stream.push(track, codes))
    assert torch.cat(rows).flatten().tolist() == list(range(2 * min(ends)))
    if ends[0] == ends[1]:
        stream.flush()
    else:
        with pytest.raises(UserError, match="tracks end apart"):
            stream.flush()


def test_two_tracks_of_delayed_codes_go_forth_and_back() -> None:
    voice, accompaniment = torch.randint(SIZE, (2, 6, 4), generator=torch.Generator())
    stream = interleave(torch.stack([delay(voice), delay(accompaniment)]))
    back = [undelay(track) for track in separate(stream, 2)]
    assert torch.equal(torch.stack(back), torch.stack([voice, accompaniment]))
    with pytest.raises(UserError, match="whole positions of 2 tracks"):
        separate(stream[1:], 2)
