"""Judging speech: what is counted, how sure it is, and that a judge hears words where there are."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.parts import Audio
from mmpt.tokenizers.judge import (
    GrammarJudge,
    WhisperJudge,
    WordErrors,
    difference,
    judge,
    prepare,
    spoken_words,
)

pytest.importorskip("jiwer")


class Scripted:
    """Hears what it is told to, in order."""

    name = "scripted"

    def __init__(self, *heard: str) -> None:
        self.heard = list(heard)

    def transcribe(self, wave: np.ndarray) -> str:
        return self.heard.pop(0)


def waves(count: int) -> list[np.ndarray]:
    return [np.zeros(160, np.float32)] * count


def test_substitutions_deletions_and_insertions_are_errors() -> None:
    texts = ["One, two three!", "don't stop", "five"]
    found = judge(Scripted("one too three", "stop", "five five six"), waves(3), texts)
    assert found == WordErrors((1, 1, 2), (3, 2, 1))
    assert found.rate == pytest.approx(4 / 6)


def test_texts_without_words_and_nothing_at_all_are_refused() -> None:
    with pytest.raises(UserError, match=r"text 1 \('\?!'\) has no words"):
        judge(Scripted("a", ""), waves(2), ["a", "?!"])
    with pytest.raises(UserError, match="no speech to judge"):
        judge(Scripted(), [], [])
    with pytest.raises(ValueError, match="zip"):
        judge(Scripted("a", "b"), waves(2), ["a"])


@given(text=st.text())
def test_spoken_words_are_lower_case_and_stay_as_they_are(text: str) -> None:
    words = spoken_words(text)
    assert spoken_words(" ".join(words)) == words
    assert all(word == word.lower() for word in words)
    assert all(any(c.isalnum() for c in word) for word in words)


def test_a_certain_difference_excludes_zero_and_an_uncertain_one_does_not() -> None:
    rng = np.random.default_rng(0)
    words = tuple(rng.integers(3, 9, 200).tolist())
    bad = tuple(int(rng.binomial(n, 0.3)) for n in words)
    good = tuple(int(rng.binomial(n, 0.1)) for n in words)
    better = WordErrors(good, words), WordErrors(bad, words)
    middle, low, high = difference(*better)
    assert middle == better[0].rate - better[1].rate
    assert low < middle < high < 0
    same, *around = difference(better[0], WordErrors(good[:1] + good[1:], words))
    assert (same, *around) == (0, 0, 0)  # paired: what is equal differs in no draw
    shuffled = WordErrors(tuple(reversed(good)), words)
    _, low, high = difference(better[0], shuffled)
    assert low < 0 < high
    assert difference(*better) == difference(*better)
    with pytest.raises(ValueError, match="different sentences"):
        difference(better[0], WordErrors(good[:5], words[:5]))


def test_intervals_cover_the_true_rate_as_often_as_they_say() -> None:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(100):
        words = rng.integers(3, 9, 80)
        low, high = WordErrors(
            tuple(rng.binomial(words, 0.2).tolist()), tuple(words.tolist())
        ).interval(num_draws=300)
        hits += low <= 0.2 <= high
    assert 88 <= hits <= 99


@pytest.mark.parametrize("loudness", [1e-3, 0.2, 1.0])
def test_what_a_judge_hears_does_not_depend_on_loudness(loudness: float) -> None:
    wave = np.sin(np.arange(4000) / 9).astype(np.float32)
    heard = prepare(wave * loudness, seed=3)
    assert heard.dtype == np.float32
    assert np.allclose(heard, prepare(wave, seed=3), atol=1e-6)
    assert np.abs(heard).max() == pytest.approx(0.6, abs=2e-3)
    silent = prepare(np.zeros(4000, np.float32), seed=3)
    assert silent.std() == pytest.approx(3e-4, rel=0.1)


def say(text: str, tmp_path: Path) -> np.ndarray:
    if not shutil.which("flite"):
        pytest.skip("needs flite, to speak")
    path = tmp_path / "said.wav"
    subprocess.run(["flite", "-voice", "slt", "-t", text, "-o", str(path)], check=True)
    wave, rate = soundfile.read(path, dtype="float32")
    return Audio(wave, rate).resample(16_000).wave


def test_a_grammar_judge_hears_what_is_said_and_no_words_in_noise(tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx")
    texts = ["two red birds", "four green dogs", "two green cats run", "four birds sing"]
    recogniser = GrammarJudge(texts)
    said = [say(text, tmp_path) for text in texts[:3]]
    assert judge(recogniser, said, texts[:3]).rate == 0
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    assert judge(recogniser, [noise], texts[:1]).rate > 0.5
    # what was heard before changes nothing
    assert judge(recogniser, said, texts[:3]).rate == 0


def test_a_grammar_refuses_words_that_it_cannot_hear_and_no_words() -> None:
    pytest.importorskip("pocketsphinx")
    with pytest.raises(UserError, match="lacks 1 words"):
        GrammarJudge(["a xyzzyq"])
    with pytest.raises(UserError, match="there are none"):
        GrammarJudge(["", "!"])


def test_whisper_needs_its_package_and_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UserError, match="pip install faster-whisper"):
        WhisperJudge(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("faster_whisper")
    with pytest.raises(UserError, match=r"no model\.bin"):
        WhisperJudge(tmp_path)
