"""Does the right part have the highest likelihood among several? An early sign of understanding.

Documents are taken in groups of k; in a group, every one's given part is put before every one's
target: k x k log-likelihoods. Row i is right when its own target is its likeliest. A model that
ignores what it is given likes the same target best in all rows, and is right in 1 of k, exactly.
Long or rare targets are unlikely whatever is given, so the judgement is also made beside the mean
over the rows (the likelihood of a target whatever is given): still 1/k by chance, and sooner above.

Intervals take trials as independent. Random weights, too, may respond to what parts have in common
(lengths, plain pictures) in either sense: untrained models are at 1/k on average over seeds, and a
single one may lie somewhat off it. Watch for the rise over training, not for one small excess.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmpt.data.layout import to_conditioned_stream
from mmpt.data.tokens import EncodedDocument
from mmpt.eval.passes import Passes
from mmpt.vocab import Modality, Vocabulary

Z = 1.959964  # of 95%


def measure_choices(
    passes: Passes,
    vocabulary: Vocabulary,
    medium: Modality,
    sources: Sequence[Sequence[EncodedDocument]],
    separator: np.ndarray,
    *,
    candidates: int,
) -> dict[str, Any]:
    """Shares of right choices, text given `medium` and `medium` given text; empty without groups.

    Groups are of one source, so that what tells sources apart does not help.
    """
    groups = [g for documents in sources for g in _groups(documents, medium, candidates)]
    out = {}
    name = medium.name.lower()
    for target, title in ((Modality.TEXT, f"text given {name}"), (medium, f"{name} given text")):
        streams = [
            to_conditioned_stream(
                document, vocabulary, target, separator=separator, condition_from=given
            )
            for group in groups
            for given in group
            for document in group
        ]
        if streams:
            shape = (len(groups), candidates, candidates)
            out[title] = judge(-np.array(passes.nats(streams)).reshape(shape))
    return out


def judge(scores: np.ndarray) -> dict[str, Any]:
    """scores (groups, given, target): log-likelihoods, right ones on the diagonal.

    right: judged beside the mean over what is given, with its interval; right_plain: as they are.
    """
    groups, candidates, _ = scores.shape
    diagonal = np.arange(candidates)
    beside = scores - scores.mean(1, keepdims=True)
    right, plain = (int((each.argmax(2) == diagonal).sum()) for each in (beside, scores))
    return share(right, groups * candidates, chance=1 / candidates) | {
        "right_plain": round(plain / (groups * candidates), 4)
    }


def share(right: int, trials: int, *, chance: float) -> dict[str, Any]:
    """A share of right answers with its 95% interval (Wilson), beside what guessing gives."""
    middle = (right + Z * Z / 2) / (trials + Z * Z)
    half = Z / (trials + Z * Z) * math.sqrt(right * (trials - right) / trials + Z * Z / 4)
    values = {
        "right": right / trials,
        "low": middle - half,
        "high": middle + half,
        "chance": chance,
    }
    return {name: round(value, 4) for name, value in values.items()} | {"trials": trials}


def _groups(
    documents: Sequence[EncodedDocument], medium: Modality, size: int
) -> Iterator[list[EncodedDocument]]:
    """Documents of text and one medium, each idea and each text once, `size` at a time."""
    kept: dict[str, EncodedDocument] = {}
    texts: set[bytes] = set()
    for document in documents:
        segments = [s for s in document.segments if s.modality in (Modality.TEXT, medium)]
        text = b"".join(s.codes.tobytes() for s in segments if s.modality == Modality.TEXT)
        has_medium = any(segment.modality == medium for segment in segments)
        if document.order == "any" and text and has_medium and text not in texts:
            kept.setdefault(
                document.base, EncodedDocument(document.key, document.base, "any", segments)
            )
            texts.add(text)
    ordered = sorted(kept.values(), key=lambda each: zlib.crc32(each.key.encode()))
    for begin in range(0, len(ordered) - size + 1, size):
        yield ordered[begin : begin + size]
