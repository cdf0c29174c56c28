"""Token shards: documents as local codes, in webdataset tars that are memory-mapped in place.

Members are blocks of many documents, because one member per document costs 70 times the
throughput. A block has one array of codes per medium (`KEY.text.npy`, `KEY.image.npy`, ..., in the
smallest unsigned type that holds the codec's size), a table of segments (`KEY.spans.npy`, columns
`SEGMENT_COLUMNS`), `KEY.roles.npy` where there are conversations (who says each segment: 1 + its
place in `ROLES`, 0 for nobody) and `KEY.json` (keys, codec fingerprints, counts, checksums).
Vocabulary offsets are applied when loading, never stored: a new layout needs no new encoding.
"""

import io
import json
import mmap
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmpt.config import UserError
from mmpt.data.token_writer import (
    FORMAT_VERSION,
    SEGMENT_COLUMNS,
    SUFFIX,
    EncodedDocument,
    ShardWriter,
    medium_name,
    temporary_path,
)
from mmpt.flat import offsets
from mmpt.stream import Segment
from mmpt.vocab import NUM_GRID_SIZES, ROLES, Modality, Vocabulary

__all__ = [
    "SUFFIX",
    "EncodedDocument",
    "ShardWriter",
    "TokenShard",
    "open_shards",
    "temporary_path",
]


class TokenShard:
    """Random access to the documents of one token shard; arrays are mapped, not read.

    Opening scans the tar's headers once. Damage raises UserError: at opening when members are
    missing, at the first access to a block when its checksum differs.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            blocks = _scan(self.path)
            with self.path.open("rb") as file:
                self.memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, tarfile.TarError, ValueError) as error:
            raise _damaged(self.path, str(error)) from None
        self.blocks = [Block(self.path, self.memory, members) for members in blocks]
        if not self.blocks or not self.blocks[-1].meta.get("last"):
            raise _damaged(self.path, "its end is missing")
        self._starts = offsets([len(block) for block in self.blocks])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> EncodedDocument:
        if not 0 <= number < len(self):
            raise IndexError(number)
        block = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.blocks[block].document(number - int(self._starts[block]))

    def __iter__(self) -> Iterator[EncodedDocument]:
        return (self[number] for number in range(len(self)))

    @property
    def bases(self) -> Iterator[str]:
        """The base key of each document."""
        return (base for block in self.blocks for base in block.meta["bases"])

    @property
    def fingerprints(self) -> dict[str, str]:
        """Medium -> fingerprint of the codec that made its codes."""
        return self.blocks[-1].meta["fingerprints"]

    @property
    def separator(self) -> np.ndarray:
        """The text codes that stand between adjacent text segments."""
        return np.array(self.blocks[-1].meta["separator"], dtype=np.int64)

    @property
    def notes(self) -> dict[str, Any]:
        """What the writer noted at `finish`."""
        return self.blocks[-1].meta["notes"]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Medium -> number of codes."""
        counts = {name: 0 for name in self.fingerprints}
        for block in self.blocks:
            for name, count in block.meta["counts"].items():
                counts[name] += count
        return counts

    @property
    def sizes(self) -> dict[str, int]:
        """Medium -> number of codes that its codec has."""
        return self.blocks[-1].meta["sizes"]

    def check(self, vocabulary: Vocabulary) -> None:
        """Refuse this shard when a medium in it was made by another codec than the vocabulary's."""
        for modality in Modality:
            name = medium_name(modality)
            if not self.counts.get(name):
                continue
            ours = vocabulary.fingerprint_of(modality) if vocabulary.has(modality) else "none"
            if self.fingerprints[name] != ours:
                raise UserError(
                    f"{self.path}: {name} codes were made by codec {self.fingerprints[name][:16]}, "
                    f"the vocabulary has {ours[:16]}; encode again: mmpt encode RAW_SHARDS "
                    f"--out {self.path.parent}"
                )


def open_shards(patterns: Sequence[str | Path], vocabulary: Vocabulary) -> list[TokenShard]:
    """Open and check the token shards that paths, folders or globs name, in sorted order."""
    shards = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            path = path / f"*{SUFFIX}"
        found = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        if not found:
            raise UserError(f"no token shard matches {pattern}; make them: mmpt encode RAW_SHARDS")
        shards += [TokenShard(each) for each in found]
    for shard in shards:
        shard.check(vocabulary)
    return shards


class Block:
    """One block of a shard: its JSON, and its arrays as views into the mapped file.

    It is checked when its arrays are first used: damage raises UserError.
    """

    def __init__(self, path: Path, data: memoryview, members: dict[str, tuple[int, int]]) -> None:
        self._path, self._memory, self._members = path, data, members
        try:
            self.meta = json.loads(bytes(self._payload("json")))
            version = self.meta["format_version"]
            names = {"json"} | {f"{name}.npy" for name in self.meta["crc32"]}
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"a block's json is unreadable ({error})") from None
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path} has format {version}; this mmpt reads {FORMAT_VERSION}: upgrade"
            )
        if names != set(members):
            raise _damaged(path, f"a block lacks {', '.join(sorted(names - set(members)))}")

    def __len__(self) -> int:
        return len(self.meta["keys"])

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Medium -> its codes (n,), "spans" -> the segment table, "roles" if there are any."""
        for name, crc32 in self.meta["crc32"].items():
            if zlib.crc32(self._payload(f"{name}.npy")) != crc32:
                raise _damaged(self._path, f"checksum of {name} differs")
        arrays = {name: _array(self._payload(f"{name}.npy")) for name in self.meta["crc32"]}
        if not _is_sound(arrays, len(self)):
            raise _damaged(self._path, "a table of segments does not fit its codes")
        return arrays

    @cached_property
    def rows(self) -> np.ndarray:
        """Where each document's rows of the segment table begin, and the end of the last."""
        documents = self.arrays["spans"][:, 0]
        return np.searchsorted(documents, np.arange(len(self) + 1)).astype(np.uint32)

    def begin(self, name: str) -> int:
        """The first byte in the file of the values of an array."""
        offset, size = self._members[f"{name}.npy"]
        return offset + size - self.arrays[name].nbytes

    def document(self, number: int) -> EncodedDocument:
        rows = slice(self.rows[number], self.rows[number + 1])
        table, roles = self.arrays["spans"][rows].tolist(), self.arrays.get("roles")
        return EncodedDocument(
            self.meta["keys"][number],
            self.meta["bases"][number],
            self.meta["orders"][number],
            [self._segment(*row) for row in table],
            () if roles is None else tuple(ROLES[role - 1] for role in roles[rows] if role),
        )

    def _segment(self, _: int, modality: int, offset: int, length: int, *grid: int) -> Segment:
        medium = Modality(modality)
        codes = self.arrays[medium_name(medium)][offset : offset + length].astype(np.int64)
        sides = 1 if medium == Modality.TEXT else NUM_GRID_SIZES[medium]
        return Segment(medium, codes.reshape(grid[3 - sides :]))

    def _payload(self, name: str) -> memoryview:
        offset, size = self._members[name]
        return self._memory[offset : offset + size]


def _scan(path: Path) -> list[dict[str, tuple[int, int]]]:
    """Per block: member suffix -> (offset, size) of its payload."""
    blocks: dict[str, dict[str, tuple[int, int]]] = {}
    num_bytes = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            if not member.isfile() or member.offset_data + member.size > num_bytes:
                raise tarfile.ReadError(f"member {member.name} is cut off or no file")
            blocks.setdefault(key, {})[suffix] = (member.offset_data, member.size)
    return list(blocks.values())


def _array(payload: memoryview) -> np.ndarray:
    """A view of an `.npy` payload, without copying its data."""
    header = io.BytesIO(bytes(payload[:4096]))
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    return np.frombuffer(payload, dtype=dtype, offset=header.tell()).reshape(shape)


def _is_sound(arrays: dict[str, np.ndarray], num_documents: int) -> bool:
    """Whether every segment is of a document, and its codes are where it says."""
    table = arrays["spans"]
    if table.dtype != np.int32 or table.shape[1:] != (len(SEGMENT_COLUMNS),):
        return False
    document, modality, offset, length, *grid = table.astype(np.int64).T
    roles = arrays.get("roles", np.zeros(len(table), dtype=np.uint8))
    if roles.dtype != np.uint8 or roles.shape != (len(table),) or (roles > len(ROLES)).any():
        return False
    sizes = np.zeros(len(Modality), dtype=np.int64)
    for medium in Modality:
        codes = arrays.get(medium_name(medium), np.zeros(0, dtype=np.uint8))
        if codes.dtype.kind != "u" or codes.ndim != 1:
            return False
        sizes[medium] = codes.size
    sound = np.diff(document, prepend=0) >= 0
    sound &= (modality >= 0) & (modality < len(Modality)) & (document < num_documents)
    sound &= (offset >= 0) & (length > 0) & (np.minimum.reduce(grid) > 0)
    sound &= grid[0] * grid[1] * grid[2] == length
    return bool(sound.all() and (offset + length <= sizes[modality]).all())


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is no whole token shard: {reason}; delete it and encode again: mmpt encode "
        f"RAW_SHARDS --out {path.parent}"
    )
