"""What the quality gate measures of a system's answers, each as a statistic over prompts.

A metric is evidence of quality. A guard is not: it says whether a likelihood was bought with fewer
different codes, as a lower temperature buys it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mmpt.eval.gate_pictures import PictureJudge
from mmpt.eval.gate_samples import Answer, Prompt, System
from mmpt.eval.gate_stats import (
    Entropy,
    FrechetDistance,
    KernelDistance,
    Margin,
    Ratio,
    Statistic,
)
from mmpt.eval.passes import Passes
from mmpt.parts import Audio, Image, Part, Video
from mmpt.tokenizers.cards.speech import Utterance
from mmpt.tokenizers.cards.words import judged
from mmpt.tokenizers.judge import SAMPLE_RATE, Recogniser, WordErrors, judge
from mmpt.vocab import Modality, Vocabulary


class Metric(Protocol):
    """name: what it measures; unit: of its value; guard: see above."""

    name: str
    unit: str
    margin: Margin
    guard: bool

    def measure(self, system: System) -> Statistic:
        """Of a system's answers to its prompts."""
        ...


@dataclass(kw_only=True)
class Likelihood:
    """-log p of the codes given the prompt, under the autoregressive model at temperature 1."""

    passes: Passes
    vocabulary: Vocabulary
    separator: np.ndarray
    margin: Margin
    name: str = "likelihood"
    unit: str = "nats per code"
    guard: bool = False

    def measure(self, system: System) -> Ratio:
        streams = [a.stream(self.vocabulary, self.separator) for a in system.answers]
        counts = [float(stream.loss_weight.sum()) for stream in streams]
        nats = self.passes.nats(streams)
        return Ratio(system.by_prompt(nats), system.by_prompt(counts))


@dataclass(kw_only=True)
class CodeEntropy:
    """How evenly all answers together use the codes."""

    vocabulary: Vocabulary
    modality: Modality
    margin: Margin
    name: str = "entropy of codes"
    unit: str = "nats"
    guard: bool = True

    def measure(self, system: System) -> Entropy:
        size = max(span.size for span in self.vocabulary.ranges_of(self.modality))
        counts = np.zeros((system.num_prompts, size))
        for answer in system.answers:
            counts[answer.place] += np.bincount(answer.codes, minlength=size)
        return Entropy(counts)


@dataclass(kw_only=True)
class DistinctCodes:
    """The different codes of an answer, as a share of its codes."""

    margin: Margin
    name: str = "distinct codes"
    unit: str = "share"
    guard: bool = True

    def measure(self, system: System) -> Ratio:
        distinct = [len(np.unique(answer.codes)) for answer in system.answers]
        sizes = [len(answer.codes) for answer in system.answers]
        return Ratio(system.by_prompt(distinct), system.by_prompt(sizes))


class Eye(Protocol):
    """A frozen network that gives features."""

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """float (N, F) of uint8 (height, width, 3) pictures."""
        ...


@dataclass(kw_only=True)
class Pictures:
    """An eye's features of every answer; a clip's are the mean over the frames it adds.

    unit: whether they are made of length 1.
    """

    eye: Eye
    unit: bool = True
    _known: dict[System, np.ndarray] = field(default_factory=dict)

    def features(self, system: System) -> np.ndarray:
        """float (answers, F)."""
        if system not in self._known:
            self._known[system] = self._features(system)
        return self._known[system]

    def _features(self, system: System) -> np.ndarray:
        frames = [own_frames(part, a.prompt) for part, a in zip_parts(system)]
        ends = np.cumsum([len(each) for each in frames])
        flat = self.eye.features([frame for each in frames for frame in each])
        means = np.stack([each.mean(0) for each in np.split(flat, ends[:-1])])
        return means / np.linalg.norm(means, axis=1, keepdims=True) if self.unit else means


@dataclass(kw_only=True)
class FeatureDistance:
    """Squared distance from what the prompt's document really goes on with, in features."""

    pictures: Pictures
    real: System
    margin: Margin
    name: str = "feature distance"
    unit: str = "squared, 0 to 4"
    guard: bool = False

    def measure(self, system: System) -> Ratio:
        ours, real = (self.pictures.features(each) for each in (system, self.real))
        row_of = {answer.prompt: row for row, answer in enumerate(self.real.answers)}
        rows = [row_of[answer.prompt] for answer in system.answers]
        distance = ((ours - real[rows]) ** 2).sum(1)
        return Ratio(system.by_prompt(distance), system.by_prompt(np.ones(len(rows))))


@dataclass(kw_only=True)
class KernelFeatures:
    """Kernel distance (KID: cubic kernel) between the answers and real media, in features.

    scale: of the products of features; KID divides by their number.
    """

    pictures: Pictures
    real: System
    margin: Margin
    scale: float = 1.0
    name: str = "kernel distance"
    unit: str = "squared"
    guard: bool = False

    def measure(self, system: System) -> KernelDistance:
        # a prompt's kernel is the mean over its answers
        sums = np.zeros((system.num_prompts, len(system.answers)))
        sums[[a.place for a in system.answers], range(len(system.answers))] = 1
        mean = sums / sums.sum(1, keepdims=True)
        x, y = self.pictures.features(system), self.pictures.features(self.real)
        xx, yy, xy = ((self.scale * (a @ b.T) + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        return KernelDistance(mean @ xx @ mean.T, yy, mean @ xy)


@dataclass(kw_only=True)
class FrechetFeatures:
    """Frechet distance (FID) between the answers and real media, in features."""

    pictures: Pictures
    real: System
    margin: Margin
    name: str = "Frechet distance"
    unit: str = "squared"
    guard: bool = False

    def measure(self, system: System) -> FrechetDistance:
        places = np.array([answer.place for answer in system.answers])
        ours, real = (self.pictures.features(each) for each in (system, self.real))
        return FrechetDistance(ours, real, places)


@dataclass(kw_only=True)
class Accuracy:
    """How often the judge of pictures finds a class that the prompt names."""

    judge: PictureJudge
    margin: Margin
    name: str = "accuracy"
    unit: str = "share"
    guard: bool = False

    def measure(self, system: System) -> Ratio:
        frames = [own_frames(part, a.prompt)[-1] for part, a in zip_parts(system)]
        guesses = self.judge.guesses(frames)
        labels = np.stack([self.judge.labels(a.prompt.texts) for a in system.answers])
        known = labels.any(1)
        right = labels[np.arange(len(guesses)), guesses]
        return Ratio(system.by_prompt(right * known), system.by_prompt(known))


@dataclass(kw_only=True)
class SpokenErrors:
    """Word error rate of speech under a recogniser that was not trained here."""

    recogniser: Recogniser
    margin: Margin
    name: str = "word errors"
    unit: str = "share of words"
    guard: bool = False

    def measure(self, system: System) -> Ratio:
        waves = [
            part.resample(SAMPLE_RATE).wave for part in system.parts if isinstance(part, Audio)
        ]
        texts = [answer.prompt.texts[0] for answer in system.answers]
        found: WordErrors = judge(self.recogniser, waves, texts)
        return Ratio(system.by_prompt(found.errors), system.by_prompt(found.words))


def sayable(prompts: Sequence[Prompt], *, whisper: str = "") -> list[Prompt]:
    """The prompts whose words a judge of speech knows. Raises UserError where none is installed."""
    import torch

    silence = torch.zeros(0)
    said = [Utterance(silence, prompt.texts[0], "") for prompt in prompts]
    picks, _ = judged(said, (), whisper=whisper or None)
    return [prompts[index] for index in picks]


def zip_parts(system: System) -> Iterator[tuple[Part, Answer]]:
    """Each part with its answer."""
    return zip(system.parts, system.answers, strict=True)


def own_frames(part: Part, prompt: Prompt) -> np.ndarray:
    """uint8 (n, height, width, 3): the picture, or the frames behind those that were given."""
    if isinstance(part, Image):
        return part.pixels[None]
    assert isinstance(part, Video)
    return part.frames[0 if prompt.clip is None else len(prompt.clip.frames) :]
