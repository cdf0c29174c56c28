"""Indexes of raw shards: what a tar held when it was whole, so that nothing is lost unnoticed.

`NAME.tar.index` stands beside a shard: a safetensors file with, for each sample, where it begins,
how many bytes it takes, their CRC-32 and its key (about 60 bytes a sample, mapped and not read).
With it every sample has its own fate: damage elsewhere in the file cannot touch it, and samples
that moved are found where they are now.
"""

import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy

from mmpt.config import UserError, write_atomic
from mmpt.data.remote import find_shards, is_remote
from mmpt.data.tars import (
    Damage,
    open_shard,
    read_samples_of,
)
from mmpt.data.workers import Done, run_tasks

log = logging.getLogger(__name__)

SUFFIX = ".index"
FORMAT_VERSION = 1
DTYPES = {"I64": "<i8", "U32": "<u4", "U8": "u1"}
MAX_HEADER_BYTES = 64 << 20
MAGIC, MAGIC_PLACE = b"ustar", 257


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in order: bytes [start, start + size), their CRC-32, their keys.

    marked: 1 for a sample that may lack members, as the shard was. damages: of the shard as it was.
    """

    shard: str
    num_bytes: int
    sha256: str
    starts: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray
    marked: np.ndarray
    key_ends: np.ndarray
    key_bytes: np.ndarray
    damages: tuple[Damage, ...] = ()

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def promised(self) -> int:
        """What must come out of the shard: its samples, and the damages that it had already."""
        return len(self) + len(self.damages)

    def key(self, number: int) -> str:
        """The key of a sample."""
        begin = int(self.key_ends[number - 1]) if number else 0
        return bytes(self.key_bytes[begin : int(self.key_ends[number])]).decode(
            "utf-8", "surrogateescape"
        )

    def keys(self) -> Iterator[str]:
        """All keys in order."""
        return (self.key(number) for number in range(len(self)))


def build_index(shard: str | Path) -> ShardIndex:
    """Read a shard in full and say what it holds. Raises UserError when it cannot be read."""
    samples, damages = [], []
    with open_shard(shard) as file, open_shard(shard) as again:
        digest, num_bytes = _digest(again)
        for item in read_samples_of(file, str(shard)):
            if isinstance(item, Damage):
                damages.append(item)
                continue
            again.seek(item.offset)
            data = again.read(item.end - item.offset)
            samples.append((item.offset, len(data), zlib.crc32(data), item.beside_damage, item.key))
    columns = list(zip(*samples, strict=True)) or [()] * 5
    keys = [key.encode("utf-8", "surrogateescape") for key in columns[4]]
    return ShardIndex(
        shard=str(shard),
        num_bytes=num_bytes,
        sha256=digest,
        starts=np.array(columns[0], np.int64),
        sizes=np.array(columns[1], np.int64),
        checksums=np.array(columns[2], np.uint32),
        marked=np.array(columns[3], np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        damages=tuple(damages),
    )


def _digest(file: BinaryIO) -> tuple[str, int]:
    digest, num_bytes = hashlib.sha256(), 0
    while data := file.read(1 << 20):
        digest.update(data)
        num_bytes += len(data)
    return digest.hexdigest(), num_bytes


ARRAYS = {
    "starts": "I64",
    "sizes": "I64",
    "checksums": "U32",
    "marked": "U8",
    "key_ends": "I64",
    "key_bytes": "U8",
}


def index_path(shard: str | Path) -> Path:
    """Where the index of a shard is."""
    return Path(f"{shard}{SUFFIX}")


def save_index(index: ShardIndex) -> Path:
    """Write an index beside its shard, atomically."""
    known = {
        "format_version": FORMAT_VERSION,
        "num_bytes": index.num_bytes,
        "sha256": index.sha256,
        "damages": [
            {key: value for key, value in asdict(damage).items() if key != "shard"}
            for damage in index.damages
        ],
    }
    arrays = {name: getattr(index, name) for name in ARRAYS}
    data = safetensors.numpy.save(arrays, metadata={"mmpt": json.dumps(known)})
    path = index_path(index.shard)
    try:
        write_atomic(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def load_index(shard: str | Path) -> ShardIndex | None:
    """The index beside a shard, mapped; None when there is none. Raises UserError for a bad one."""
    path = index_path(shard)
    if not path.is_file():
        return None
    try:
        header, offset = _read_header(path)
        known = json.loads(header.pop("__metadata__")["mmpt"])
        if known["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{path} has format {known['format_version']}; this mmpt reads {FORMAT_VERSION}: "
                "upgrade"
            )
        arrays = {name: _map(path, header[name], offset, name) for name in ARRAYS}
        damages = tuple(Damage(str(shard), **damage) for damage in known["damages"])
        index = ShardIndex(
            str(shard), int(known["num_bytes"]), str(known["sha256"]), damages=damages, **arrays
        )
        _check(index)
    except (OSError, ValueError, LookupError, TypeError, struct.error) as error:
        raise UserError(
            f"{path} is no index of a shard ({error}); build it again: mmpt data index {shard}"
        ) from None
    return index


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        return json.loads(file.read(size)), 8 + size


def _map(path: Path, entry: dict[str, Any], offset: int, name: str) -> np.ndarray:
    if entry["dtype"] != ARRAYS[name] or len(entry["shape"]) != 1:
        raise ValueError(f"{name} is {entry['dtype']} of shape {entry['shape']}")
    dtype, (length,) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"]
    if not length:
        return np.zeros(0, dtype)
    begin = offset + int(entry["data_offsets"][0])
    return np.memmap(path, dtype, "r", begin, (length,))


def _check(index: ShardIndex) -> None:
    lengths = {len(getattr(index, name)) for name in ARRAYS if name != "key_bytes"}
    if len(lengths) != 1:
        raise ValueError("its columns have different lengths")
    if len(index) and int(index.key_ends[-1]) != len(index.key_bytes):
        raise ValueError("its keys are cut")


def index_shards(shards: Sequence[str], *, workers: int = 0, again: bool = False) -> dict[str, Any]:
    """Write an index beside each raw shard: what it holds now is what later reads must find.

    Shards that have an index are left alone, unless --again; do that only for shards that were
    changed on purpose. --workers: processes; 0: as many as there are cores.
    """
    from mmpt.progress import Bar

    shards = find_shards(shards)
    for shard in filter(is_remote, shards):
        raise UserError(f"an index stands beside its shard; copy {shard} here, or index it there")
    todo = [shard for shard in shards if again or load_index(shard) is None]
    rows: dict[str, ShardIndex] = {}
    count = min(workers or os.cpu_count() or 1, len(todo))
    with Bar(total=len(todo), desc="index", unit="shard") as bar:
        for event in run_tasks(_index_shard, None, todo, workers=count):
            if isinstance(event, Done):
                bar.update()
    for shard in shards:
        loaded = load_index(shard)
        assert loaded is not None
        rows[shard] = loaded
    return {
        "shards": [
            {"shard": shard, "samples": len(row), "damages": len(row.damages)}
            for shard, row in rows.items()
        ],
        "written": len(todo),
        "samples": sum(map(len, rows.values())),
        "damages": sum(len(row.damages) for row in rows.values()),
    }


def _index_shard(state: None, shard: str, report: Any) -> None:
    save_index(build_index(shard))
