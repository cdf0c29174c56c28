"""The loader: token shards -> an endless sequence of packed rows that any run can resume.

The order of documents is a pure function of (seed, epoch, source): a keyed permutation that is
computed, not stored. So the state is three integers per source plus references to the pieces that
wait in the packer; on load they are read again. Sources are mixed by weights in tokens.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mmpt.config import UserError
from mmpt.data.layout import to_stream
from mmpt.data.pack import Packer, PackReport, Piece, split
from mmpt.data.shards import is_heldout
from mmpt.data.tokens import EncodedDocument, TokenShard, open_shards
from mmpt.stream import Rows, Stream
from mmpt.vocab import Vocabulary

FORMAT_VERSION = 1
MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Token shards that are mixed as one source."""

    shards: tuple[str, ...]  # paths, folders or globs
    weight: float = 1.0  # its part of the tokens, relative to the other sources


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read and how it is packed."""

    sources: dict[str, SourceConfig]
    rows: int = 16  # rows a batch
    length: int = 512  # ids a row
    buffer: int = 256  # documents that wait for a row they fit
    condition_drop: float = 0.1  # share of documents that lose their condition (guidance)

    def __post_init__(self) -> None:
        weights = [source.weight for source in self.sources.values()]
        if not weights or min(weights) < 0 or not sum(weights):
            raise UserError("data.sources needs weights of at least 0, one of them above 0")
        if min(self.rows, self.length, self.buffer) < 1:
            raise UserError("data.rows, data.length and data.buffer must be at least 1")


class Reference(NamedTuple):
    """Where a piece comes from: the `piece`-th of the document at `place` of a source's epoch."""

    source: str
    epoch: int
    place: int
    piece: int


@dataclass
class _Cursor:
    """The state of one source: the next document, and how many ids it has given."""

    epoch: int = 0
    place: int = 0
    tokens: int = 0


class Source:
    """The documents of several shards that are not held out, in a seeded order per epoch."""

    def __init__(self, name: str, shards: Sequence[TokenShard], seed: int) -> None:
        self.name = name
        self.shards = list(shards)
        self._numbers = [_for_training(shard) for shard in shards]
        self._starts = np.concatenate([[0], np.cumsum([len(each) for each in self._numbers])])
        self._key = mix_keys(seed, _hash(name))
        if not len(self):
            raise UserError(f"source {name!r} has no documents that are not held out")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def number(self, epoch: int, place: int) -> int:
        """Which document stands at `place` of an epoch."""
        return permute(place, len(self), mix_keys(self._key, epoch))

    def read(self, number: int) -> tuple[EncodedDocument, TokenShard]:
        """A document by number, and the shard it is from."""
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        shard = self.shards[place]
        return shard[int(self._numbers[place][number - int(self._starts[place])])], shard

    def rng(self, epoch: int, number: int) -> np.random.Generator:
        """The generator of a document in an epoch."""
        key = (mix_keys(self._key, epoch), mix_keys(self._key ^ MASK, number))
        return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))

    @property
    def fingerprint(self) -> str:
        """Changes when shards are added, removed or reordered."""
        content = [
            (shard.path.name, len(shard), sorted(shard.counts.items()), shard.notes)
            for shard in self.shards
        ]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


class Loader(Iterator[Rows]):
    """Batches of packed rows, for ever; `state_dict` after any batch resumes there."""

    def __init__(self, config: DataConfig, vocabulary: Vocabulary, *, seed: int) -> None:
        self.config, self.vocabulary, self.seed = config, vocabulary, seed
        self.sources = {
            name: Source(name, open_shards(source.shards, vocabulary), seed)
            for name, source in sorted(config.sources.items())
            if source.weight > 0
        }
        self._pad = vocabulary.structure_id("<pad>")
        self._reset()

    @property
    def report(self) -> PackReport:
        """Fill, cuts and modality shares so far."""
        return self._packer.report

    def summary(self) -> dict[str, Any]:
        """What was read so far, as plain values."""
        return {
            "fill": self.report.fill,
            "cut": self.report.cut,
            "modality_shares": self.report.shares(),
            "source_shares": self.mix(),
            "epochs": self.epochs(),
        }

    def mix(self) -> dict[str, float]:
        """Source -> its share of the ids read so far."""
        total = max(sum(cursor.tokens for cursor in self._cursors.values()), 1)
        return {name: cursor.tokens / total for name, cursor in self._cursors.items()}

    def epochs(self) -> dict[str, float]:
        """Source -> how often its documents were read."""
        return {
            name: cursor.epoch + cursor.place / len(self.sources[name])
            for name, cursor in self._cursors.items()
        }

    def __next__(self) -> Rows:
        streams = [self._next_row() for _ in range(self.config.rows)]
        return Rows.pack(streams, self.config.length, self._pad)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and small: it does not grow with what was read."""
        return {
            "format_version": FORMAT_VERSION,
            "settings": self._settings(),
            "cursors": {name: asdict(cursor) for name, cursor in self._cursors.items()},
            "residue": [list(reference) for reference in self._packer.residue],
            "report": asdict(self.report),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; refuses a state of other data or settings."""
        for key, ours in self._settings().items():
            if (theirs := state["settings"].get(key)) != ours:
                raise UserError(
                    f"the loader's state has {key} = {theirs}, this recipe {ours}; start a new run "
                    "or restore the old value"
                )
        self._reset()
        self._cursors = {name: _Cursor(**cursor) for name, cursor in state["cursors"].items()}
        read = lru_cache(maxsize=4)(self._read_pieces)  # a document's pieces stand together
        for entry in state["residue"]:
            reference = Reference(*entry)
            self._packer.add(Piece(reference, read(*reference[:3])[reference.piece]))
        self._packer.report = PackReport(**state["report"] | {"ids": dict(state["report"]["ids"])})

    def _settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "length": self.config.length,
            "buffer": self.config.buffer,
            "condition_drop": self.config.condition_drop,
            "sources": {name: source.fingerprint for name, source in self.sources.items()},
        }

    def _reset(self) -> None:
        self._cursors = {name: _Cursor() for name in self.sources}
        self._packer: Packer[Reference] = Packer(self.config.length)

    def _next_row(self) -> list[Stream]:
        while len(self._packer) < self.config.buffer:
            self._read_next()
        return self._packer.row()

    def _read_next(self) -> None:
        name = self._choose()
        cursor = self._cursors[name]
        pieces = self._read_pieces(name, cursor.epoch, cursor.place)
        for number, stream in enumerate(pieces):
            self._packer.add(Piece(Reference(name, cursor.epoch, cursor.place, number), stream))
        self.report.cut += len(pieces) > 1
        cursor.tokens += sum(map(len, pieces))
        cursor.place += 1
        if cursor.place == len(self.sources[name]):
            cursor.epoch, cursor.place = cursor.epoch + 1, 0

    def _choose(self) -> str:
        """The source that lags most behind its share of all ids so far."""
        weights = {name: self.config.sources[name].weight for name in self.sources}
        total, whole = (
            sum(cursor.tokens for cursor in self._cursors.values()),
            sum(weights.values()),
        )
        return max(
            weights,
            key=lambda name: (
                weights[name] / whole * (total + 1) - self._cursors[name].tokens,
                name,
            ),
        )

    def _read_pieces(self, name: str, epoch: int, place: int) -> list[Stream]:
        source = self.sources[name]
        number = source.number(epoch, place)
        document, shard = source.read(number)
        stream = to_stream(
            document,
            self.vocabulary,
            source.rng(epoch, number),
            separator=shard.separator,
            condition_drop=self.config.condition_drop,
        )
        return split(stream, self.config.length)


def permute(place: int, size: int, key: int) -> int:
    """The image of `place` under a keyed permutation of range(size): nothing is stored.

    A Feistel network over the next even number of bits, walked until it lands inside (Black and
    Rogaway 2002). Integers only, so that no library version can change the order.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for step in range(6):
            left, right = right, left ^ (mix_keys(key + step, right) & mask)
        place = left << half | right
        if place < size:
            return place


def mix_keys(key: int, value: int) -> int:
    """A 64-bit hash of two integers (splitmix64's finaliser, twice)."""
    for word in (value, key):
        key = (key + word * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & MASK
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & MASK
        key ^= key >> 31
    return key


def _for_training(shard: TokenShard) -> np.ndarray:
    kept = [not is_heldout(base) for base in shard.bases]
    return np.flatnonzero(kept).astype(np.int32)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
