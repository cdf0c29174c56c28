"""How many nats a model needs per held-out id, beside baselines that know less.

Everything is per id, for the same ids: -log p(id | what came before). The model's p is the full
softmax over the vocabulary: nothing is masked, neither the grammar that decoding holds to nor the
codes that training never used. Masking could only flatter the model, and would make a held-out code
that training never saw infinitely unlikely. The baselines are told the medium of each id and
smooth towards a uniform over the ids of that medium; every smoothing strength is chosen on the
training ids by leaving one out.

Legend: N ids of a document, B rows, L row length.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mmpt.config import UserError
from mmpt.model.transformer import Decoder
from mmpt.stream import Rows, Span, Stream
from mmpt.vocab import Modality, Vocabulary

STRENGTHS = tuple(2.0**k for k in range(-6, 13))  # pseudo-counts tried for a smoothing
CHUNK = 2048  # ids whose scores are held at once


def token_nats(model: Decoder, rows: Rows) -> torch.Tensor:
    """float32 (B, L): -log p of each id given those before it in its document.

    0 for the first id of a document, for which the model has nothing to go by, and for pads.
    """
    return token_scores(model, rows).nats


class TokenScores(NamedTuple):
    """Of each id, (B, L): -log p as float32, and bool: no other id has a higher p."""

    nats: torch.Tensor
    best: torch.Tensor


@torch.no_grad()
def token_scores(model: Decoder, rows: Rows) -> TokenScores:
    """`token_nats`, and whether the model would have chosen the id; 0 and False where it is 0."""
    hidden = model(
        rows.ids,
        modality=rows.modality,
        position=rows.position,
        document=rows.document,
        axes=model.axes_of(rows),
    )
    nats = torch.zeros(rows.ids.shape, device=hidden.device)
    inside = (rows.document[:, 1:] == rows.document[:, :-1]) & (rows.document[:, 1:] >= 0)
    states, labels = hidden[:, :-1][inside], rows.ids[:, 1:][inside]
    parts, hits = [nats.new_zeros(0)], [inside.new_zeros(0)]
    for state, label in zip(states.split(CHUNK), labels.split(CHUNK), strict=True):
        logits = model.logits(state)
        parts.append(F.cross_entropy(logits, label, reduction="none").float())
        hits.append(logits.argmax(-1) == label)
    best = torch.zeros_like(rows.ids, dtype=torch.bool)
    nats[:, 1:][inside], best[:, 1:][inside] = torch.cat(parts), torch.cat(hits)
    return TokenScores(nats, best)


def unigram(
    train: Sequence[Stream], heldout: Sequence[Stream], vocabulary: Vocabulary, modality: Modality
) -> list[np.ndarray]:
    """Nats of each held-out id (N,) under the frequencies of training; 0 at ids of other media."""
    p = _unigram(train, vocabulary, modality)
    return [_place(p[s.ids], _content(s, vocabulary, modality)) for s in heldout]


def bigram(
    train: Sequence[Stream], heldout: Sequence[Stream], vocabulary: Vocabulary, modality: Modality
) -> list[np.ndarray]:
    """Nats of each held-out id (N,) given the id before it, smoothed towards the unigram."""

    def contexts(stream: Stream) -> np.ndarray:
        return np.concatenate([[-1], stream.ids[:-1]])

    return _smoothed(train, heldout, vocabulary, modality, contexts)


def position_unigram(
    train: Sequence[Stream], heldout: Sequence[Stream], vocabulary: Vocabulary, modality: Modality
) -> list[np.ndarray]:
    """Nats of each held-out code (N,) under the frequencies at its place of its grid."""
    grids: dict[tuple[int, int, int], int] = {}
    return _smoothed(train, heldout, vocabulary, modality, lambda s: _places(s, modality, grids))


def previous_frame(
    train: Sequence[Stream], heldout: Sequence[Stream], vocabulary: Vocabulary
) -> list[np.ndarray]:
    """Nats of each held-out video code (N,): the code of the frame before, kept with probability c.

    p = c [same code] + (1 - c) unigram; c is the most likely one on the training videos. The first
    frame, which has none before it, is by `position_unigram`.
    """
    modality = Modality.VIDEO
    p = _unigram(train, vocabulary, modality)
    pairs = [
        (stream.ids[now], stream.ids[before]) for stream in train for now, before in _later(stream)
    ]
    if not pairs:
        return position_unigram(train, heldout, vocabulary, modality)
    now, before = (np.concatenate(side) for side in zip(*pairs, strict=True))
    keep = _best_mixture((now == before).astype(float), p[now])
    out = position_unigram(train, heldout, vocabulary, modality)
    for stream, nats in zip(heldout, out, strict=True):
        for now, before in _later(stream):
            ids = stream.ids[now]
            nats[now] = -np.log(keep * (ids == stream.ids[before]) + (1 - keep) * p[ids])
    return out


class Interval(NamedTuple):
    """A mean with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float


def paired_interval(
    worse: Sequence[float],
    better: Sequence[float],
    num_ids: Sequence[float],
    *,
    generator: np.random.Generator,
    num_draws: int = 2000,
) -> Interval:
    """Mean of (worse - better) in nats per id, with documents drawn again (paired bootstrap).

    worse, better: summed nats of each document under two conditions. num_ids: its ids.
    """
    difference = np.asarray(worse, dtype=np.float64) - np.asarray(better, dtype=np.float64)
    count = np.asarray(num_ids, dtype=np.float64)
    if not len(difference) or not len(difference) == len(count) or not count.sum():
        raise UserError(
            f"{len(difference)} differences and {len(count)} counts; give one each per document"
        )
    drawn = generator.integers(len(count), size=(num_draws, len(count)))
    means = difference[drawn].sum(1) / count[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(difference.sum() / count.sum()), float(low), float(high))


def _content(stream: Stream, vocabulary: Vocabulary, modality: Modality) -> np.ndarray:
    # bool (N,): the medium's own ids; structure and sizes stand in text, but say nothing of it
    return (stream.modality == modality) & _possible(vocabulary, modality)[stream.ids]


def _possible(vocabulary: Vocabulary, modality: Modality) -> np.ndarray:
    # bool (vocabulary,): the ids that content of the medium can have
    possible = np.zeros(len(vocabulary), dtype=bool)
    if modality == Modality.TEXT:
        possible[: vocabulary.num_text] = True
    else:
        for code_range in vocabulary.ranges_of(modality):
            possible[code_range.start : code_range.stop] = True
    return possible


def _place(p: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    # nats where `chosen`, 0 elsewhere and at the first id, which is given to the model too
    chosen = chosen & (np.arange(len(p)) > 0)
    nats = np.zeros(len(p))
    nats[chosen] = -np.log(p[chosen])
    return nats


def _unigram(train: Iterable[Stream], vocabulary: Vocabulary, modality: Modality) -> np.ndarray:
    # float64 (vocabulary,): frequencies of the medium's ids, smoothed towards uniform
    counts = np.zeros(len(vocabulary))
    for stream in train:
        content = _content(stream, vocabulary, modality)
        counts += np.bincount(stream.ids[content], minlength=len(counts))
    if not counts.sum():
        raise UserError(f"no {modality.name.lower()} ids to learn a baseline from")
    possible = _possible(vocabulary, modality)
    uniform = possible / possible.sum()
    total = np.full_like(counts, counts.sum())
    strength = _best_strength(counts, total, uniform, weight=counts)
    return (counts + strength * uniform) / (counts.sum() + strength)


def _smoothed(
    train: Sequence[Stream],
    heldout: Sequence[Stream],
    vocabulary: Vocabulary,
    modality: Modality,
    contexts: Callable[[Stream], np.ndarray],
) -> list[np.ndarray]:
    # p(id | context) = (count + b unigram(id)) / (context's count + b)
    p = _unigram(train, vocabulary, modality)
    size = len(vocabulary)

    def keys(stream: Stream) -> np.ndarray:
        return (contexts(stream) + 1) * size + stream.ids

    seen = np.concatenate([keys(s)[_content(s, vocabulary, modality)] for s in train])
    pair, count = np.unique(seen, return_counts=True)
    context, first = np.unique(pair // size, return_inverse=True)
    total = np.bincount(first, weights=count)
    strength = _best_strength(count, total[first], p[pair % size], weight=count)
    out = []
    for stream in heldout:
        key = keys(stream)
        number = _lookup(pair, count, key)
        of_context = _lookup(context, total, key // size)
        q = (number + strength * p[stream.ids]) / (of_context + strength)
        out.append(_place(q, _content(stream, vocabulary, modality)))
    return out


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    # values at sorted keys; 0 where a key is missing
    index = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0.0)


def _best_strength(
    count: np.ndarray, total: np.ndarray, prior: np.ndarray, *, weight: np.ndarray
) -> float:
    # leave-one-out likelihood of the training ids under (count - 1 + b prior) / (total - 1 + b)
    chosen = weight > 0
    count, total, prior, weight = (x[chosen] for x in (count, total, prior, weight))
    nats = [-(weight * np.log((count - 1 + b * prior) / (total - 1 + b))).sum() for b in STRENGTHS]
    return STRENGTHS[int(np.argmin(nats))]


def _best_mixture(same: np.ndarray, other: np.ndarray) -> float:
    # the c in (0, 1) that maximises sum log(c same + (1 - c) other), by expectation maximisation
    keep = 0.5
    for _ in range(100):
        mixed = keep * same + (1 - keep) * other
        keep = float(np.clip((keep * same / mixed).mean(), 1e-6, 1 - 1e-6))
    return keep


def _places(
    stream: Stream, modality: Modality, grids: dict[tuple[int, int, int], int]
) -> np.ndarray:
    # int64 (N,): a number for each (grid, place in it), grids counted in `grids`; -1 outside spans
    out = np.full(len(stream), -1, dtype=np.int64)
    for span in stream.spans:
        if span.modality == modality:
            first = grids.setdefault(span.grid, len(grids)) << 20
            out[span.start : span.start + span.length] = first + np.arange(span.length)
    return out


def _later(stream: Stream) -> list[tuple[slice, slice]]:
    # per video span: the codes from the second frame on, and those one frame before them
    out = []
    for span in stream.spans:
        if span.modality == Modality.VIDEO and span.grid[0] > 1:
            out.append(_shifted(span))
    return out


def _shifted(span: Span) -> tuple[slice, slice]:
    frame, stop = span.grid[1] * span.grid[2], span.start + span.length
    return slice(span.start + frame, stop), slice(span.start, stop - frame)
