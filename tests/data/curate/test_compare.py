"""Clusters of near-duplicates, beside what comparing all pairs finds."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from mmpt.data.curate.compare import NEAR_EDGES, TEXT_COPIES, picture_edges
from mmpt.data.curate.recipe import MAX_BITS
from mmpt.data.curate.text import annotate_text, hash_words


@pytest.mark.parametrize("bits", [0, 1, 3, MAX_BITS])
def test_pictures_within_so_many_bits_are_all_found(bits):
    rng = np.random.default_rng(bits)
    hashes = rng.integers(0, 2**64, 60, np.uint64)
    for change in range(1, 6):
        flips = rng.integers(0, 64, (60, change)).astype(np.uint64)
        near = hashes[:60].copy()
        for column in flips.T:
            near ^= np.uint64(1) << column
        hashes = np.concatenate([hashes, near])
    hashes = np.unique(np.append(hashes, np.array([0, 2**64 - 1], np.uint64)))
    with duckdb.connect() as base:
        table = pa.table({"member": np.arange(len(hashes)), "hash": hashes})
        base.register("hashes", table)
        found = picture_edges(base, bits)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = {(a, b) for a, b in zip(*np.nonzero(distance <= bits), strict=True) if a < b}
    assert set(zip(found["a"].tolist(), found["b"].tolist(), strict=True)) == expected
    assert bits == 0 or expected


def test_near_copies_of_texts_are_found_and_others_are_not():
    rng = np.random.default_rng(0)
    rows, words = [], [f"w{i}" for i in range(1000)]
    for original in range(20):
        text = list(rng.choice(words, 200))
        near, far = text.copy(), text.copy()
        near[rng.integers(200)] = "changed"  # 5 of 196 runs: similarity 0.95
        for place in range(0, 200, 12):
            far[place] = "changed"  # most runs but a few
        for kind in (text, near, far):
            sketch = annotate_text(" ".join(kind), kind, hash_words(kind))
            rows.append((original, sketch["text_hash"], sketch["text_minhash"]))
    _, hashes, sketches = zip(*rows, strict=True)
    table = {"id": range(60), "text_hash": hashes}
    types = pa.list_(pa.uint32())
    with duckdb.connect() as base:
        base.register(
            "documents", pa.table(table | {"text_minhash": pa.array(sketches, type=types)})
        )
        base.execute(TEXT_COPIES)
        found = base.execute(NEAR_EDGES, [0.8]).fetchnumpy()
    pairs = set(zip(found["a"].tolist(), found["b"].tolist(), strict=True))
    assert pairs == {(3 * each, 3 * each + 1) for each in range(20)}
