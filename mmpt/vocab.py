"""The one id space: text ids, then structure ids, then one contiguous range per codebook.

A vocabulary is built from codec fingerprints and saved as JSON. Shards and checkpoints carry its
fingerprint; what was made with another vocabulary is refused. Image and video of one codec share
one range. Structure ids are never produced from user text, because the text codec's ids end where
they begin.

A codec with Q codebooks has Q ranges, in their order, and its codes (..., n, Q) are flattened frame
by frame into a grid (..., n Q): one id a position, and position i is of codebook i mod Q.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path

import numpy as np

from mmpt.config import UserError, write_atomic

FORMAT_VERSION = 2  # 1 knows one codebook a medium, and is still written where that is enough
NUM_SIZES = 1024
STRUCTURE = (
    "<pad>",  # fills a row; weight 0, attended by nobody
    "<bod>",  # begin of document
    "<eod>",  # end of document
    "<null>",  # stands for a dropped condition (classifier-free guidance)
    "<boi>",
    "<eoi>",
    "<bov>",
    "<eov>",
    "<boa>",
    "<eoa>",
    "<user>",  # begins a turn of a conversation, and ends the one before it
    "<assistant>",
)
ROLES = ("user", "assistant")  # of turns, each of which begins by the structure id of its name
NUM_STRUCTURE = 32  # room for later structure ids without moving the ranges behind them
NUM_FINGERPRINTED = 10  # later names are of ids that no older file uses: it means what it meant


class Modality(IntEnum):
    """The medium that an id belongs to; structure ids count as text."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    SPEECH = 3


MEDIA = (Modality.IMAGE, Modality.VIDEO, Modality.SPEECH)
BEGIN = {Modality.IMAGE: "<boi>", Modality.VIDEO: "<bov>", Modality.SPEECH: "<boa>"}
END = {Modality.IMAGE: "<eoi>", Modality.VIDEO: "<eov>", Modality.SPEECH: "<eoa>"}
# how many sizes follow the begin id: height width; frames height width; length
NUM_GRID_SIZES = {Modality.IMAGE: 2, Modality.VIDEO: 3, Modality.SPEECH: 1}


@dataclass(frozen=True)
class CodeRange:
    """One codebook's ids: `start <= id < start + size`; `used`: local codes seen in training."""

    name: str
    start: int
    size: int
    fingerprints: Mapping[str, str]  # modality name -> fingerprint of the codec that makes it
    used: tuple[int, ...] | None = None  # None: all

    def __post_init__(self) -> None:
        if self.used is not None and not all(0 <= code < self.size for code in self.used):
            raise UserError(f"{self.name}: used codes must be in [0, {self.size})")

    @property
    def stop(self) -> int:
        """The first id behind this range."""
        return self.start + self.size


@dataclass(frozen=True)
class Vocabulary:
    """Maps text ids, structure names, sizes and local codes to ids and back."""

    num_text: int
    text_fingerprint: str
    ranges: tuple[CodeRange, ...]
    structure: tuple[str, ...] = field(default=STRUCTURE)

    @classmethod
    def build(
        cls,
        *,
        num_text: int,
        text_fingerprint: str,
        codebooks: Sequence[tuple[str, int, Mapping[str, str], Sequence[int] | None]],
    ) -> "Vocabulary":
        """Lay out ranges for `codebooks`: (name, size, {modality: fingerprint}, used or None)."""
        start, ranges = num_text + NUM_STRUCTURE + NUM_SIZES, []
        for name, size, fingerprints, used in codebooks:
            used = None if used is None else tuple(int(code) for code in used)
            ranges.append(CodeRange(name, start, size, dict(fingerprints), used))
            start += size
        return cls(num_text, text_fingerprint, tuple(ranges))

    def __len__(self) -> int:
        return self.ranges[-1].stop if self.ranges else self.num_text + NUM_STRUCTURE + NUM_SIZES

    def structure_id(self, name: str) -> int:
        """The id of `<boi>` and its kin."""
        return self.num_text + self.structure.index(name)

    def size_id(self, size: int) -> int:
        """The id of a size from 1 to 1,024."""
        if not 1 <= size <= NUM_SIZES:
            raise UserError(f"a span side of {size} codes does not fit; use 1 to {NUM_SIZES}")
        return self.num_text + NUM_STRUCTURE + size - 1

    def size_of(self, token: int) -> int | None:
        """The size that an id stands for, or None when it is no size."""
        size = token - self.num_text - NUM_STRUCTURE + 1
        return size if 1 <= size <= NUM_SIZES else None

    def ranges_of(self, modality: Modality) -> tuple[CodeRange, ...]:
        """The code ranges of a medium, one a codebook; UserError when this vocabulary has none."""
        name = modality.name.lower()
        ranges = tuple(r for r in self.ranges if name in r.fingerprints)
        if not ranges:
            raise UserError(f"this vocabulary has no {name} codec")
        return ranges

    def range_of(self, modality: Modality) -> CodeRange:
        """The code range of a medium that has one codebook; raises UserError for any other."""
        first, *others = self.ranges_of(modality)
        if others:
            raise UserError(
                f"{modality.name.lower()} has {1 + len(others)} codebooks; one range is not enough"
            )
        return first

    def num_codebooks(self, modality: Modality) -> int:
        """How many ids one frame, or one cell of a grid, takes."""
        return len(self.ranges_of(modality))

    def ids_of(self, modality: Modality, codes: np.ndarray) -> np.ndarray:
        """The ids of local codes, int64 (..., n Q) flattened by frames; UserError for others."""
        starts, sizes = self._books(modality, codes.shape)
        bad = (codes < 0) | (codes >= sizes)
        if bad.any():
            size = sizes.reshape(-1)[bad.argmax()]
            raise UserError(f"{modality.name.lower()} codes must be in [0, {size})")
        return codes + starts

    def codes_of(self, modality: Modality, ids: np.ndarray) -> np.ndarray | None:
        """The inverse of `ids_of`; None when an id is not of the codebook of its position."""
        starts, sizes = self._books(modality, ids.shape)
        codes = ids - starts
        return None if ((codes < 0) | (codes >= sizes)).any() else codes

    def _books(self, modality: Modality, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        # the start and the size of the range of every position, both int64 `shape`
        ranges = self.ranges_of(modality)
        if shape[-1] % len(ranges):
            raise UserError(
                f"{shape[-1]} {modality.name.lower()} codes are no whole frames of {len(ranges)}"
            )
        book = np.arange(int(np.prod(shape))).reshape(shape) % len(ranges)
        starts, sizes = np.array([(r.start, r.size) for r in ranges]).T
        return starts[book], sizes[book]

    def has(self, modality: Modality) -> bool:
        """Whether ids of this medium exist here."""
        name = modality.name.lower()
        return modality == Modality.TEXT or any(name in r.fingerprints for r in self.ranges)

    def fingerprint_of(self, modality: Modality) -> str:
        """The fingerprint of the codec that makes the ids of a medium."""
        if modality == Modality.TEXT:
            return self.text_fingerprint
        return self.ranges_of(modality)[0].fingerprints[modality.name.lower()]

    @cached_property
    def allowed(self) -> dict[Modality, np.ndarray]:
        """Per medium a bool array (len(self),): the ids that may stand inside a span of it.

        For text: text ids and all structure ids and sizes. Codes never used are False.
        """
        masks = {}
        for modality in Modality:
            mask = np.zeros(len(self), dtype=bool)
            if modality == Modality.TEXT:
                mask[: self.num_text + len(self.structure)] = True
                mask[self.num_text + NUM_STRUCTURE :][:NUM_SIZES] = True
            else:
                for book in self._allowed_books[modality]:
                    mask |= book
            masks[modality] = mask
        return masks

    def allowed_at(self, modality: Modality, place: int) -> np.ndarray:
        """bool (len(self),): the ids that may stand at position `place` of a span of codes."""
        books = self._allowed_books[modality]
        return books[place % len(books)]

    @cached_property
    def _allowed_books(self) -> dict[Modality, list[np.ndarray]]:
        # per medium and codebook
        masks: dict[Modality, list[np.ndarray]] = {modality: [] for modality in MEDIA}
        for modality in filter(self.has, MEDIA):
            for code_range in self.ranges_of(modality):
                mask = np.zeros(len(self), dtype=bool)
                codes = slice(None) if code_range.used is None else list(code_range.used)
                mask[code_range.start : code_range.stop][codes] = True
                masks[modality].append(mask)
        return masks

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that gives ids their meaning (not over which codes are used)."""
        meaning = self._to_json()
        meaning["structure"] = meaning["structure"][:NUM_FINGERPRINTED]
        for code_range in meaning["ranges"]:
            code_range.pop("used")
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:16]

    def check(self, fingerprint: str, *, what: str) -> None:
        """Refuse `what` (a shard, a checkpoint) when it was made with another vocabulary."""
        if fingerprint != self.fingerprint:
            raise UserError(
                f"{what} was made with vocabulary {fingerprint}, this one is {self.fingerprint}; "
                "encode again with these codecs or load the matching ones"
            )

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_atomic(
            path, json.dumps(self._to_json() | {"fingerprint": self.fingerprint}, indent=1)
        )

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read what `save` wrote; refuses newer formats and edited files."""
        try:
            data = json.loads(Path(path).read_text())
            version = data["format_version"]
            if version > FORMAT_VERSION:
                raise UserError(
                    f"{path} has format {version}; this mmpt reads {FORMAT_VERSION}: upgrade"
                )
            ranges = tuple(
                CodeRange(r["name"], r["start"], r["size"], r["fingerprints"], _tuple(r["used"]))
                for r in data["ranges"]
            )
            names = tuple(data["structure"])
            names += STRUCTURE[len(names) :] if STRUCTURE[: len(names)] == names else ()
            vocabulary = cls(data["num_text"], data["text_fingerprint"], ranges, names)
            vocabulary.check(data["fingerprint"], what=str(path))
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"cannot read vocabulary {path}: {error.strerror}") from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is no vocabulary file: {error!r}") from None
        return vocabulary

    def _to_json(self) -> dict:
        media = [name for code_range in self.ranges for name in code_range.fingerprints]
        return {
            "format_version": 1 if len(set(media)) == len(media) else 2,
            "num_text": self.num_text,
            "text_fingerprint": self.text_fingerprint,
            "structure": list(self.structure),
            "ranges": [
                {
                    "name": r.name,
                    "start": r.start,
                    "size": r.size,
                    "fingerprints": dict(r.fingerprints),
                    "used": None if r.used is None else list(r.used),
                }
                for r in self.ranges
            ],
        }


def _tuple(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
