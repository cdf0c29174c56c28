"""What may be drawn next (`Grammar`), and how it is drawn (`Sampling`).

Every sample of a batch has its own generator, and a draw depends on nothing else of the batch: a
batch of n gives what n singles give. Draws invert the cumulative distribution in float64, so that
low temperatures are not truncated (arXiv 2409.02908).

Legend: V candidates.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, prod

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.vocab import BEGIN, END, MEDIA, NUM_GRID_SIZES, NUM_SIZES, Modality, Vocabulary

Shapes = Mapping[Modality, Sequence[tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw from scores: temperature, then top_k, then top_p."""

    temperature: float = 1.0  # 0: always the best
    top_k: int = 0  # keep the best k; 0: all
    top_p: float = 1.0  # keep the fewest that have this probability together
    guidance: float = 1.0  # s in u + s (c - u); 1: off, and the unconditional branch is not run

    def __post_init__(self) -> None:
        # NaN fails every comparison
        if not (0 <= self.temperature < inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UserError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: use "
                "temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
            )
        if not isfinite(self.guidance):
            raise UserError(f"guidance {self.guidance}: use a number; 1 is none")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """float64 (..., V), filtered and normalised, of logits (..., V); -inf is never drawn."""
        logits = logits.double()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        p = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = p.sort(dim=-1, descending=True)
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            p = torch.zeros_like(p).scatter_(-1, order, ordered)
            p = p / p.sum(-1, keepdim=True)
        return p

    def choose(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Indices (...) into logits (..., V), drawn at `uniform` (...)."""
        return self.pick(self.spread(logits), uniform)

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """What `pick` draws from (..., V); the part of `choose` that takes time."""
        return logits if self.temperature == 0 else self.probabilities(logits)

    def pick(self, spread: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Indices (...) into what `spread` gave, drawn at `uniform` (...)."""
        return spread.argmax(-1) if self.temperature == 0 else draw(spread, uniform)


def guide(
    conditional: torch.Tensor, unconditional: torch.Tensor, scale: float | torch.Tensor
) -> torch.Tensor:
    """Classifier-free guidance on scores: u + s (c - u)."""
    return unconditional + scale * (conditional - unconditional)


def uniforms(
    generators: Sequence[torch.Generator], count: int, device: torch.device
) -> torch.Tensor:
    """float64 (samples, count) in [0, 1), row i from generator i."""
    rows = [
        torch.rand(count, generator=g, dtype=torch.float64, device=g.device) for g in generators
    ]
    return torch.stack(rows).to(device)


def draw(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Indices (...) into probabilities (..., V): the inverse of their sum at `uniform` (...)."""
    total = p.cumsum(-1)
    end = total[..., -1:].contiguous()
    index = torch.searchsorted(total, uniform[..., None] * end, right=True)
    # a uniform next to 1 may round up to the end: take the candidate that brings the sum there
    return torch.minimum(index, torch.searchsorted(total, end))[..., 0]


class Grammar:
    """Follows one stream id by id: which medium each id is of, and which ids may come next.

    After `<boi>` come two sizes, then exactly height x width codes, then `<eoi>`; likewise for
    video and speech. Between spans stand text ids, the begins of media, and `<eod>`.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        allow: Collection[Modality] = tuple(Modality),
        shapes: Shapes | None = None,
        ends: Collection[str] = ("<eod>",),
    ) -> None:
        """ends: names of the structure ids behind which nothing comes."""
        self.vocabulary, self.shapes = vocabulary, shapes or {}
        self.open: Modality | None = None  # the medium of the span we are in
        self.sizes: list[int] = []
        self.remaining = 0  # codes still to come in the open span
        self.ended = False
        self._begins = {vocabulary.structure_id(BEGIN[m]): m for m in MEDIA if vocabulary.has(m)}
        self._ends = {m: vocabulary.structure_id(END[m]) for m in MEDIA}
        self._last = [vocabulary.structure_id(name) for name in ends]
        self._allow = [m for m in self._begins.values() if m in allow]
        self._text = np.zeros(len(vocabulary), dtype=bool)
        self._text[: vocabulary.num_text] = Modality.TEXT in allow
        self._text[self._last] = True
        self._outside: dict[tuple[Modality, ...], np.ndarray] = {}  # by the media that may begin

    @property
    def in_codes(self) -> bool:
        """Whether the header of a span is complete and codes are to come."""
        return self.open is not None and self.remaining > 0

    @property
    def place(self) -> int:
        """How many codes of the open span have come; by it the next one's codebook is known."""
        return prod(self.sizes) - self.remaining

    @property
    def block(self) -> int:
        """Codes of a parallel block of the open span: an image, a latent frame, a speech span."""
        return prod(self.sizes[-2:]) if self.open is not None else 0

    def push(self, token: int) -> Modality:
        """Take the next id; returns its medium. Raises UserError where it cannot stand."""
        if self.open is None:
            self.open, self.sizes = self._begins.get(token), []
            self.ended = token in self._last
            if self.open is None and token >= self.vocabulary.num_text + len(
                self.vocabulary.structure
            ):
                raise UserError(f"id {token} stands outside a media span")
            return Modality.TEXT
        if len(self.sizes) < NUM_GRID_SIZES[self.open]:
            size = self.vocabulary.size_of(token)
            if size is None:
                raise UserError(
                    f"id {token} stands where the {self.open.name.lower()} needs a size"
                )
            self.sizes.append(size)
            complete = len(self.sizes) == NUM_GRID_SIZES[self.open]
            if complete and size % self.vocabulary.num_codebooks(self.open):
                raise UserError(
                    f"{size} {self.open.name.lower()} codes are no whole frames of "
                    f"{self.vocabulary.num_codebooks(self.open)}"
                )
            self.remaining = prod(self.sizes) if complete else 0
            return Modality.TEXT
        if self.remaining:
            ranges = self.vocabulary.ranges_of(self.open)
            code_range = ranges[self.place % len(ranges)]
            if not code_range.start <= token < code_range.stop:
                raise UserError(f"id {token} stands where {self.open.name.lower()} codes belong")
            self.remaining -= 1
            return self.open
        if token != self._ends[self.open]:
            raise UserError(f"the {self.open.name.lower()} span does not end where its header says")
        self.open, self.sizes = None, []
        return Modality.TEXT

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Take many ids (n,); returns the medium of each, int64 (n,)."""
        return np.array([self.push(int(token)) for token in ids], dtype=np.int64)

    def candidates(self, room: int) -> np.ndarray:
        """bool (len(vocabulary),): what may come next when at most `room` more ids fit.

        A span is begun only if it can be completed; an open one may outgrow `room` only when its
        header was given. Not to be written to: the same answer is often the same array.
        """
        if self.open is None:
            media = tuple(m for m in self._allow if any(self._fitting(m, [], room - 1)))
            if media not in self._outside:
                begins = [self.vocabulary.structure_id(BEGIN[modality]) for modality in media]
                self._outside[media] = self._text.copy()
                self._outside[media][begins] = True
            return self._outside[media]
        if self.remaining:
            return self.vocabulary.allowed_at(self.open, self.place)
        mask = np.zeros(len(self.vocabulary), dtype=bool)
        if len(self.sizes) < NUM_GRID_SIZES[self.open]:
            sizes = list(self._fitting(self.open, self.sizes, room))
            if not sizes:
                raise UserError(
                    f"the {self.open.name.lower()} span that is open does not fit in {room} more "
                    "ids; allow more ids or smaller shapes"
                )
            first = self.vocabulary.size_id(1)
            mask[[first + size - 1 for size in sizes]] = True
        else:
            mask[self._ends[self.open]] = True
        return mask

    def _fitting(self, modality: Modality, sizes: list[int], room: int) -> Collection[int]:
        # the sizes that may follow `sizes` so that header, codes and end take at most `room` ids
        missing = NUM_GRID_SIZES[modality] - len(sizes)
        most = room - missing - 1
        # the last side counts ids: whole frames of all codebooks
        step = self.vocabulary.num_codebooks(modality) if missing == 1 else 1
        if modality not in self.shapes:
            return range(step, min(NUM_SIZES, most // prod(sizes)) + 1, step)
        return {
            shape[len(sizes)]
            for shape in self.shapes[modality]
            if list(shape[: len(sizes)]) == sizes
            and prod(shape) <= most
            and shape[len(sizes)] % step == 0
        }
