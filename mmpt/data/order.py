"""The order of documents: a keyed permutation per epoch that is computed, not stored.

A source is an endless sequence of documents, a pure function of (seed, source): document `number`
is the one at place `number % len` of epoch `number // len`. So the state of a reader is an integer.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.random import Generator, Philox

from mmpt.config import UserError
from mmpt.data.layout import to_stream
from mmpt.data.shards import is_heldout
from mmpt.data.tokens import EncodedDocument, TokenShard
from mmpt.stream import Stream, StreamBuilder
from mmpt.vocab import Vocabulary

MASK = (1 << 64) - 1


class Source(Protocol):
    """What a mix reads; anything that can find a document again by its number is one.

    A stream asks for rising numbers; only when a run goes on does it ask for some of them again.
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
    ) -> None:
        self.name, self.vocabulary, self.condition_drop = name, vocabulary, condition_drop
        self.shards = list(shards)
        self._numbers = [_for_training(shard) for shard in shards]
        self._starts = list(accumulate(map(len, self._numbers), initial=0))
        self._separators = [shard.separator for shard in shards]
        self._key = mix_keys(seed, _hash(name))
        self._last_epoch = -1, 0  # and its key
        self._builder = StreamBuilder(vocabulary)
        self._bits = Philox(key=np.zeros(2, dtype=np.uint64))
        self._fresh = self._bits.state
        self._rng = Generator(self._bits)
        if not len(self):
            raise UserError(f"source {name!r} has no documents that are not held out")

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def fingerprint(self) -> str:
        """Changes when shards are added, removed or reordered."""
        content = [
            (shard.path.name, len(shard), sorted(shard.counts.items()), shard.notes)
            for shard in self.shards
        ]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def stream(self, number: int) -> Stream:
        """Document `number` of the endless sequence, its order and condition drawn anew."""
        epoch, place = divmod(number, len(self))
        document, separator = self.read(chosen := self.number(epoch, place))
        # a fresh Philox of this key; making one asks the system for entropy, and takes longer
        key = (self._epoch_key(epoch), mix_keys(self._key ^ MASK, chosen))
        self._fresh["state"]["key"][:] = key
        self._bits.state = self._fresh
        return to_stream(
            document,
            self.vocabulary,
            self._rng,
            separator=separator,
            condition_drop=self.condition_drop,
            builder=self._builder,
        )

    def number(self, epoch: int, place: int) -> int:
        """Which document stands at `place` of an epoch."""
        return permute(place, len(self), self._epoch_key(epoch))

    def read(self, number: int) -> tuple[EncodedDocument, np.ndarray]:
        """A document by its number in the shards, and its shard's separator."""
        place = bisect_right(self._starts, number) - 1
        inside = self._numbers[place][number - self._starts[place]]
        return self.shards[place][int(inside)], self._separators[place]

    def _epoch_key(self, epoch: int) -> int:
        if self._last_epoch[0] != epoch:
            self._last_epoch = epoch, mix_keys(self._key, epoch)
        return self._last_epoch[1]


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
