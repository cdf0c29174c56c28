"""What chance decides about a document: the order of its segments, and which one stands alone.

`draw` does it with a generator. `draw_many` gives the same for many documents at once, each with
numpy's `Philox` of its own key, from the definition of that generator (Salmon et al. 2011).

Legend: D documents, T segments of all of them.
"""

import numpy as np
from numpy.random import Generator, Philox

from mmpt.flat import offsets, ranges

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
FACTORS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
STEPS = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], dtype=np.uint64)
MOST = 8  # segments that are permuted for many documents at once; more are rare
BLOCKS = 3  # of Philox that give numbers for so many


def draw(
    rng: Generator, num_segments: int, num_candidates: int, free: bool, condition_drop: float
) -> tuple[list[int], int | None]:
    """The order of segments, and which candidate alone is kept, with chance `condition_drop`.

    Segments that are not `free` keep their order. Without candidates all are kept (None).
    """
    dropped = rng.random() < condition_drop
    places = rng.permutation(num_segments).tolist() if free else list(range(num_segments))
    return places, int(rng.integers(num_candidates)) if dropped and num_candidates else None


def draw_many(
    keys: np.ndarray,
    num_segments: np.ndarray,
    num_candidates: np.ndarray,
    free: np.ndarray,
    condition_drop: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The same for documents with `Generator(Philox(key=...))` of these keys, uint64 (D, 2).

    Orders int64 (T,), document after document, and candidates int64 (D,), -1 for None.
    """
    swaps = np.where(free, np.maximum(num_segments - 1, 0), 0)
    words = philox(keys, 1 if swaps.max(initial=0) < 3 else BLOCKS)
    chance = (words[:, 0] >> np.uint64(11)) * 2.0**-53  # as Generator.random
    dropped = (chance < condition_drop) & (num_candidates > 0)
    numbers = np.ascontiguousarray(words[:, 1:]).view("<u4")  # the low half of each comes first
    used = np.zeros(len(keys), dtype=np.int64)  # of these
    alone = swaps >= MOST  # need a generator of their own

    # as Generator.permutation: the last place is swapped with any up to it, then the one before
    table = np.tile(np.arange(MOST), (len(keys), 1))
    for last in range(MOST - 1, 0, -1):
        which = np.flatnonzero((swaps >= last) & ~alone)
        while which.size:
            alone[which] |= used[which] >= numbers.shape[1]
            which = which[~alone[which]]
            other = numbers[which, used[which]] & np.uint32((1 << last.bit_length()) - 1)
            used[which] += 1
            fits = other <= last  # others are drawn again
            here, there = which[fits], other[fits]
            table[here, last], table[here, there] = table[here, there], table[here, last]
            which = which[~fits]

    # as Generator.integers: multiplied (Lemire 2019), and drawn again in very few cases
    alone |= used >= numbers.shape[1]
    kept = np.full(len(keys), -1)
    which = np.flatnonzero(dropped & ~alone)
    below = num_candidates[which].astype(np.uint64)
    products = numbers[which, used[which]] * below
    kept[which] = products >> HALF
    alone[which] |= (products & LOW) < np.uint64(1 << 32) % below

    firsts = offsets(num_segments)[:-1]
    orders = ranges(np.zeros_like(firsts), num_segments)
    small = np.flatnonzero((swaps > 0) & ~alone)
    used = np.arange(MOST) < num_segments[small, None]
    orders[(firsts[small, None] + np.arange(MOST))[used]] = table[small][used]
    for place in np.flatnonzero(alone).tolist():
        rng = Generator(Philox(key=keys[place]))
        number, first = int(num_segments[place]), firsts[place]
        orders[first : first + number], chosen = draw(
            rng, number, int(num_candidates[place]), bool(free[place]), condition_drop
        )
        kept[place] = -1 if chosen is None else chosen
    return orders, kept


def philox(keys: np.ndarray, num_blocks: int = 1) -> np.ndarray:
    """The first words of Philox4x64-10 of each key, as numpy counts: uint64 (D, 4 blocks)."""
    blocks = []
    for counter in range(1, num_blocks + 1):
        key = keys.T.copy()
        left = np.zeros_like(key)  # words 0 and 2
        right = np.zeros_like(key)  # words 1 and 3
        left[0] = counter
        for step in range(10):
            if step:
                key += STEPS
            high, low = _multiply(left)
            left, right = high[::-1] ^ right ^ key, low[::-1]
        blocks += [left[0], right[0], left[1], right[1]]
    return np.stack(blocks, axis=1)


def _multiply(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both halves of the 128 bits of words times `FACTORS`, uint64 (2, D) each."""
    a, b = FACTORS >> HALF, FACTORS & LOW
    c, d = words >> HALF, words & LOW
    bd = b * d
    middle = a * d + (bd >> HALF)
    other = b * c + (middle & LOW)
    return a * c + (middle >> HALF) + (other >> HALF), words * FACTORS
