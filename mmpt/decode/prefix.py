"""What stands before the next ids: prompts of any lengths in one cache, and passes over it.

A pass either commits ids (autoregressive steps, finished blocks) or reads (a noisy block).

Legend: B rows (samples, then their unconditional branches), T ids, D width, N codes of a block.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.decode.axes import Axes
from mmpt.decode.sampling import Grammar, Sampling, guide
from mmpt.model.cache import KVCache
from mmpt.model.layout import Layout
from mmpt.model.step import Stepper
from mmpt.model.transformer import Decoder
from mmpt.vocab import Modality, Vocabulary

Prompts = Sequence[np.ndarray]

PIECE = 1 << 24  # scores of codes that are held at once


class Prefix:
    """Prompts of any lengths in one cache; with guidance, the unconditional ones are further rows.

    Row i is padded on the left, and a row that takes no part in a step is padded there: pads are
    seen by nobody. Equal prompts, as unconditional ones mostly are, are computed once.
    """

    def __init__(
        self,
        model: Decoder,
        vocabulary: Vocabulary,
        prompts: Prompts,
        unconditional: Prompts | None,
        sampling: Sampling,
    ) -> None:
        if sampling.guidance != 1 and unconditional is None:
            raise UserError(
                f"guidance {sampling.guidance} needs unconditional prompts; give them or use 1"
            )
        if sampling.guidance == 1:
            unconditional = None
        if unconditional is not None and len(unconditional) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts need as many unconditional ones, not {len(unconditional)}"
            )
        rows = [np.asarray(ids, dtype=np.int64) for ids in (*prompts, *(unconditional or ()))]
        if not rows or not all(len(ids) for ids in rows):
            raise UserError("a prompt is empty; begin it with <bod>")
        self.model, self.guidance, self.guided = model, sampling.guidance, unconditional is not None
        self.num_samples = len(prompts)
        self.device = model.embedding.device
        self.cache = model.new_cache()
        self._axes: list[Axes] = []
        self._step = Stepper.of(model)
        self._bias: torch.Tensor | None = None  # (rows, slots): -inf at pads; None without any
        self._chosen: _Hull | None = None
        self.hidden: torch.Tensor  # (rows, D), of the last id of each
        self._begin(rows, vocabulary)

    def _begin(self, prompts: list[np.ndarray], vocabulary: Vocabulary) -> None:
        distinct = {ids.tobytes(): ids for ids in prompts}
        number = {key: row for row, key in enumerate(distinct)}
        rows = list(distinct.values())
        self._axes = self._new_axes(vocabulary, len(rows))
        shape = (len(rows), max(len(ids) for ids in rows))
        ids, modality = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        live = np.zeros(shape, dtype=bool)
        for row, prompt in enumerate(rows):
            place = slice(shape[1] - len(prompt), None)
            ids[row, place], live[row, place] = prompt, True
            modality[row, place] = Grammar(vocabulary).read(prompt)
        self.length = torch.zeros(shape[0], dtype=torch.int64, device=self.device)
        self.last, self._clean = self.length, torch.full_like(self.length, -1)[:, None]
        self._commit(
            *(torch.from_numpy(a).to(self.device) for a in (ids, modality, live)),
            whole=bool(live.all()),
        )
        if len(rows) < len(prompts):
            self._repeat([number[ids.tobytes()] for ids in prompts])
            self._axes = self._new_axes(vocabulary, len(prompts))
            for axes, ids in zip(self._axes, prompts, strict=False):
                axes.read(ids)

    def _new_axes(self, vocabulary: Vocabulary, count: int) -> list[Axes]:
        return [Axes(vocabulary) for _ in range(count if self.model.config.rope == "3d" else 0)]

    @torch.inference_mode()
    def _repeat(self, rows: list[int]) -> None:
        which = torch.tensor(rows, device=self.device)
        self.cache = self.cache.select(which)
        self.hidden, self.length, self.last, self._clean = (
            x[which] for x in (self.hidden, self.length, self.last, self._clean)
        )
        self._bias = None if self._bias is None else self._bias[which]

    def append(self, ids: torch.Tensor, modality: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        """Commit ids and media (samples, T) to both branches; returns hidden states (rows, T, D).

        live: bool (samples,), which take part, or (samples, T), which of their ids do.
        """
        parts = [ids, modality, live.view(len(ids), -1).expand_as(ids)]
        if self.guided:
            parts = [torch.cat((part, part)) for part in parts]
        if live.all():
            return self._commit(*parts, whole=True)
        # pads go to the left, so that the last column is live in every row that goes on
        order = parts[2].long().argsort(dim=1, stable=True)
        hidden = self._commit(*(part.gather(1, order) for part in parts), whole=False)
        return hidden.gather(1, order.argsort(dim=1)[..., None].expand_as(hidden))

    @torch.inference_mode()
    def push(self, ids: torch.Tensor, media: Sequence[int], live: Sequence[bool]) -> None:
        """Commit an id (samples,) to both branches where `live`; media and live are on the host."""
        if self._step is None:
            modality, on = (torch.tensor(x, device=self.device) for x in (media, live))
            self.append(ids[:, None], modality[:, None], on)
            return
        if self.guided:
            ids, media, live = torch.cat((ids, ids)), [*media, *media], [*live, *live]
        on = torch.tensor(live, device=self.device)
        self._remember(on[:, None], whole=all(live))
        bias = None if self._bias is None else self._bias[:, None, None]
        self.hidden = self._step(ids, media, self.length, self.cache, bias)
        position = self.length[:, None]
        self.cache.commit(Layout(on[:, None].long() - 1, position, self._clean, position))
        self.length = self.length + on
        self.last = torch.where(on, ids, self.last)

    def release(self) -> tuple[KVCache, torch.Tensor, torch.Tensor | None]:
        """Cache, lengths (rows,) and bias (rows, slots), for who goes on with single steps."""
        cache, self.cache = self.cache, self.model.new_cache()
        return cache, self.length, self._bias

    def _remember(self, live: torch.Tensor, *, whole: bool) -> None:
        """Which of the new slots (rows, T) steps will see."""
        if self._step is None or (whole and self._bias is None):
            return
        bias = torch.zeros(live.shape, dtype=self._step.attention_dtype, device=self.device)
        bias = bias.masked_fill(~live, -torch.inf)
        if self._bias is None:
            self._bias = bias.new_zeros(len(bias), len(self.cache))
        self._bias = torch.cat((self._bias, bias), dim=1)

    @torch.inference_mode()
    def _commit(
        self, ids: torch.Tensor, modality: torch.Tensor, live: torch.Tensor, *, whole: bool
    ) -> torch.Tensor:
        self._remember(live, whole=whole)
        position = self.length[:, None] + live.cumsum(1) - 1
        hidden = self.model(
            ids,
            modality=modality,
            position=position.clamp(min=0),
            document=live.long() - 1,
            axes=self._follow(ids, live),
            cache=self.cache,
        )
        self.hidden = hidden[:, -1]
        self.length = self.length + live.sum(1)
        self.last = torch.where(live[:, -1], ids[:, -1], self.last)
        return hidden

    def _follow(self, ids: torch.Tensor, live: torch.Tensor) -> torch.Tensor | None:
        """Where new ids stand, which each row counts for itself; None without axes."""
        if not self._axes:
            return None
        rows = zip(self._axes, ids.tolist(), live.tolist(), strict=True)
        places = [
            [axes.push(token) if on else (0, 0, 0) for token, on in zip(tokens, which, strict=True)]
            for axes, tokens, which in rows
        ]
        return torch.tensor(places, device=self.device)

    @torch.inference_mode()
    def scores(
        self, candidates: torch.Tensor | slice | None = None, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Guided scores (samples, V) of the next id, among `candidates` ids (V,) or all.

        hidden: those that `append` gave, for scores (samples, T, V) of what follows each id.
        """
        hidden = self.hidden if hidden is None else hidden
        return self._guided(self._logits(hidden, candidates), self.guidance)

    def block_scores(
        self,
        codes: torch.Tensor,
        modality: Modality,
        candidates: torch.Tensor,
        *,
        time: float | torch.Tensor,
    ) -> torch.Tensor:
        """Guided scores (samples, N, V) of a noisy block's codes (samples, N); commits nothing.

        time: float or (samples,), from 0 (noise) to 1 (clean).
        """
        scale = torch.full((self.num_samples,), self.guidance, device=self.device)
        pieces = self.block_pieces(codes, modality, candidates, time=time, scale=scale)
        return torch.cat([scores for _, scores in pieces], dim=1)

    def block_pieces(
        self,
        codes: torch.Tensor,
        modality: Modality,
        candidates: torch.Tensor,
        *,
        time: float | torch.Tensor,
        scale: torch.Tensor,
        sizes: torch.Tensor | None = None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Scores of a noisy block in pieces: places, and guided scores (samples, places, V).

        codes: ids (samples, N), pads from sizes (samples,) on; a row of size 0 takes no part.
        scale: guidance of each sample; where all are 1, the unconditional branch is not run.

        The block stands behind the slot, a copy of the last id: the output at the slot and at each
        code but the last is about the code behind it.
        """
        hidden = self._block_pass(codes, modality, time, self.needs_both(scale), sizes)
        places = max(1, PIECE // (len(hidden) * len(candidates)))
        for start in range(0, codes.shape[1], places):
            piece = slice(start, min(start + places, codes.shape[1]))
            with torch.inference_mode():
                scores = self._guided(self._logits(hidden[:, piece], candidates), scale)
            yield piece, scores

    def needs_both(self, scale: torch.Tensor) -> bool:
        """Whether any guidance (samples,) needs the unconditional branch."""
        return self.guided and bool((scale != 1).any())

    @torch.inference_mode()
    def _block_pass(
        self,
        codes: torch.Tensor,
        modality: Modality,
        time: float | torch.Tensor,
        both: bool,
        sizes: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states (rows, N, D): of samples, and of their other branches if `both`."""
        rows, count = self.num_samples * (1 + both), codes.shape[1]
        cache = self.cache
        if rows < len(self.length):
            cache = cache.select(slice(rows))
        time = torch.as_tensor(time, device=self.device).expand(self.num_samples)
        sizes = torch.full_like(time, count, dtype=torch.int64) if sizes is None else sizes
        if both:
            codes, time, sizes = (torch.cat((x, x)) for x in (codes, time, sizes))
        ids = torch.cat((self.last[:rows, None], codes), dim=1)
        start, place = self.length[:rows, None], torch.arange(count + 1, device=self.device)
        pad = (place > sizes[:, None]) | (sizes[:, None] == 0)
        return self.model(
            ids,
            modality=torch.full_like(ids, modality),
            position=start - 1 + place,
            document=-pad.long(),
            block=torch.zeros_like(ids),
            limit=(start - 1).expand_as(ids),
            axes=self._block_axes(sizes.tolist(), count) if self._axes else None,
            time=time[:, None].expand(ids.shape).float(),
            cache=cache,
            append=False,
        )[:, :-1]

    def _block_axes(self, sizes: list[int], count: int) -> torch.Tensor:
        """Of a noisy block in each row: the slot stands where the last id does."""
        places = [
            [axes.last, *axes.ahead(size), *[(0, 0, 0)] * (count - size)]
            for axes, size in zip(self._axes, sizes, strict=False)
        ]
        return torch.tensor(places, device=self.device)

    def _logits(
        self, hidden: torch.Tensor, candidates: torch.Tensor | slice | None
    ) -> torch.Tensor:
        if not isinstance(candidates, torch.Tensor):
            return self.model.logits(hidden, candidates)
        if self._chosen is None or self._chosen.ids is not candidates:
            self._chosen = _Hull.of(candidates)
        logits = self.model.logits(hidden, self._chosen.hull)
        within = self._chosen.within
        return logits if within is None else logits.index_select(-1, within)

    def _guided(self, scores: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
        """By one guidance, or that of each sample, where the other branch is among the rows."""
        if not self.guided or len(scores) == self.num_samples:
            return scores
        conditional, unconditional = scores.chunk(2)
        if not isinstance(scale, torch.Tensor):
            return guide(conditional, unconditional, scale)
        scale = scale.to(scores.dtype).view(-1, *[1] * (scores.ndim - 1))
        # where it is off, nothing is rounded
        return torch.where(scale == 1, conditional, guide(conditional, unconditional, scale))


class _Hull(NamedTuple):
    """Candidates, and the slice of ids that they lie in: their weights need not be copied."""

    ids: torch.Tensor
    hull: slice
    within: torch.Tensor | None  # where in it they are; None where they are all of it

    @classmethod
    def of(cls, ids: torch.Tensor) -> "_Hull":
        first, last = ids[[0, -1]].tolist()
        hull = slice(first, last + 1)
        return cls(ids, hull, ids - first if last + 1 - first > len(ids) else None)


def candidate_ids(vocabulary: Vocabulary, modality: Modality, device: torch.device) -> torch.Tensor:
    """int64 (V,): the ids of a medium's codes, without those that training never used."""
    return torch.from_numpy(vocabulary.allowed[modality].nonzero()[0]).to(device)


def codebook_of(
    vocabulary: Vocabulary, modality: Modality, candidates: torch.Tensor
) -> torch.Tensor:
    """int64 (V,): which codebook of its medium each candidate is of."""
    starts = torch.tensor([r.start for r in vocabulary.ranges_of(modality)])
    return torch.searchsorted(starts.to(candidates.device), candidates, right=True) - 1
