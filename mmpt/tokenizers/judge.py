"""Judges of speech: recognisers that were not trained here, and the word error rate they find.

A judge hears every system's wave of the same sentences, prepared the same way, so that rates are
compared and not believed: `difference` says how sure it is that one system is better.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmpt.config import UserError

SAMPLE_RATE = 16_000
PEAK, DITHER = 0.6, 3e-4


class Recogniser(Protocol):
    """What turns a prepared wave into lower-case words."""

    name: str

    def transcribe(self, wave: np.ndarray) -> str:
        """The words of float32 (num_samples,) at 16 kHz in [-1, 1]."""
        ...


@dataclass(frozen=True)
class WordErrors:
    """Errors and words of each sentence, in the order in which they were given."""

    errors: tuple[int, ...]
    words: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Word error rate: all errors by all words."""
        return sum(self.errors) / sum(self.words)

    def interval(self, *, num_draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """The middle 95 % of the rate over sentences drawn again (bootstrap)."""
        return _middle(_redraw(self.words, [self.errors], num_draws, seed)[0])


def difference(
    ours: WordErrors, theirs: WordErrors, *, num_draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """ours - theirs of the rate, and the middle 95 % of it over the same sentences drawn again.

    The bootstrap is paired (Bisani and Ney 2004): each draw takes the same sentences of both.
    """
    if ours.words != theirs.words:
        raise ValueError("the two were measured on different sentences")
    rates = _redraw(ours.words, [ours.errors, theirs.errors], num_draws, seed)
    return (ours.rate - theirs.rate, *_middle(rates[0] - rates[1]))


def _redraw(
    words: Sequence[int], errors: Sequence[Sequence[int]], num_draws: int, seed: int
) -> np.ndarray:
    """Rates (systems, draws) of sentences drawn with replacement, the same ones in all systems."""
    picks = np.random.default_rng(seed).integers(len(words), size=(num_draws, len(words)))
    return np.asarray(errors)[:, picks].sum(-1) / np.asarray(words)[picks].sum(-1)


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def judge(recogniser: Recogniser, waves: Iterable[np.ndarray], texts: Sequence[str]) -> WordErrors:
    """Let a recogniser hear waves (float (num_samples,), 16 kHz) of known texts."""
    jiwer = _need("jiwer")
    errors, words = [], []
    for index, (wave, text) in enumerate(zip(waves, texts, strict=True)):
        heard = " ".join(spoken_words(recogniser.transcribe(prepare(wave, seed=index))))
        said = spoken_words(text)
        if not said:
            raise UserError(f"text {index} ({text!r}) has no words to judge; leave it out")
        result = jiwer.process_words(" ".join(said), heard)
        errors.append(result.substitutions + result.deletions + result.insertions)
        words.append(len(said))
    if not words:
        raise UserError("there is no speech to judge; give waves with their texts")
    return WordErrors(tuple(errors), tuple(words))


def prepare(wave: np.ndarray, *, seed: int) -> np.ndarray:
    """What a judge hears: peak at 0.6 and faint noise, for digital silence confuses recognisers."""
    wave = np.asarray(wave, dtype=np.float32)
    loud = wave * (PEAK / max(1e-6, float(np.abs(wave).max(initial=0))))
    noise = np.random.default_rng(seed).normal(0, DITHER, len(wave))
    return (loud + noise).astype(np.float32)


def spoken_words(text: str) -> list[str]:
    """Lower-case words of a text, without signs; apostrophes inside of words stay."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("\u2019", "'"))


class GrammarJudge:
    """pocketsphinx with a word-pair grammar: a word may follow another as it does in some text.

    Fast (about 40 times real time on a core) and offline, for its acoustic model comes with the
    package; strict about words, for all pairs of a context weigh alike. texts: what may be said.
    """

    name = "pocketsphinx, word pairs"

    def __init__(self, texts: Sequence[str]) -> None:
        sphinx = _need("pocketsphinx")
        sentences = [spoken_words(text) for text in texts]
        sentences = [words for words in sentences if words]
        if not sentences:
            raise UserError("a grammar needs texts with words; there are none")
        self._decoder = sphinx.Decoder(
            hmm=sphinx.get_model_path("en-us/en-us"),
            dict=sphinx.get_model_path("en-us/cmudict-en-us.dict"),
            lm=None,
            cmn="batch",  # of each utterance alone: the order of utterances changes nothing
            loglevel="FATAL",
        )
        known = {w for words in sentences for w in words if self._decoder.lookup_word(w)}
        unknown = {w for words in sentences for w in words} - known
        if unknown:
            some = ", ".join(sorted(unknown)[:5])
            raise UserError(
                f"the recogniser's dictionary lacks {len(unknown)} words ({some}); "
                "leave out their sentences"
            )
        grammar = _word_pairs(sphinx, self._decoder.get_logmath(), sentences)
        self._decoder.add_fsg("pairs", grammar)
        self._decoder.activate_search("pairs")

    def transcribe(self, wave: np.ndarray) -> str:
        """The most likely words; none where nothing fits."""
        pcm = (np.clip(wave, -1, 1) * 32_767).astype("<i2").tobytes()
        self._decoder.start_utt()
        self._decoder.process_raw(pcm, full_utt=True)
        self._decoder.end_utt()
        best = self._decoder.hyp()
        # a second pronunciation of a word is listed as word(2)
        return re.sub(r"\(\d+\)", "", best.hypstr) if best else ""


def _word_pairs(sphinx: Any, logs: Any, sentences: Sequence[Sequence[str]]) -> Any:
    """The finite-state grammar of all pairs of neighbours: a state for each last word."""
    states = {word: i + 1 for i, word in enumerate(sorted({w for s in sentences for w in s}))}
    end = len(states) + 1
    follows: dict[int, set[str]] = {}
    for words in sentences:
        for before, after in zip(["", *words], [*words, ""], strict=True):
            follows.setdefault(states.get(before, 0), set()).add(after)
    grammar = sphinx.FsgModel("pairs", logs, 6.5, end + 1)
    grammar.set_start_state(0)
    grammar.set_final_state(end)
    ids = {word: grammar.word_add(word) for word in states}
    for state, words in sorted(follows.items()):
        chance = int(logs.log(1 / len(words)))
        for word in sorted(words):
            if word:
                grammar.trans_add(state, states[word], chance, ids[word])
            else:
                grammar.null_trans_add(state, end, chance)
    return grammar


class WhisperJudge:
    """faster-whisper with a model folder of the user's (CTranslate2 files): open vocabulary."""

    def __init__(self, folder: str | Path) -> None:
        whisper = _need("faster_whisper", package="faster-whisper")
        if not (Path(folder) / "model.bin").is_file():
            raise UserError(
                f"{folder} holds no model.bin; give a folder with a Whisper model of CTranslate2"
            )
        self.name = f"faster-whisper, {Path(folder).name}"
        self._model = whisper.WhisperModel(
            str(folder), device="cpu", compute_type="int8", local_files_only=True
        )

    def transcribe(self, wave: np.ndarray) -> str:
        """The words of the best of five beams."""
        segments, _ = self._model.transcribe(wave, language="en", beam_size=5)
        return " ".join(segment.text for segment in segments).lower()


def _need(module: str, *, package: str = "") -> Any:
    """Import what only judging needs. Raises UserError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        name = package or module
        raise UserError(f"judging speech needs {name}; install it: pip install {name}") from None
