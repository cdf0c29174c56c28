"""Which codes occur in token shards: a head can mask those that never do."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmpt.data.shards import is_heldout
from mmpt.data.tokens import TokenShard
from mmpt.vocab import MEDIA, Modality, Vocabulary


def count_codes(paths: Iterable[str | Path], vocabulary: Vocabulary) -> dict[Modality, np.ndarray]:
    """How often each code occurs in the documents that are not held out.

    By medium int64 (codebooks, codec size); media that do not occur are left out.
    """
    totals: dict[Modality, np.ndarray] = {}
    for shard in map(TokenShard, paths):
        for document in shard:
            if is_heldout(document.base):
                continue
            for modality, codes in document.segments:
                size = shard.sizes[modality.name.lower()]
                num_books = 1 if modality == Modality.TEXT else vocabulary.num_codebooks(modality)
                shape = (num_books, size)
                counts = totals.setdefault(modality, np.zeros(shape, dtype=np.int64))
                np.add.at(counts, (np.arange(codes.size) % num_books, codes.reshape(-1)), 1)
    return totals


def with_used_codes(vocabulary: Vocabulary, counts: Mapping[Modality, np.ndarray]) -> Vocabulary:
    """The same vocabulary (and fingerprint), which knows which codes occur in training data."""
    by_name = {m.name.lower(): np.atleast_2d(count) for m, count in counts.items()}
    books = {m.name.lower(): vocabulary.ranges_of(m) for m in MEDIA if vocabulary.has(m)}
    ranges = []
    for code_range in vocabulary.ranges:
        names = [name for name in code_range.fingerprints if name in by_name]
        seen = [by_name[name][books[name].index(code_range)] for name in names]
        used = tuple(np.flatnonzero(sum(seen)).tolist()) if seen else None
        ranges.append(replace(code_range, used=used))
    return replace(vocabulary, ranges=tuple(ranges))
