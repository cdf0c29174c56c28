"""Decontamination: which documents share runs of 13 words with evaluation sets.

The length is that of GPT-3 (arXiv 2005.14165, appendix C). A text of fewer words is compared as a
whole: with short documents, and with short lines of text files.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmpt.config import UserError
from mmpt.data.curate.text import grams, hash_words, words_of
from mmpt.data.remote import find_shards, local_copy
from mmpt.data.shards import Quarantine, read_documents
from mmpt.parts import Text

log = logging.getLogger(__name__)

LENGTH = 13  # words

# name -> the runs of a set, sorted uint64 (num_runs,)
Evaluations = dict[str, np.ndarray]


def runs_of(hashes: np.ndarray) -> np.ndarray:
    """The runs by which a text is known; hashes of its words -> uint64, empty without words."""
    return grams(hashes, min(LENGTH, len(hashes))) if len(hashes) else hashes


def load_evaluations(sets: Mapping[str, Sequence[str]]) -> Evaluations:
    """Read text files (UTF-8) and shards. Raises UserError for what cannot be read or is empty."""
    found: Evaluations = {}
    for name, paths in sets.items():
        runs = [runs_of(hash_words(words_of(text))) for path in paths for text in _texts(path)]
        found[name] = np.unique(np.concatenate(runs)) if runs else np.zeros(0, np.uint64)
        if not len(found[name]):
            raise UserError(f"evaluations.{name} holds no words; give text files or shards")
    return found


def overlap(hashes: np.ndarray, evaluations: Evaluations) -> dict[str, Any]:
    """The columns of a text: the set that holds most of its runs, and their share."""
    runs = runs_of(hashes)
    if not len(runs) or not evaluations:
        return {}
    shares = {name: float(np.isin(runs, known).mean()) for name, known in evaluations.items()}
    name = max(shares, key=lambda name: shares[name])
    return {"evaluation": name if shares[name] else None, "evaluation_share": shares[name]}


def fingerprint(evaluations: Evaluations) -> str:
    """What changes when a set changes."""
    digest = hashlib.sha256()
    for name, runs in sorted(evaluations.items()):
        digest.update(f"{name} {len(runs)} ".encode() + runs.tobytes())
    return digest.hexdigest()


def _texts(path: str) -> Iterator[str]:
    if not path.endswith(".txt"):
        bad = Quarantine()
        for document in read_documents(map(local_copy, find_shards([path])), bad):
            yield from (part.text for part in document.parts if isinstance(part, Text))
        if bad.count:
            log.warning("%s: %d bad samples are compared with nothing", path, bad.count)
        return
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the evaluation set {path}: {error}") from None
    yield text  # runs go across lines, which may be those of a page
    yield from (line for line in text.splitlines() if len(words_of(line)) < LENGTH)
