"""The order of documents: a keyed permutation per epoch that is computed, not stored.

A source is an endless sequence of documents, a pure function of (seed, source): document `number`
is the one at place `number % len` of epoch `number // len`. So the state of a reader is an integer.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.random import Generator, Philox

from mmpt.config import UserError
from mmpt.data.blocks import BlockLayout
from mmpt.data.layout import to_stream
from mmpt.data.segments import SegmentIndex
from mmpt.data.shards import is_heldout
from mmpt.data.tokens import EncodedDocument, TokenShard
from mmpt.flat import Streams, offsets
from mmpt.stream import Stream
from mmpt.vocab import Vocabulary

MASK = (1 << 64) - 1
PART = 1 << 16  # ids that are laid out at once: 1 MB


class Source(Protocol):
    """What a mix reads; anything that can find a document again by its number is one.

    A stream asks for rising numbers; only when a run goes on does it ask for some of them again.
    One that can lay out many at once is a `BlockSource`, and is asked ahead of time.
    """

    name: str

    def __len__(self) -> int:
        """The number of documents of an epoch."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the sequence does."""
        ...

    def stream(self, number: int) -> Stream:
        """Document `number` of the endless sequence, laid out."""
        ...


@runtime_checkable
class BlockSource(Source, Protocol):
    """A source that lays out many documents in hardly more time than one."""

    def streams(self, numbers: np.ndarray) -> Iterator[Streams]:
        """Documents int64 (D,) of the endless sequence, in parts of bounded size."""
        ...


class ShardSource:
    """The documents of several token shards that are not held out, in a seeded order per epoch."""

    def __init__(
        self,
        name: str,
        shards: Sequence[TokenShard],
        vocabulary: Vocabulary,
        *,
        seed: int,
        condition_drop: float,
        masked_prompts: bool = False,
    ) -> None:
        self.name, self.vocabulary, self.condition_drop = name, vocabulary, condition_drop
        self.masked_prompts = masked_prompts
        self.shards = list(shards)
        self._index = SegmentIndex(shards)
        self._starts = offsets([len(shard) for shard in shards])
        kept = [not is_heldout(base) for shard in shards for base in shard.bases]
        self._numbers = np.flatnonzero(kept).astype(np.min_scalar_type(len(kept)))
        separators = [shard.separator for shard in shards]
        self._layout = BlockLayout(
            vocabulary, separators, condition_drop, masked_prompts=masked_prompts
        )
        self._key = mix_keys(seed, _hash(name))
        if not len(self):
            raise UserError(f"source {name!r} has no documents that are not held out")

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def fingerprint(self) -> str:
        """Changes when shards are added, removed or reordered."""
        content = [
            (shard.path.name, len(shard), sorted(shard.counts.items()), shard.notes)
            for shard in self.shards
        ]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def streams(self, numbers: np.ndarray) -> Iterator[Streams]:
        """Documents int64 (D,) of the endless sequence, their orders and conditions drawn anew.

        In parts of at most `PART` ids, or of one document.
        """
        chosen, keys = self._choose(numbers)
        segments = self._index.find(self._numbers[chosen].astype(np.int64))
        return self._layout.lay_out(segments, keys, PART)

    def stream(self, number: int) -> Stream:
        """One document, laid out by itself: slower, and what `streams` is measured against."""
        [chosen], [key] = self._choose(np.array([number]))
        document, separator = self.read(int(chosen))
        return to_stream(
            document,
            self.vocabulary,
            Generator(Philox(key=key)),
            separator=separator,
            condition_drop=self.condition_drop,
            masked_prompts=self.masked_prompts,
        )

    def number(self, epoch: int, place: int) -> int:
        """Which document stands at `place` of an epoch."""
        [chosen], _ = self._choose(np.array([epoch * len(self) + place]))
        return int(chosen)

    def read(self, number: int) -> tuple[EncodedDocument, np.ndarray]:
        """A document by its number among those that are not held out, and its separator."""
        inside = int(self._numbers[number])
        place = int(np.searchsorted(self._starts, inside, side="right")) - 1
        shard = self.shards[place]
        return shard[inside - int(self._starts[place])], shard.separator

    def _choose(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which documents these are, int64 (D,), and the keys of their chances, uint64 (D, 2)."""
        epochs, places = np.divmod(numbers.astype(np.uint64), np.uint64(len(self)))
        order = mix_keys(self._key, epochs)
        chosen = permute(places, len(self), order)
        return chosen.astype(np.int64), np.stack(
            [order, mix_keys(self._key ^ MASK, chosen)], axis=1
        )


def permute(places: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """The images of places under keyed permutations of range(size), all uint64: nothing is stored.

    A Feistel network over the next even number of bits, walked until it lands inside (Black and
    Rogaway 2002). Integers only, so that no library version can change the order.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    places, outside = places.copy(), np.arange(len(places))
    while outside.size:
        left, right, key = places[outside] >> half, places[outside] & mask, keys[outside]
        for step in range(6):
            left, right = right, left ^ (mix_keys(key + np.uint64(step), right) & mask)
        places[outside] = left << half | right
        outside = outside[places[outside] >= size]
    return places


def mix_keys(key: Any, value: Any) -> Any:
    """A 64-bit hash of two integers, or arrays uint64 of them (splitmix64's finaliser, twice)."""
    for word in (value, key):
        key = (key + (word * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15 & MASK)) & MASK
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & MASK
        key ^= key >> 31
    return key


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
