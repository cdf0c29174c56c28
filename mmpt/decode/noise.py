"""Noise paths: how clean codes become noise, from time 1 (clean) to 0 (noise), and come back.

- mixture: a code is kept with probability t, else it is uniform (discrete flow matching,
  arXiv 2407.15595); nothing marks which ones were kept.
- masked: kept with probability t, else shown as `<null>` (absorbing, arXiv 2406.07524).
- metric: p_t(x | x1) = softmax_x(-b_t d(x, x1)), b_t = c (t / (1 - t))^a, with d the squared
  distance of normalised vectors of codes (URSA, arXiv 2510.24717; FUDOKI, arXiv 2505.20147).

Codes are indices into the V used codes of a medium; V itself stands for a masked code. Codes of one
codebook never become those of another.

Legend: B samples, N codes, V candidates, D width of their vectors.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmpt.decode.ar import candidate_ids, codebook_of
from mmpt.decode.sampling import draw
from mmpt.model.config import NoiseConfig
from mmpt.model.transformer import Decoder
from mmpt.vocab import MEDIA, Modality, Vocabulary

CHUNK = 1 << 22  # distances that are held at once


class NoisePath(ABC):
    """How codes of a medium are corrupted, and how they jump towards a guess of the clean ones."""

    def __init__(self, book_V: torch.Tensor) -> None:
        self.book_V = book_V
        self.count = torch.bincount(book_V)  # candidates of each codebook
        self.first = torch.cumsum(self.count, 0) - self.count  # which stand one after another

    def uniform(self, book: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """A code of each codebook in `book`, drawn at `uniform`, float64 in [0, 1); same shapes."""
        count = self.count[book]
        return (uniform * count).long().minimum(count - 1) + self.first[book]

    @abstractmethod
    def begin(self, book: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Pure noise: as `uniform`."""

    @abstractmethod
    def corrupt(
        self, clean: torch.Tensor, time: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        """Clean codes (..., N) at times (..., N); uniform: float64 (2, ..., N)."""

    @abstractmethod
    def jump(
        self,
        index: torch.Tensor,
        guess: torch.Tensor,
        now: float,
        then: float,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """Codes (B, N) at time `now` -> at time `then`, if the clean ones were `guess` (B, N).

        uniform: float64 (2, B, N). At then = 1 it is the guess.
        """


class Mixture(NoisePath):
    """Kept, or uniform."""

    def begin(self, book: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        return self.uniform(book, uniform)

    def corrupt(
        self, clean: torch.Tensor, time: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        return torch.where(uniform[0] < time, clean, self.uniform(self.book_V[clean], uniform[1]))

    def jump(
        self,
        index: torch.Tensor,
        guess: torch.Tensor,
        now: float,
        then: float,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        # the exact probability of a jump between the two times; 1 - exp(-rate dt) is too small
        return torch.where(uniform[0] < (then - now) / (1 - now), guess, index)


class Masked(NoisePath):
    """Kept, or masked. What is there already stays."""

    @property
    def mask(self) -> int:
        """The index that stands for a masked code."""
        return len(self.book_V)

    def begin(self, book: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        return torch.full(uniform.shape, self.mask, device=uniform.device)

    def corrupt(
        self, clean: torch.Tensor, time: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        return torch.where(uniform[0] < time, clean, self.mask)

    def jump(
        self,
        index: torch.Tensor,
        guess: torch.Tensor,
        now: float,
        then: float,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        jumps = (uniform[0] < (then - now) / (1 - now)) & (index == self.mask)
        return torch.where(jumps, guess, index)


class Metric(NoisePath):
    """Softmax of distances that sharpens."""

    def __init__(self, book_V: torch.Tensor, vectors_VD: torch.Tensor, config: NoiseConfig) -> None:
        super().__init__(book_V)
        self.scale, self.power = config.metric_scale, config.metric_power
        self.vectors_VD = F.normalize(vectors_VD.float(), dim=-1)
        small = len(book_V) ** 2 <= CHUNK
        codes = torch.arange(len(book_V), device=book_V.device)
        self._table_VV = self._measure(codes) if small else None

    def begin(self, book: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        return self.uniform(book, uniform)

    def corrupt(
        self, clean: torch.Tensor, time: torch.Tensor, uniform: torch.Tensor
    ) -> torch.Tensor:
        sharpness = self.sharpness(time.double()).expand(clean.shape)
        out = []
        for code, b, u in self._chunks(clean, sharpness, uniform[0]):
            p = (-b[:, None] * self.distance(code)).softmax(-1)
            out.append(draw(p.double(), u))
        return torch.cat(out).view_as(clean)

    def jump(
        self,
        index: torch.Tensor,
        guess: torch.Tensor,
        now: float,
        then: float,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        if then >= 1:
            return guess
        begin, end = self.sharpness(torch.tensor([now, then], dtype=torch.float64)).tolist()
        out = []
        for code, at, leaves, where in self._chunks(guess, index, *uniform):
            # the increment of b instead of its slope times dt: it is finite at time 0, too
            distance = self.distance(code)
            closer = (distance.gather(1, at[:, None]) - distance).clamp(min=0)
            rate = ((-begin * distance).softmax(-1) * (end - begin) * closer).double()
            jumps = leaves < -torch.expm1(-rate.sum(-1))
            out.append(torch.where(jumps, draw(rate, where), at))
        return torch.cat(out).view_as(index)

    def _chunks(self, *each: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        rows = max(1, CHUNK // len(self.book_V))
        return zip(*(x.flatten().split(rows) for x in each), strict=True)

    def sharpness(self, time: torch.Tensor) -> torch.Tensor:
        """float32, b(t) of the path at times of any shape."""
        # never 0, which makes no number of the inf to other codebooks, and at time 1 only so large
        # that nothing but the code itself is left
        b = self.scale * (time / (1 - time)) ** self.power
        return b.clamp(1e-30, 1e9).float()

    def distance(self, code: torch.Tensor) -> torch.Tensor:
        """float32 (n, V): squared distances from codes (n,); inf to other codebooks."""
        return self._measure(code) if self._table_VV is None else self._table_VV[code]

    def _measure(self, code: torch.Tensor) -> torch.Tensor:
        distance = 2 - 2 * self.vectors_VD[code] @ self.vectors_VD.T
        distance = distance.clamp(min=0).scatter(1, code[:, None], 0.0)
        return distance.masked_fill(self.book_V[code, None] != self.book_V, torch.inf)


def make_path(
    config: NoiseConfig, book_V: torch.Tensor, vectors_VD: torch.Tensor | None = None
) -> NoisePath:
    """The path that a model was adapted to.

    book_V: int64, the codebook of each candidate, ascending. vectors_VD: what the metric path
    measures distances of.
    """
    if config.path == "metric":
        assert vectors_VD is not None, "the metric path needs vectors of codes"
        return Metric(book_V, vectors_VD, config)
    return Masked(book_V) if config.path == "masked" else Mixture(book_V)


class Noisy(NamedTuple):
    """Corrupted codes: the ids that are shown, and bool, whether the clean ones are to be guessed.

    On the masked path only those that are masked are; ids of no code that is used never are.
    """

    shown: torch.Tensor
    hidden: torch.Tensor


@dataclass(frozen=True)
class Alphabet:
    """What the noisy codes of a medium may be: ids, and the path on which they become noise."""

    ids_V: torch.Tensor  # int64, ascending: index -> id
    shown: torch.Tensor  # (V + 1,): the same, and what a masked code is shown as
    book_V: torch.Tensor  # the codebook of each
    path: NoisePath

    @classmethod
    def of(cls, model: Decoder, vocabulary: Vocabulary, modality: Modality) -> "Alphabet":
        """That of the used codes, on the model's device, by the path of `model.config.noise`."""
        vectors, config = model.embedding.detach(), model.config.noise
        return cls.over(vocabulary, modality, config, vectors, device=vectors.device)

    @classmethod
    def over(
        cls,
        vocabulary: Vocabulary,
        modality: Modality,
        config: NoiseConfig,
        vectors: torch.Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> "Alphabet":
        """vectors: (vocabulary, D) of all ids, which the metric path needs."""
        ids_V = denoised_ids(vocabulary, modality, torch.device(device))
        text = modality == Modality.TEXT
        book_V = torch.zeros_like(ids_V) if text else codebook_of(vocabulary, modality, ids_V)
        masked = ids_V.new_tensor([vocabulary.structure_id("<null>")])
        path = make_path(config, book_V, None if vectors is None else vectors[ids_V])
        return cls(ids_V, torch.cat((ids_V, masked)), book_V, path)

    def index(self, ids: torch.Tensor) -> torch.Tensor:
        """Indices of ids that are all in the alphabet; same shape."""
        return torch.searchsorted(self.ids_V, ids)

    def corrupt(self, ids: torch.Tensor, time: torch.Tensor, uniform: torch.Tensor) -> Noisy:
        """Clean ids (..., N) at times (..., N), see `NoisePath.corrupt`; others than ours stay."""
        index = self.index(ids).clamp(max=len(self.ids_V) - 1)
        noisy = self.path.corrupt(index, time, uniform)
        known = self.ids_V[index] == ids
        hidden = known & (noisy == self.path.mask) if isinstance(self.path, Masked) else known
        return Noisy(torch.where(known, self.shown[noisy], ids), hidden)


def denoised_media(vocabulary: Vocabulary, config: NoiseConfig) -> list[Modality]:
    """What is denoised: all media, and text where it has blocks."""
    text = [Modality.TEXT] if config.text_block else []
    return text + [modality for modality in MEDIA if vocabulary.has(modality)]


def denoised_ids(vocabulary: Vocabulary, modality: Modality, device: torch.device) -> torch.Tensor:
    """int64 (V,), ascending: what the codes of a block may be; of text its plain ids only."""
    if modality == Modality.TEXT:
        return torch.arange(vocabulary.num_text, device=device)
    return candidate_ids(vocabulary, modality, device)
