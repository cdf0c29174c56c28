"""A tar reader that survives damage: it finds the next header, goes on, and says what was lost.

Python's tarfile and webdataset end at the first destroyed header as if the archive ended there.
This reader resynchronises on the 512-byte grid. It never extracts: names are only keys, links are
not followed, and no size is trusted beyond what the file holds.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mmpt.config import UserError

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_SAMPLE_BYTES = 1 << 30
MAX_NAME_BYTES = 1 << 20  # of an extended header, which only carries names
SCAN_BYTES = 1 << 20
GZIP = b"\x1f\x8b"
NAME_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
EXTENDING_TYPES = (*NAME_TYPES, tarfile.GNUTYPE_LONGLINK)  # they belong to the next header
SILENT_TYPES = (tarfile.XGLTYPE, tarfile.DIRTYPE)  # they hold no data of a sample


@dataclass(frozen=True)
class Sample:
    """Consecutive members of one key; `beside_damage`: it may have more members than these.

    Some were lost, or stand elsewhere, for the key was there before. Its members with their headers
    lie in the bytes `offset` to `end`.
    """

    key: str
    members: dict[str, bytes]
    shard: str
    offset: int
    beside_damage: bool = False
    end: int = 0


@dataclass(frozen=True)
class Damage:
    """A place of a shard that could not be used, and why."""

    shard: str
    offset: int
    why: str
    key: str = ""
    name: str = ""  # of the member, where it is known


@dataclass(frozen=True)
class Member:
    """One regular file inside a tar; its `size` bytes lie at `start`, its headers from `offset`."""

    name: str
    offset: int
    start: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header may stand."""
        return self.start + padded(self.size)


def padded(size: int) -> int:
    """Bytes that `size` bytes take in a tar."""
    return -(-size // BLOCK) * BLOCK


def read_samples(path: str | Path) -> Iterator[Sample | Damage]:
    """Stream the samples of an uncompressed tar, and its damages where they lie."""
    with open_shard(path) as file:
        yield from read_samples_of(file, str(path))


def read_samples_of(file: BinaryIO, shard: str) -> Iterator[Sample | Damage]:
    """`read_samples` of an open file, named `shard` in what is reported."""
    if file.read(2) == GZIP:
        yield Damage(shard, 0, "compressed: gunzip it first, shards are read in place")
    else:
        group = _Group(shard)
        for item in read_members(file, shard):
            if isinstance(item, Damage):
                group.meet(item)
                yield item
                continue
            named = split_name(item.name)
            if named is None:
                yield Damage(shard, item.offset, f"bad name: {item.name!r} is no KEY.FIELD")
                continue
            key, name = named
            if key != group.key:
                yield from group.finish()
                group.begin(key, item.offset)
            problem = group.refuse(name, item)
            if problem is not None:
                yield problem
                continue
            file.seek(item.start)
            group.members[name], group.end = file.read(item.size), item.end
        yield from group.finish()


class _Group:
    """The sample that is being read: consecutive members of one key."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.key: str | None = None
        self.members: dict[str, bytes] = {}
        self.end = 0
        self._offset = self._num_bytes = 0
        self._damaged = False  # members of this sample may be lost
        self._after_gap = False  # unknown members were lost since the last good one
        self._seen: set[str] = set()

    def begin(self, key: str, offset: int) -> None:
        """Start a sample."""
        self.key, self.members, self._offset, self._num_bytes = key, {}, offset, 0
        self._damaged = self._after_gap or key in self._seen
        self._seen.add(key)

    def meet(self, damage: Damage) -> None:
        """Take note of a damage next to the current member."""
        named = split_name(damage.name)
        if damage.name == "":  # a gap: what was lost may belong to this sample or to the next
            self._damaged = self._after_gap = True
        elif named is not None and named[0] == self.key:
            self._damaged = True

    def refuse(self, name: str, member: Member) -> Damage | None:
        """Why a member cannot join the sample, or None."""
        self._after_gap = False
        if name in self.members:
            why = f"repeated member: {member.name!r}"
        elif self._num_bytes + member.size > MAX_SAMPLE_BYTES:
            self._damaged = True
            why = f"too large: {member.name!r} takes {member.size} bytes"
        else:
            self._num_bytes += member.size
            return None
        return Damage(self.shard, member.offset, why, self.key or "", member.name)

    def finish(self) -> Iterator[Sample]:
        """The sample, if it has any member."""
        if self.key is not None and self.members:
            yield Sample(self.key, self.members, self.shard, self._offset, self._damaged, self.end)


def read_members(file: BinaryIO, shard: str) -> Iterator[Member | Damage]:
    """Walk over the headers of a tar; the caller may seek `file` between two items."""
    num_bytes = file.seek(0, os.SEEK_END)
    offset, long_name, begin, ended = 0, None, 0, False
    while offset < num_bytes:
        block = _read_at(file, offset, BLOCK)
        if block == ZEROS[: len(block)]:
            following = _skip_zeros(file, offset, num_bytes)
            ended = following - offset >= 2 * BLOCK
            if following < num_bytes and not ended:
                yield Damage(shard, offset, "destroyed header: zeros in the middle of the tar")
            offset = begin = following
            continue
        ended = False
        header = parse_header(block)
        if header is None:
            following = _find_header(file, offset + BLOCK, num_bytes)
            why = f"destroyed header: {following - offset} bytes up to the next one are lost"
            yield Damage(shard, offset, why)
            offset, long_name = following, None
            begin = offset
            continue
        start = offset + BLOCK
        if start + header.size > num_bytes:
            have = num_bytes - start
            why = f"truncated: {header.name!r} has {have} of its {header.size} bytes"
            yield Damage(shard, offset, why)
            offset, long_name = _find_header(file, start, num_bytes), None
            begin = offset
            ended = offset >= num_bytes  # the cut is reported already
            continue
        if header.type in NAME_TYPES:
            long_name = extended_name(
                header, _read_at(file, start, min(header.size, MAX_NAME_BYTES))
            )
        elif header.type not in SILENT_TYPES:
            header.name, long_name = long_name or header.name, None
            yield _judge(header, begin, start, shard)
        offset = start + padded(header.size)
        if header.type not in EXTENDING_TYPES:
            begin = offset
    if not ended:
        yield Damage(shard, num_bytes, "truncated: the tar has no end mark")


def _judge(header: tarfile.TarInfo, offset: int, start: int, shard: str) -> Member | Damage:
    """A member that may be read, or why it may not. offset: of its first header."""
    name = header.name
    if name.startswith("/") or ".." in name.split("/"):
        return Damage(shard, offset, f"unsafe name: {name!r} leaves the shard", name=name)
    if not header.isreg() or header.type == tarfile.GNUTYPE_SPARSE:
        why = f"no plain file: {name!r} is a link or a special file"
        return Damage(shard, offset, why, name=name)
    return Member(name, offset, start, header.size)


def open_shard(path: str | Path) -> BinaryIO:
    """The file of a shard; raises UserError in one line for one that is not there."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None


def split_name(name: str) -> tuple[str, str] | None:
    """Key and field as webdataset cuts them: at the first dot of the last component."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, dot, field = last.partition(".")
    return (folder + slash + stem, field.lower()) if stem and dot and field else None


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def parse_header(block: bytes) -> tarfile.TarInfo | None:
    """What a header says, when its checksum is right."""
    try:
        header = _parse_plain(block)
        if header is None:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return header if header.size >= 0 else None


def _parse_plain(block: bytes) -> tarfile.TarInfo | None:
    """The common case alone, for speed: a regular file of a POSIX tar with a short name."""
    if len(block) != BLOCK or block[257:263] != b"ustar\0" or block[345] or block[156] != ord("0"):
        return None
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if checksum != _octal(block[148:156]):
        return None
    name, _, _ = block[:100].partition(b"\0")
    header = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
    header.size = _octal(block[124:136])
    return header if header.size >= 0 else None


def _octal(field: bytes) -> int:
    """A number; -1 for what is none, or is written in another way."""
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _find_header(file: BinaryIO, offset: int, num_bytes: int) -> int:
    """The next valid header on the 512-byte grid, or the end mark, or the end of the file."""
    while offset < num_bytes:
        window = _read_at(file, offset, SCAN_BYTES)
        for inside in range(0, len(window), BLOCK):
            block = window[inside : inside + BLOCK]
            # checking the magic first spares most checksums
            if block[257:262] == b"ustar" and parse_header(block) is not None:
                return offset + inside
        offset += len(window)
    return num_bytes


def _skip_zeros(file: BinaryIO, offset: int, num_bytes: int) -> int:
    """The first block from `offset` on that is not zero, or the end of the file."""
    while offset < num_bytes:
        window = _read_at(file, offset, SCAN_BYTES)
        kept = window.lstrip(b"\0")
        if kept:
            return offset + (len(window) - len(kept)) // BLOCK * BLOCK
        offset += len(window)
    return num_bytes


def extended_name(header: tarfile.TarInfo, data: bytes) -> str | None:
    """The name in a GNU or pax header that stands before a member whose name is long."""
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            return None
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return None


def count_samples(path: str | Path) -> int:
    """About how many samples a tar has, as long as it is whole; 0 for what cannot be read here."""
    try:
        with tarfile.open(path, "r:") as tar:
            return len({named[0] for member in tar if (named := split_name(member.name))})
    except (OSError, tarfile.TarError):
        return 0
