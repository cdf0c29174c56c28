"""What can be read off hidden states by a linear classifier (Toto, arXiv 2501.05453, section 4).

The model sees the codes of one medium alone; their states after a middle layer are averaged. A
ridge regression on one-hot labels is fitted on training documents, its strength chosen by leaving
one out, and judged on held-out ones. Nothing is drawn at random.

Legend: N documents, D width, C classes.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmpt.data.layout import write_segments
from mmpt.data.tokens import EncodedDocument
from mmpt.eval.choices import share
from mmpt.eval.passes import Passes
from mmpt.stream import Stream, StreamBuilder
from mmpt.vocab import Modality, Vocabulary

STRENGTHS = 10.0 ** np.arange(-3, 6)  # of the ridge, beside a mean square of 1
Labelled = Sequence[tuple[EncodedDocument, str]]


def measure_probe(
    passes: Passes,
    vocabulary: Vocabulary,
    medium: Modality,
    train: Labelled,
    heldout: Labelled,
    separator: np.ndarray,
) -> dict[str, Any]:
    """The share of held-out labels that the states tell; empty where there is nothing to tell."""
    classes = sorted({label for _, label in train})
    heldout = [each for each in heldout if each[1] in classes]
    if len(classes) < 2 or not heldout:
        return {}
    streams = [lone_stream(d, vocabulary, medium, separator) for d, _ in (*train, *heldout)]
    layer = (len(passes.model.layers) - 1) // 2
    states = passes.pooled(streams, layer).numpy()
    labels = np.array([classes.index(label) for _, label in (*train, *heldout)])
    first = len(train)
    guessed = classify(states[:first], labels[:first], states[first:])
    right = int((guessed == labels[first:]).sum())
    commonest = max(Counter(labels[first:].tolist()).values()) / len(heldout)
    return share(right, len(heldout), chance=commonest) | {"classes": len(classes)}


def lone_stream(
    document: EncodedDocument, vocabulary: Vocabulary, medium: Modality, separator: np.ndarray
) -> Stream:
    """The segments of one medium; its ids weigh 1, all others 0."""
    builder = StreamBuilder(vocabulary).structure("<bod>", weight=0.0)
    segments = [segment for segment in document.segments if segment.modality == medium]
    write_segments(builder, segments, separator, separator_weight=0.0)
    stream = builder.build()
    stream.loss_weight *= stream.modality == medium
    return stream


def classify(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """train (N, D), labels int (N,) -> the likeliest label of each of `test` (M, D), int (M,)."""
    mean, scale = train.mean(0), train.std(0) + 1e-9
    x, y = (train - mean) / scale, np.eye(labels.max() + 1)[labels]
    offset = y.mean(0)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    projected = u.T @ (y - offset)
    best, weights = np.inf, np.zeros((x.shape[1], y.shape[1]))
    for strength in STRENGTHS * len(x):
        shrink = s**2 / (s**2 + strength)
        leverage = (u**2 @ shrink) + 1 / len(x)
        residual = (y - offset - u @ (shrink[:, None] * projected)) / (1 - leverage)[:, None]
        if (error := float(np.square(residual).sum())) < best:
            best, weights = error, vt.T @ ((s / (s**2 + strength))[:, None] * projected)
    return ((test - mean) / scale @ weights + offset).argmax(1)
