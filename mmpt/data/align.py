"""When each word of a transcript is said: CTC forced alignment on the letters of a speech codec.

A speech codec learned to spell what it hears from its own codes (`SpeechCodec.spell`, 50 times a
second). The best path of the transcript's letters through that spelling says about when each one is
heard; between the last letter of a word and the first of the next, the quietest place parts them.
What cannot be said in that time, or scores too badly, is refused: then the transcript belongs to
another sound.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmpt.config import UserError
from mmpt.parts import Audio

if TYPE_CHECKING:
    from torch import Tensor

    from mmpt.tokenizers.speech import SpeechCodec

MAX_SECONDS = 120  # memory grows with the square of it
# nats a letter; of data/sampler's sets at most 3 % of texts of other documents pass (1.1 % of all),
# and 2 % of the right ones do not
MIN_SCORE = -3.2
STEP = 0.02  # seconds between two letters that can be heard
PAUSE = 0.05  # seconds of which the quietest are looked for


@dataclass(frozen=True)
class Alignment:
    """words: (start, end) in seconds of each word, words being what white space parts.

    One ends where the next begins, the first begins at 0 and the last ends with the sound, so that
    a cut loses nothing. score: log likelihood of the best path in nats a letter.
    """

    words: tuple[tuple[float, float], ...]
    score: float


def align(
    codec: "SpeechCodec", sound: Audio, text: str, *, min_score: float = MIN_SCORE
) -> Alignment:
    """The words of `text` in `sound`. Raises UserError when the two do not fit.

    A word without any letter that the codec spells (a number in digits) begins and ends where the
    word before it ends.
    """
    if sound.seconds > MAX_SECONDS:
        raise UserError(
            f"no alignment: the sound takes {sound.seconds:.0f} s; cut it to {MAX_SECONDS} s"
        )
    words = [_letters(word) for word in text.split()]
    spelled = [word for word in words if word]
    if not spelled:
        raise UserError("no alignment: the text has no letter that the codec spells")
    heard = sound.resample(codec.sample_rate)
    places, score = _best_path(_chances(codec, heard), spelled)
    if score < min_score:
        raise UserError(
            f"no alignment: the text scores {score:.2f} nats a letter, needs {min_score}; "
            "it may belong to another sound"
        )
    cuts = [0.0, *_quietest(heard, places), sound.seconds]
    times, count = [], 0
    for word in words:
        times.append((cuts[count], cuts[count + bool(word)]))
        count += bool(word)
    return Alignment(tuple(times), score)


def _letters(word: str) -> list[int]:
    """Classes of the letters that the codec spells; 0 is blank, so they count from 1."""
    from mmpt.tokenizers.speech import CHARACTERS

    return [CHARACTERS.index(c) + 1 for c in word.lower() if c in CHARACTERS]


def _chances(codec: "SpeechCodec", sound: Audio) -> "Tensor":
    """Log likelihood of each class, float (1, steps, classes)."""
    import torch

    from mmpt.process import one_thread

    with one_thread(), torch.inference_mode():
        codes = codec.encode(torch.from_numpy(sound.wave)[None].to(codec.device))
        logits = codec.spell(codec.quantizer.lookup(codes))
    return logits.float().log_softmax(-1).cpu()


def _best_path(
    chances: "Tensor", words: Sequence[Sequence[int]]
) -> tuple[list[tuple[float, float]], float]:
    """Between which seconds each two words part, and the score.

    From where the last letter of a word begins to where the first letter of the next ends.
    """
    import torch
    import torchaudio.functional as F

    space = _letters(" ")[0]
    target = [letter for word in words for letter in (space, *word)][1:]
    repeats = sum(a == b for a, b in itertools.pairwise(target))
    if chances.shape[1] < len(target) + repeats:
        raise UserError(
            f"no alignment: {len(target)} letters do not fit into {chances.shape[1] * STEP:.1f} s; "
            "the text may belong to another sound"
        )
    # a copy, because what was made in inference mode has no gradient to look for
    path, scores = F.forced_align(chances.clone(), torch.tensor([target], dtype=torch.int32))
    letters = F.merge_tokens(path[0], scores[0])
    places, count = [], 0
    for word in words[:-1]:
        count += len(word)
        places.append((letters[count - 1].start * STEP, letters[count + 1].end * STEP))
        count += 1
    return places, float(scores.sum()) / len(target)


def _quietest(sound: Audio, places: Sequence[tuple[float, float]]) -> Iterator[float]:
    """Seconds of the quietest pause in each place, one after another."""
    size, last = round(PAUSE * sound.sample_rate), 0
    total = np.cumsum(np.square(sound.wave, dtype=np.float64))
    loud = total[size:] - total[:-size]  # of the `size` samples behind each
    for begin, end in places:
        # two cuts are never at one place, however short the word between them
        first = max(round(begin * sound.sample_rate), last + 1)
        stop = max(round(end * sound.sample_rate) - size, first + 1)
        window = loud[first:stop]
        last = first + (int(window.argmin()) + size // 2 if len(window) else 0)
        yield last / sound.sample_rate
