"""Reading raw shards by their index: every sample has its own fate, wherever in the file it is."""

import logging
import mmap
import tarfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from mmpt.data.index import ShardIndex, load_index
from mmpt.data.tars import (
    BLOCK,
    EXTENDING_TYPES,
    MAX_NAME_BYTES,
    MAX_SAMPLE_BYTES,
    NAME_TYPES,
    Damage,
    Sample,
    extended_name,
    open_shard,
    padded,
    parse_header,
    read_samples,
    read_samples_of,
    split_name,
)

log = logging.getLogger(__name__)

MAGIC, MAGIC_PLACE = b"ustar", 257


def samples_of(shard: str | Path) -> Iterator[Sample | Damage]:
    """The samples of a shard, by its index where there is one, else as they come."""
    known = load_index(shard)
    return read_samples(shard) if known is None else read_indexed(known)


def read_indexed(index: ShardIndex) -> Iterator[Sample | Damage]:
    """Every sample that the index promises, in order, or the Damage that became of it.

    A sample is given only when all its bytes are what they were, wherever in the file they are.
    """
    used = 0
    with open_shard(index.shard) as file:
        moved: _Moved | None = None
        for number in range(len(index)):
            start, size = int(index.starts[number]), int(index.sizes[number])
            data = _read(file, start, size)
            if zlib.crc32(data) != index.checksums[number] or len(data) != size:
                moved = moved or _Moved(file)
                start, data = moved.find(index, number)
            if data is None:
                why = "damaged: its bytes are not those that were indexed"
                yield Damage(index.shard, int(index.starts[number]), why, index.key(number))
                continue
            used += 1
            yield _parse(index, number, start, data)
    yield from index.damages
    if len(index) and not used:
        log.warning(
            "%s holds nothing that its index promises; if it was replaced: mmpt data index --again",
            index.shard,
        )


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    if not 0 <= size <= 2 * MAX_SAMPLE_BYTES:
        return b""
    file.seek(max(0, start))
    return file.read(size)


def _parse(index: ShardIndex, number: int, start: int, data: bytes) -> Sample:
    key, marked = index.key(number), bool(index.marked[number])
    members = None if marked else _plain_members(data, key)
    if members is None:  # long names, or damage that was there before
        items = read_samples_of(BytesIO(data), index.shard)
        members = {}
        for item in items:
            if isinstance(item, Sample) and item.key == key:
                members.update(item.members)
    return Sample(key, members, index.shard, start, marked, start + len(data))


def _plain_members(data: bytes, key: str) -> dict[str, bytes] | None:
    """The members of a sample whose headers are all plain; None where one is not.

    The checksum of the bytes is known to be right, so those of the headers are not looked at.
    """
    members: dict[str, bytes] = {}
    offset = 0
    while offset < len(data):
        header = data[offset : offset + BLOCK]
        # a regular file without a second part of its name
        if header[156:157] not in b"0\0" or header[345] or header[124] >= 0x80:
            return None
        name = header[: header.find(b"\0", 0, 100) if b"\0" in header[:100] else 100]
        named = split_name(name.decode("utf-8", "surrogateescape"))
        size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
        if named is None or named[0] != key or named[1] in members:
            return None
        start = offset + BLOCK
        members[named[1]] = data[start : start + size]
        offset = start + padded(size)
    return members


class _Moved:
    """Finds samples that are whole but not where they were: bytes before them came or went."""

    def __init__(self, file: BinaryIO) -> None:
        self._data = self._map(file)
        self._places: dict[str, list[int]] = {}  # key -> where its first headers may stand
        self._scan()

    def find(self, index: ShardIndex, number: int) -> tuple[int, bytes | None]:
        """Where sample `number` is now, and its bytes; None when it is gone."""
        size, checksum = int(index.sizes[number]), index.checksums[number]
        for start in self._places.get(index.key(number), []):
            data = self._data[start : start + size]
            if zlib.crc32(data) == checksum and len(data) == size:
                return start, data
        return 0, None

    def _map(self, file: BinaryIO) -> Any:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            return b""

    def _scan(self) -> None:
        begin, expected, name = 0, -1, None  # of a run of headers that extend the next one
        at = self._data.find(MAGIC)
        while at >= 0:
            place = at - MAGIC_PLACE
            header = parse_header(self._data[place : place + BLOCK]) if place >= 0 else None
            if header is not None:
                follows = place == expected
                first = begin if follows else place
                if header.type in EXTENDING_TYPES:
                    start = place + BLOCK
                    begin, expected = first, start + padded(header.size)
                    name = self._name(header, start) or (name if follows else None)
                else:
                    named = split_name((name if follows else None) or header.name)
                    if named is not None:
                        self._places.setdefault(named[0], []).append(first)
            at = self._data.find(MAGIC, at + 1)

    def _name(self, header: tarfile.TarInfo, start: int) -> str | None:
        if header.type not in NAME_TYPES:
            return None
        size = min(header.size, MAX_NAME_BYTES)
        return extended_name(header, self._data[start : start + size])
