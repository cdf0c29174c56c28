"""Several codes a position as one stream, and back: flatten, delay, and two tracks.

A residual codec gives n positions of Q codes; a decoder-only model reads one row after another.
`flatten` puts the Q codes behind each other (AudioLM): Q n rows of one id, exact. `delay` shifts
codebook q by q rows (MusicGen, arXiv 2306.05284): n + Q - 1 rows of Q ids, with holes at both ends.
`interleave` makes one track of several, position by position (YuE, arXiv 2503.08638: voice, then
accompaniment). All are exactly reversible, and take numbers of any meaning, codes or ids alike.

Legend: n positions, Q codebooks, K codebook size.
"""

from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from mmpt.config import UserError

HOLE = -1  # where a delayed codebook has no code yet, or none any more


def flatten(codes: Tensor, codebook_size: int) -> Tensor:
    """Codes (n, Q) in [0, K) -> one id a row (n Q,): codebook q counts from q K."""
    _check(codes, low=0, high=codebook_size)
    first = torch.arange(codes.shape[1], device=codes.device) * codebook_size
    return rearrange(codes + first, "n q -> (n q)")


def unflatten(ids: Tensor, codebook_size: int, num_codebooks: int) -> Tensor:
    """The inverse of `flatten`. Raises UserError where a codebook stands out of its turn."""
    if ids.ndim != 1 or len(ids) % num_codebooks:
        raise UserError(
            f"ids of shape {tuple(ids.shape)} are no whole positions of {num_codebooks}; "
            "cut them at a position"
        )
    first = torch.arange(num_codebooks, device=ids.device) * codebook_size
    codes = rearrange(ids, "(n q) -> n q", q=num_codebooks) - first
    if len(codes) and not ((codes >= 0) & (codes < codebook_size)).all():
        raise UserError("an id stands where another codebook's turn is; ids are out of order")
    return codes


def delay(codes: Tensor) -> Tensor:
    """Codes (n, Q) -> rows (n + Q - 1, Q): row t holds code t - q of codebook q, or HOLE."""
    _check(codes, low=0, high=None)
    stream = DelayStream(codes.shape[1])
    return torch.cat([stream.push(codes), stream.flush()])


def undelay(rows: Tensor) -> Tensor:
    """The inverse of `delay`. Raises UserError where holes are not where delay leaves them."""
    if rows.ndim != 2 or rows.shape[1] < 1 or 0 < len(rows) < rows.shape[1]:
        raise UserError(f"delayed codes are rows (n + Q - 1, Q); got {tuple(rows.shape)}")
    stream = UndelayStream(rows.shape[1])
    codes = stream.push(rows)
    stream.flush()
    return codes


@dataclass
class DelayStream:
    """`delay` as codes come: push (any, Q) -> as many rows; flush -> the last Q - 1 rows."""

    num_codebooks: int
    _past: Tensor = field(init=False)  # the last Q - 1 positions

    def __post_init__(self) -> None:
        if self.num_codebooks < 1:
            raise UserError(f"num_codebooks = {self.num_codebooks}; use 1 or more")
        self._begin()

    def push(self, codes: Tensor) -> Tensor:
        """Rows that are known now: one for each position."""
        if codes.ndim != 2 or codes.shape[1] != self.num_codebooks:
            raise UserError(f"codes need shape (n, {self.num_codebooks}); got {tuple(codes.shape)}")
        late = self.num_codebooks - 1
        seen = torch.cat([self._past.to(codes), codes])
        self._past = seen[len(seen) - late :].clone()
        columns = [seen[late - q : len(seen) - q, q] for q in range(self.num_codebooks)]
        return torch.stack(columns, dim=1)

    def flush(self) -> Tensor:
        """The rows that only late codebooks fill; none when nothing was pushed."""
        late = self.num_codebooks - 1
        begun = bool((self._past != HOLE).any()) if late else False
        rows = self.push(torch.full((late if begun else 0, self.num_codebooks), HOLE))
        self._begin()
        return rows

    def _begin(self) -> None:
        late = self.num_codebooks - 1
        self._past = torch.full((late, self.num_codebooks), HOLE, dtype=torch.int64)


@dataclass
class UndelayStream:
    """`undelay` as rows come: push (any, Q) -> the positions that are complete, Q - 1 rows late."""

    num_codebooks: int
    _past: Tensor = field(init=False)  # the last Q - 1 rows
    _count: int = field(init=False, default=0)  # rows so far
    _end: int | None = field(init=False, default=None)  # positions, once the first hole tells

    def __post_init__(self) -> None:
        if self.num_codebooks < 1:
            raise UserError(f"num_codebooks = {self.num_codebooks}; use 1 or more")
        self._begin()

    def push(self, rows: Tensor) -> Tensor:
        """Positions whose last codebook has come. Raises UserError for a hole in a wrong place."""
        if rows.ndim != 2 or rows.shape[1] != self.num_codebooks:
            raise UserError(f"rows need shape (n, {self.num_codebooks}); got {tuple(rows.shape)}")
        self._check_holes(rows)
        late = self.num_codebooks - 1
        seen = torch.cat([self._past.to(rows), rows])
        self._past = seen[len(seen) - late :].clone()
        columns = [seen[q : len(seen) - late + q, q] for q in range(self.num_codebooks)]
        early = min(len(rows), max(0, late - self._count))  # rows before the first whole position
        self._count += len(rows)
        return torch.stack(columns, dim=1)[early:]

    def flush(self) -> None:
        """Check that the rows ended where `delay` ends them, and begin anew."""
        late = self.num_codebooks - 1
        ends = self._end is not None and self._count == self._end + late
        if self._count and late and not ends:
            raise UserError(f"delayed codes were cut off: {self._count} rows do not end in holes")
        self._begin()

    def _begin(self) -> None:
        late = self.num_codebooks - 1
        self._past = torch.full((late, self.num_codebooks), HOLE, dtype=torch.int64)
        self._count, self._end = 0, None

    def _check_holes(self, rows: Tensor) -> None:
        if self._end is None:
            ended = torch.nonzero(rows[:, 0] == HOLE)
            self._end = self._count + int(ended[0]) if len(ended) else None
        place = self._count + torch.arange(len(rows), device=rows.device)[:, None]
        position = place - torch.arange(self.num_codebooks, device=rows.device)
        outside = position < 0
        if self._end is not None:
            outside |= position >= self._end
            outside &= place < self._end + self.num_codebooks - 1  # behind it there is no row
        if not torch.equal(rows == HOLE, outside):
            raise UserError(f"a hole is missing or misplaced after row {self._count}")


def interleave(tracks: Tensor) -> Tensor:
    """Tracks (num_tracks, n, ...) in step -> one (num_tracks n, ...), position by position."""
    if tracks.ndim < 2:
        raise UserError(f"tracks need shape (num_tracks, n, ...); got {tuple(tracks.shape)}")
    return rearrange(tracks, "s n ... -> (n s) ...")


def separate(stream: Tensor, num_tracks: int) -> Tensor:
    """The inverse of `interleave`: (num_tracks, n, ...)."""
    if stream.ndim < 1 or num_tracks < 1 or len(stream) % num_tracks:
        raise UserError(
            f"{len(stream)} rows are no whole positions of {num_tracks} tracks; cut them at one"
        )
    return rearrange(stream, "(n s) ... -> s n ...", s=num_tracks)


@dataclass
class TrackStream:
    """`interleave` as tracks come, each at its own pace: push (track, codes) -> rows in step."""

    num_tracks: int
    _waiting: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        if self.num_tracks < 1:
            raise UserError(f"num_tracks = {self.num_tracks}; use 1 or more")
        self._waiting = [[] for _ in range(self.num_tracks)]

    def push(self, track: int, codes: Tensor) -> Tensor:
        """Rows (num_tracks m, ...) of the m positions that all tracks have reached."""
        if not 0 <= track < self.num_tracks:
            raise UserError(f"track = {track}; there are {self.num_tracks}, counted from 0")
        self._waiting[track].extend(codes)
        ready = min(len(rows) for rows in self._waiting)
        if not ready:
            return codes[:0]
        done = [torch.stack(rows[:ready]) for rows in self._waiting]
        self._waiting = [rows[ready:] for rows in self._waiting]
        return interleave(torch.stack(done))

    def flush(self) -> None:
        """Check that no track is longer than another. Raises UserError, for holes would be lost."""
        left = [len(rows) for rows in self._waiting]
        self._waiting = [[] for _ in range(self.num_tracks)]
        if any(left):
            raise UserError(f"tracks end apart, {left} positions are left over; pad the shorter")


def _check(codes: Tensor, *, low: int, high: int | None) -> None:
    if codes.ndim != 2 or codes.shape[1] < 1:
        raise UserError(f"codes need shape (n, codebooks); got {tuple(codes.shape)}")
    if codes.numel() and (int(codes.min()) < low or (high and int(codes.max()) >= high)):
        bound = f"[{low}, {high})" if high else f"{low} or more"
        raise UserError(f"codes must be in {bound}; got {int(codes.min())} to {int(codes.max())}")
