"""Token shards: documents as local codes, in webdataset tars that are memory-mapped in place.

Members are blocks of many documents, because one member per document costs 70 times the
throughput. A block has one array of codes per medium (`KEY.text.npy`, `KEY.image.npy`, ..., in the
smallest unsigned type that holds the codec's size), a table of segments (`KEY.spans.npy`, columns
`SEGMENT_COLUMNS`) and `KEY.json` (keys, codec fingerprints, counts, checksums). Vocabulary offsets
are applied when loading, never stored: a new layout needs no new encoding.
"""

import io
import json
import mmap
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmpt.config import UserError
from mmpt.stream import Segment
from mmpt.vocab import NUM_GRID_SIZES, Modality, Vocabulary

FORMAT_VERSION = 1
SUFFIX = ".tokens.tar"
SEGMENT_COLUMNS = ("document", "modality", "offset", "length", "frames", "height", "width")

Order = Literal["any", "fixed"]


@dataclass(frozen=True)
class EncodedDocument:
    """A document as codes: text (n,), image (h, w), video (t, h, w), speech (n,), local integers.

    `base` decides what is held out; order "any" lets the loader permute the segments.
    """

    key: str
    base: str
    order: Order
    segments: list[Segment]

    @property
    def num_codes(self) -> int:
        return sum(segment.codes.size for segment in self.segments)


class ShardWriter:
    """Writes a token shard under a temporary name and renames it at `finish`: done means present.

    Used as a context manager, an error inside leaves nothing behind.
    """

    def __init__(
        self,
        path: str | Path,
        vocabulary: Vocabulary,
        *,
        separator: Sequence[int] | np.ndarray = (),
        documents_per_block: int = 512,
    ) -> None:
        self.path = Path(path)
        self._temporary = temporary_path(self.path, os.getpid())
        self._vocabulary = vocabulary
        self._separator = [int(code) for code in separator]
        self._per_block = documents_per_block
        self._documents: list[EncodedDocument] = []
        self._num_blocks = 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._tar = tarfile.open(self._temporary, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._tar.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, document: EncodedDocument) -> None:
        """Append a document; raises UserError, and adds nothing, when its codes do not fit."""
        self.check(document)
        if len(self._documents) == self._per_block:
            self._write_block({})
        self._documents.append(document)

    def check(self, document: EncodedDocument) -> None:
        """Raises UserError when the codes of a document do not fit the vocabulary."""
        for segment in document.segments:
            _check_segment(segment, self._vocabulary)

    def finish(self, notes: Mapping[str, Any] | None = None) -> None:
        """Write what is left and put the shard in place; `notes` (JSON) are kept in it."""
        self._write_block({"last": True, "notes": dict(notes or {})})
        try:
            self._tar.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from None

    def _write_block(self, extra: Mapping[str, Any]) -> None:
        documents, self._documents = self._documents, []
        arrays = _block_arrays(documents, self._vocabulary)
        payloads = {name: _npy(array) for name, array in arrays.items()}
        used = [m for m in Modality if self._vocabulary.has(m)]
        meta = {
            "format_version": FORMAT_VERSION,
            "keys": [document.key for document in documents],
            "bases": [document.base for document in documents],
            "orders": [document.order for document in documents],
            "fingerprints": {_name(m): self._vocabulary.fingerprint_of(m) for m in used},
            "sizes": {_name(m): _codec_size(m, self._vocabulary) for m in used},
            "counts": {name: array.size for name, array in arrays.items() if name != "spans"},
            "separator": self._separator,
            "crc32": {name: zlib.crc32(payload) for name, payload in payloads.items()},
            **extra,
        }
        key = f"{self.path.name.split('.')[0]}-{self._num_blocks:06d}"
        members = {f"{name}.npy": payload for name, payload in payloads.items()}
        members["json"] = json.dumps(meta).encode()
        try:
            for suffix, payload in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(payload)
                self._tar.addfile(info, io.BytesIO(payload))
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        self._num_blocks += 1


def temporary_path(path: Path, pid: int) -> Path:
    """Where process `pid` writes the shard that it will rename to `path`."""
    return path.with_name(f"{path.name}.{pid}.tmp")


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
                self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, tarfile.TarError, ValueError) as error:
            raise _damaged(self.path, str(error)) from None
        self._blocks = [_Block(self.path, self._data, members) for members in blocks]
        if not self._blocks or not self._blocks[-1].meta.get("last"):
            raise _damaged(self.path, "its end is missing")
        sizes = [len(block.meta["keys"]) for block in self._blocks]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> EncodedDocument:
        if not 0 <= number < len(self):
            raise IndexError(number)
        block = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._blocks[block].document(number - int(self._starts[block]))

    def __iter__(self) -> Iterator[EncodedDocument]:
        return (self[number] for number in range(len(self)))

    @property
    def bases(self) -> Iterator[str]:
        """The base key of each document."""
        return (base for block in self._blocks for base in block.meta["bases"])

    @property
    def fingerprints(self) -> dict[str, str]:
        """Medium -> fingerprint of the codec that made its codes."""
        return self._blocks[-1].meta["fingerprints"]

    @property
    def separator(self) -> np.ndarray:
        """The text codes that stand between adjacent text segments."""
        return np.array(self._blocks[-1].meta["separator"], dtype=np.int64)

    @property
    def notes(self) -> dict[str, Any]:
        """What the writer noted at `finish`."""
        return self._blocks[-1].meta["notes"]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Medium -> number of codes."""
        counts = {name: 0 for name in self.fingerprints}
        for block in self._blocks:
            for name, count in block.meta["counts"].items():
                counts[name] += count
        return counts

    @property
    def sizes(self) -> dict[str, int]:
        """Medium -> number of codes that its codec has."""
        return self._blocks[-1].meta["sizes"]

    def check(self, vocabulary: Vocabulary) -> None:
        """Refuse this shard when a medium in it was made by another codec than the vocabulary's."""
        for modality in Modality:
            name = _name(modality)
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


class _Block:
    """One block of a shard: its JSON, and its arrays as views into the mapped file."""

    def __init__(self, path: Path, data: memoryview, members: dict[str, tuple[int, int]]) -> None:
        self._path, self._data, self._members = path, data, members
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

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Medium -> its codes (n,), and "spans" -> the segment table."""
        for name, crc32 in self.meta["crc32"].items():
            if zlib.crc32(self._payload(f"{name}.npy")) != crc32:
                raise _damaged(self._path, f"checksum of {name} differs")
        return {name: _array(self._payload(f"{name}.npy")) for name in self.meta["crc32"]}

    @cached_property
    def _rows(self) -> np.ndarray:
        """Where each document's rows of the segment table begin, and the end of the last."""
        documents = self.arrays["spans"][:, 0]
        return np.searchsorted(documents, np.arange(len(self.meta["keys"]) + 1))

    def document(self, number: int) -> EncodedDocument:
        table = self.arrays["spans"][self._rows[number] : self._rows[number + 1]].tolist()
        return EncodedDocument(
            self.meta["keys"][number],
            self.meta["bases"][number],
            self.meta["orders"][number],
            [self._segment(*row) for row in table],
        )

    def _segment(self, _: int, modality: int, offset: int, length: int, *grid: int) -> Segment:
        medium = Modality(modality)
        codes = self.arrays[_name(medium)][offset : offset + length].astype(np.int64)
        sides = 1 if medium == Modality.TEXT else NUM_GRID_SIZES[medium]
        return Segment(medium, codes.reshape(grid[3 - sides :]))

    def _payload(self, name: str) -> memoryview:
        offset, size = self._members[name]
        return self._data[offset : offset + size]


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


def _block_arrays(
    documents: Sequence[EncodedDocument], vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    codes: dict[Modality, list[np.ndarray]] = {}
    offsets = dict.fromkeys(Modality, 0)
    table = []
    for number, document in enumerate(documents):
        for modality, grid in document.segments:
            if not grid.size:
                continue
            shape = (1,) * (3 - grid.ndim) + grid.shape
            table.append((number, int(modality), offsets[modality], grid.size, *shape))
            dtype = np.min_scalar_type(_codec_size(modality, vocabulary) - 1)
            codes.setdefault(modality, []).append(grid.reshape(-1).astype(dtype))
            offsets[modality] += grid.size
    arrays = {_name(m): np.concatenate(parts) for m, parts in sorted(codes.items())}
    arrays["spans"] = np.array(table, dtype=np.int32).reshape(-1, len(SEGMENT_COLUMNS))
    return arrays


def _check_segment(segment: Segment, vocabulary: Vocabulary) -> None:
    modality, codes = segment
    name = _name(modality)
    sides = 1 if modality == Modality.TEXT else NUM_GRID_SIZES[modality]
    if codes.ndim != sides:
        raise UserError(f"{name} codes need {sides} sides, not shape {codes.shape}")
    if modality != Modality.TEXT:
        vocabulary.ids_of(modality, codes)
    elif codes.size and not 0 <= codes.min() <= codes.max() < vocabulary.num_text:
        raise UserError(f"{name} codes must be in [0, {vocabulary.num_text})")
    if modality in (Modality.IMAGE, Modality.VIDEO):
        for side in codes.shape:
            vocabulary.size_id(side)


def _codec_size(modality: Modality, vocabulary: Vocabulary) -> int:
    if modality == Modality.TEXT:
        return vocabulary.num_text
    return max(code_range.size for code_range in vocabulary.ranges_of(modality))


def _name(modality: Modality) -> str:
    return modality.name.lower()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _array(payload: memoryview) -> np.ndarray:
    """A view of an `.npy` payload, without copying its data."""
    header = io.BytesIO(bytes(payload[:4096]))
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    return np.frombuffer(payload, dtype=dtype, offset=header.tell()).reshape(shape)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is no whole token shard: {reason}; delete it and encode again: mmpt encode "
        f"RAW_SHARDS --out {path.parent}"
    )


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror or error}; free space or choose another place"
    )
