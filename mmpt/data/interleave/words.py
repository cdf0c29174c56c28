"""Which text a sound says, and when each of its words is heard."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmpt.config import UserError
from mmpt.data.align import align
from mmpt.data.entries import MAX_TIME
from mmpt.data.interleave.cuts import NoPairError, Original
from mmpt.parts import Audio, Text

if TYPE_CHECKING:
    from mmpt.data.interleave.templates import Tools

CODE_SECONDS = 0.08  # of one position of the speech codec


@dataclass(frozen=True)
class Pair:
    """The number of a sound, and those of the texts that it says, in order."""

    sound: int
    texts: list[int]


@dataclass(frozen=True)
class Words:
    """Words (or captions) of text part `of`: its characters up to `end`, heard until `until` s."""

    of: int
    end: int
    until: float


def find_pairs(original: Original) -> list[Pair]:
    """Sounds with what they say, in order. Raises NoPairError where that is not known.

    Several sounds belong to the texts that begin when they do. One sound says the texts that have
    times; else the only text, or the first of views of one idea.
    """
    sounds, texts, timed = original.of_type(Audio), original.of_type(Text), timed_texts(original)
    if len(sounds) > 1:
        begins = {original.time(text): text for text in timed}
        heard = {original.time(sound) for sound in sounds}
        if not len(timed) == len(begins) == len(sounds) or heard != begins.keys():
            raise NoPairError("several sounds, and not each has a text of the same time")
        return [Pair(sound, [begins[original.time(sound)]]) for sound in sounds]
    if not sounds:
        raise NoPairError("no sound")
    if not timed and len(texts) > 1 and original.document.order == "any":
        texts = texts[:1]
    if not timed and len(texts) != 1:
        raise NoPairError("no text, or several, that a sound may say")
    return [Pair(sounds[0], timed or texts)]


def timed_texts(original: Original) -> list[int]:
    """The texts that have times, in the order of the document."""
    return [index for index in original.of_type(Text) if original.time(index)]


def when_heard(original: Original, pair: Pair, tools: "Tools") -> list[Words]:
    """Words in order, each heard until the next begins; the last ones until the sound ends.

    Several texts have times, and each is heard as a whole. In a single one the words have the times
    of the json's "words", or those of an alignment.
    """
    texts, heard = pair.texts, original.sound(pair.sound)
    begin = (original.time(pair.sound) or (0.0, 0.0))[0]
    if len(texts) > 1:
        ends = [(index, len(original.text(index))) for index in texts]
        times = [original.time(index) or (0.0, 0.0) for index in texts]
    else:
        said = original.text(texts[0])
        ends = [(texts[0], end) for end in word_ends(said)]
        times = original.record.parts[texts[0]].get("words")
        if times is None:
            found = align(tools.speech, heard, said, min_score=tools.recipe.min_score).words
            times = [(start + begin, end + begin) for start, end in found]
        else:
            times = _parse_times(times, len(ends))
    middles = [(end + start) / 2 - begin for (_, end), (start, _) in itertools.pairwise(times)]
    until = [min(max(middle, 0.0), heard.seconds) for middle in middles] + [heard.seconds]
    words = [Words(of, end, time) for (of, end), time in zip(ends, until, strict=True)]
    return _join_short(words)


def word_ends(text: str) -> list[int]:
    """Characters where words end; white space belongs to the word behind it, as in ids of text."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return [*ends[:-1], len(text)]


def _parse_times(times: Any, count: int) -> list[list[float]]:
    try:
        # what is ragged or no number raises; NaN compares as false
        found = np.asarray(times, dtype=np.float64)
        good = found.shape == (count, 2) and bool(((found >= 0) & (found <= MAX_TIME)).all())
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        raise UserError(f"bad json: words must be a [start, end] in seconds for each of {count}")
    return found.tolist()


def _join_short(words: Sequence[Words]) -> list[Words]:
    """Words that are heard for less than a code are not told apart from those before them."""
    joined: list[Words] = []
    for word in words:
        since = [0.0, *(other.until for other in joined), word.until][-3:]
        short = min(b - a for a, b in itertools.pairwise(since)) < CODE_SECONDS
        if joined and short and joined[-1].of == word.of:
            joined.pop()
        joined.append(word)
    lengths = np.diff([0.0, *(word.until for word in joined)])
    if lengths.min() <= 0:
        raise UserError("bad times: a text has no sound; its start or end is wrong")
    return joined
