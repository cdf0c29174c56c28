"""Word times: cuts lie where sentences meet, nothing is lost, and what does not fit is refused."""

import itertools
from functools import cache

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data.align import MAX_SECONDS, align
from mmpt.data.shards import Quarantine, read_documents
from mmpt.data.sources import sampler_shards
from mmpt.parts import Audio, Text
from mmpt.tokenizers import load
from mmpt.tokenizers.speech import SpeechCodec


@cache
def codec() -> SpeechCodec:
    found = load("speech-12hz")
    assert isinstance(found, SpeechCodec)
    return found


@cache
def sentences() -> list[tuple[str, np.ndarray]]:
    """Held-out sentences by one voice; each has 50 ms of silence at both ends."""
    [shard] = [path for path in sampler_shards() if path.name.startswith("voices-heldout")]
    found = []
    for document in read_documents([shard], Quarantine()):
        text, sound = document.parts
        assert isinstance(text, Text)
        assert isinstance(sound, Audio)
        if document.voices == ("espeak-ng:en-us+m3",):
            found.append((text.text, sound.resample(16_000).wave))
    return found[:3]


def joined() -> tuple[str, Audio, list[float], list[int]]:
    """Three sentences in one sound: where they meet in seconds, and which words begin there."""
    texts, waves = zip(*sentences(), strict=True)
    ends = np.cumsum([len(wave) for wave in waves])[:-1] / 16_000
    counts = np.cumsum([len(text.split()) for text in texts])[:-1]
    return " ".join(texts), Audio(np.concatenate(waves), 16_000), ends.tolist(), counts.tolist()


def test_a_cut_between_sentences_lies_in_the_silence_between_them():
    text, sound, ends, counts = joined()
    words = align(codec(), sound, text).words
    for end, count in zip(ends, counts, strict=True):
        assert words[count - 1][1] == words[count][0]
        assert words[count][0] == pytest.approx(end, abs=0.06)


def test_words_follow_each_other_from_the_start_of_the_sound_to_its_end():
    text, sound, _, _ = joined()
    words = align(codec(), sound, text).words
    assert len(words) == len(text.split())
    assert words[0][0] == 0
    assert words[-1][1] == sound.seconds
    assert all(start < end for start, end in words)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(words))


def test_another_sample_rate_gives_about_the_same_times():
    text, sound, _, _ = joined()
    other = align(codec(), sound.resample(24_000), text).words
    assert np.allclose(align(codec(), sound, text).words, other, atol=0.1)


def test_a_word_without_letters_takes_no_time():
    text, sound = sentences()[0]
    plain = align(codec(), Audio(sound, 16_000), text).words
    first, rest = text.split(maxsplit=1)
    marked = align(codec(), Audio(sound, 16_000), f"-- {first} 42 {rest.upper()}! --").words
    assert marked[0] == (0.0, 0.0)
    assert marked[2] == (plain[0][1], plain[0][1])
    assert marked[-1] == (plain[-1][1], plain[-1][1])
    assert (marked[1], *marked[3:-1]) == plain


def test_a_text_of_another_sound_is_refused():
    (text, _), (other, wave), _ = sentences()
    right = align(codec(), Audio(wave, 16_000), other, min_score=-100).score
    wrong = align(codec(), Audio(wave, 16_000), text, min_score=-100).score
    assert wrong < right - 0.5
    with pytest.raises(UserError, match=r"no alignment: the text scores .* another sound"):
        align(codec(), Audio(wave, 16_000), text, min_score=(right + wrong) / 2)


@pytest.mark.parametrize(
    ("seconds", "text", "why"),
    [
        (0.2, "far too many letters for a sound of this length", "letters do not fit into 0.2 s"),
        (0.3, "1984 - 42", "no letter that the codec spells"),
        (0.3, "", "no letter that the codec spells"),
        (MAX_SECONDS + 1, "a", "cut it to 120 s"),
    ],
)
def test_what_cannot_be_said_is_refused(seconds: float, text: str, why: str):
    with pytest.raises(UserError, match=why):
        align(codec(), Audio(np.zeros(int(seconds * 1000), np.float32), 1000), text)
