"""Writing token shards, and what is in them; `tokens` reads them, and says how they are made up."""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmpt.config import UserError
from mmpt.stream import Segment
from mmpt.vocab import NUM_GRID_SIZES, ROLES, Modality, Vocabulary

FORMAT_VERSION = 2  # 1 knows no roles, and is still written where there are none
SUFFIX = ".tokens.tar"
SEGMENT_COLUMNS = ("document", "modality", "offset", "length", "frames", "height", "width")

TABLES = ("spans", "roles")  # arrays that are not codes: a row of each is a segment

Order = Literal["any", "fixed"]


@dataclass(frozen=True)
class EncodedDocument:
    """A document as codes: text (n,), image (h, w), video (t, h, w), speech (n,), local integers.

    `base` decides what is held out; order "any" lets the loader permute the segments. roles: who
    says each segment of a conversation, empty where it is none; equal neighbours are one turn.
    """

    key: str
    base: str
    order: Order
    segments: list[Segment]
    roles: tuple[str, ...] = ()

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
        assert not document.roles or len(document.roles) == len(document.segments)
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
            "format_version": FORMAT_VERSION if "roles" in arrays else 1,
            "keys": [document.key for document in documents],
            "bases": [document.base for document in documents],
            "orders": [document.order for document in documents],
            "fingerprints": {medium_name(m): self._vocabulary.fingerprint_of(m) for m in used},
            "sizes": {medium_name(m): _codec_size(m, self._vocabulary) for m in used},
            "counts": {name: array.size for name, array in arrays.items() if name not in TABLES},
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


def _block_arrays(
    documents: Sequence[EncodedDocument], vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    codes: dict[Modality, list[np.ndarray]] = {}
    offsets = dict.fromkeys(Modality, 0)
    table, roles = [], []
    for number, document in enumerate(documents):
        for (modality, grid), role in zip_longest(document.segments, document.roles):
            if not grid.size:
                continue
            shape = (1,) * (3 - grid.ndim) + grid.shape
            table.append((number, int(modality), offsets[modality], grid.size, *shape))
            dtype = np.min_scalar_type(_codec_size(modality, vocabulary) - 1)
            codes.setdefault(modality, []).append(grid.reshape(-1).astype(dtype))
            offsets[modality] += grid.size
            roles.append(ROLES.index(role) + 1 if role else 0)
    arrays = {medium_name(m): np.concatenate(parts) for m, parts in sorted(codes.items())}
    arrays["spans"] = np.array(table, dtype=np.int32).reshape(-1, len(SEGMENT_COLUMNS))
    return arrays | ({"roles": np.array(roles, dtype=np.uint8)} if any(roles) else {})


def _check_segment(segment: Segment, vocabulary: Vocabulary) -> None:
    modality, codes = segment
    name = medium_name(modality)
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


def medium_name(modality: Modality) -> str:
    """As members and fields are called."""
    return modality.name.lower()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _cannot_write(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror or error}; free space or choose another place"
    )
