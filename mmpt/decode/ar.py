"""Autoregressive decoding: one id a step, over a cache, held to the grammar of the stream.

`generate_block` writes the codes of a span whose header is given; `generate` (and `generate_steps`,
the same as an iterator) lets the model decide what comes. Neither ever returns a broken span.

Legend: B rows (samples, then their unconditional branches), T ids, D width.
"""

from collections.abc import Collection, Iterator, Sequence
from operator import is_not
from typing import Literal, NamedTuple

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.decode.axes import Axes
from mmpt.decode.sampling import Grammar, Sampling, Shapes, guide, uniforms
from mmpt.model.layout import Layout
from mmpt.model.step import Stepper
from mmpt.model.transformer import Decoder
from mmpt.vocab import Modality, Vocabulary

Prompts = Sequence[np.ndarray]
Stop = Literal["document", "header"]


class Prefix:
    """Prompts of any lengths in one cache; with guidance, the unconditional ones are further rows.

    Row i is padded on the left, and a row that takes no part in a step is padded there: pads are
    seen by nobody.
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
        self._axes = [Axes(vocabulary) for _ in rows] if model.config.rope == "3d" else []
        self._step = Stepper.of(model)
        self._bias: torch.Tensor | None = None  # (rows, slots): -inf at pads; None without any
        self._chosen: _Hull | None = None
        self._begin(rows, vocabulary)

    def _begin(self, rows: list[np.ndarray], vocabulary: Vocabulary) -> None:
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

    def append(self, ids: torch.Tensor, modality: torch.Tensor, live: torch.Tensor) -> None:
        """Commit ids and media (samples, T) to both branches, where `live` (samples,)."""
        parts = (ids, modality, live[:, None].expand_as(ids))
        if self.guided:
            parts = tuple(torch.cat((part, part)) for part in parts)
        self._commit(*parts, whole=bool(live.all()))

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
    ) -> None:
        self._remember(live, whole=whole)
        position = self.length[:, None] + live.cumsum(1) - 1
        self.hidden = self.model(
            ids,
            modality=modality,
            position=position.clamp(min=0),
            document=live.long() - 1,
            axes=self._follow(ids, live),
            cache=self.cache,
        )[:, -1]  # the last column is live in every row that goes on
        self.length = self.length + live.sum(1)
        self.last = torch.where(live[:, -1], ids[:, -1], self.last)

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

    def _block_axes(self, length: int) -> torch.Tensor | None:
        """Of a noisy block: the slot stands where the last id does."""
        if not self._axes:
            return None
        places = [[axes.last, *axes.ahead(length)] for axes in self._axes]
        return torch.tensor(places, device=self.device)

    @torch.inference_mode()
    def scores(self, candidates: torch.Tensor | slice | None = None) -> torch.Tensor:
        """Guided scores (samples, V) of the next id, among `candidates` ids (V,) or all."""
        return self._guided(self._logits(self.hidden, candidates))

    @torch.inference_mode()
    def block_scores(
        self, codes: torch.Tensor, modality: Modality, candidates: torch.Tensor, *, time: float
    ) -> torch.Tensor:
        """Guided scores (samples, N, V) of a noisy block's codes (samples, N); commits nothing.

        time: from 0 (noise) to 1 (clean).

        The block stands behind the slot, a copy of the last id: the output at the slot and at each
        code but the last is about the code behind it.
        """
        if self.guided:
            codes = torch.cat((codes, codes))
        ids = torch.cat((self.last[:, None], codes), dim=1)
        start = self.length[:, None]
        hidden = self.model(
            ids,
            modality=torch.full_like(ids, modality),
            position=start - 1 + torch.arange(ids.shape[1], device=self.device),
            document=torch.zeros_like(ids),
            block=torch.zeros_like(ids),
            limit=(start - 1).expand_as(ids),
            axes=self._block_axes(codes.shape[1]),
            time=torch.full(ids.shape, time, device=self.device),
            cache=self.cache,
            append=False,
        )
        return self._guided(self._logits(hidden[:, :-1], candidates))

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

    def _guided(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, self.guidance)


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


def generate_block(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Prompts,
    *,
    modality: Modality,
    length: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    unconditional: Prompts | None = None,
) -> list[np.ndarray]:
    """The next `length` codes, as ids int64 (length,), of the span that each prompt has open."""
    grammars = check_open(vocabulary, [*prompts, *(unconditional or ())], modality, length)
    prefix = Prefix(model, vocabulary, prompts, unconditional, sampling)
    candidates = candidate_ids(vocabulary, modality, prefix.device)
    uniform = uniforms(generators, length, prefix.device)
    book, num_books = (
        codebook_of(vocabulary, modality, candidates),
        vocabulary.num_codebooks(modality),
    )
    places = torch.tensor([g.place for g in grammars[: len(prompts)]], device=prefix.device)
    ids: list[torch.Tensor] = []
    for step in range(length):
        if ids:
            prefix.push(ids[-1], [modality] * len(prompts), [True] * len(prompts))
        scores = prefix.scores(candidates)
        if num_books > 1:
            wanted = (places + step) % num_books
            scores = scores.masked_fill(book != wanted[:, None], -torch.inf)
        ids.append(candidates[sampling.choose(scores, uniform[:, step])])
    return list(torch.stack(ids, dim=1).cpu().numpy())


class Step(NamedTuple):
    """The new id of each sample and its medium; None for samples that have stopped."""

    ids: list[int | None]
    modality: list[Modality | None]


def generate(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Prompts,
    *,
    max_ids: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    allow: Collection[Modality] = tuple(Modality),
    shapes: Shapes | None = None,
    stop: Stop = "document",
    unconditional: Prompts | None = None,
) -> list[np.ndarray]:
    """The new ids of each prompt, int64 (n,): what `generate_steps` yields, joined."""
    out: list[list[int]] = [[] for _ in prompts]
    for step in generate_steps(
        model,
        vocabulary,
        prompts,
        max_ids=max_ids,
        sampling=sampling,
        generators=generators,
        allow=allow,
        shapes=shapes,
        stop=stop,
        unconditional=unconditional,
    ):
        for ids, token in zip(out, step.ids, strict=True):
            ids.extend([] if token is None else [token])
    return [np.array(ids, dtype=np.int64) for ids in out]


def generate_steps(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Prompts,
    *,
    max_ids: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    allow: Collection[Modality] = tuple(Modality),
    shapes: Shapes | None = None,
    stop: Stop = "document",
    unconditional: Prompts | None = None,
) -> Iterator[Step]:
    """Continue each prompt by at most `max_ids` ids, until `<eod>` (which is the last id then).

    allow: the media that may be written. shapes: the grids that may be begun, per medium; any that
    fits where a medium has none. stop = "header" also stops a sample right behind the header of a
    span, so that the caller can fill the span in parallel and go on.
    """
    grammars = [Grammar(vocabulary, allow=allow, shapes=shapes) for _ in prompts]
    for grammar, prompt in zip(grammars, prompts, strict=True):
        grammar.read(prompt)
        if grammar.in_codes and grammar.remaining >= max_ids:
            raise UserError(
                f"the prompt has a span open that needs {grammar.remaining + 1} ids; "
                f"max_ids is {max_ids}"
            )
    prefix = Prefix(model, vocabulary, prompts, unconditional, sampling)
    choices = _Choices(prefix.device)
    live = [max_ids > 0 and not grammar.ended for grammar in grammars]
    for step in range(max_ids):
        if not any(live):
            return
        masks = [g.candidates(max_ids - step) for g, on in zip(grammars, live, strict=True) if on]
        new = _next_ids(prefix, choices.of(masks), live, sampling, generators)
        tokens = new.tolist()
        media = [
            grammar.push(token) if on else None
            for grammar, token, on in zip(grammars, tokens, live, strict=True)
        ]
        yield Step([t if on else None for t, on in zip(tokens, live, strict=True)], media)
        for index, grammar in enumerate(grammars):
            # remaining == prod(sizes) only between the header and the first code
            headed = stop == "header" and grammar.in_codes and media[index] == Modality.TEXT
            live[index] = live[index] and not (grammar.ended or headed)
        if any(live):
            prefix.push(new, [medium or 0 for medium in media], live)


class _Choice(NamedTuple):
    """Between which ids all that may come next lie, and which of those may not (samples, V)."""

    hull: slice
    forbidden: torch.Tensor | None


class _Choices:
    """What grammars allow, on the device; they mostly allow the same as a step before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._masks: list[np.ndarray] = []
        self._choice = _Choice(slice(None), None)

    def of(self, masks: list[np.ndarray]) -> _Choice:
        """masks: bool (vocabulary,) of each sample that goes on."""
        if len(masks) != len(self._masks) or any(map(is_not, masks, self._masks)):
            self._masks, self._choice = masks, self._plan(masks)
        return self._choice

    def _plan(self, masks: list[np.ndarray]) -> _Choice:
        stack = np.stack(masks)
        allowed = np.flatnonzero(stack.any(0))
        hull = slice(int(allowed[0]), int(allowed[-1]) + 1)
        forbidden = ~stack[:, hull]
        return _Choice(
            hull, torch.from_numpy(forbidden).to(self._device) if forbidden.any() else None
        )


@torch.inference_mode()
def _next_ids(
    prefix: Prefix,
    choice: _Choice,
    live: Sequence[bool],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """int64 (samples,); 0 where a sample does not go on."""
    # only samples that go on draw: the generators of the others stay as they are
    uniform = uniforms([g for g, on in zip(generators, live, strict=True) if on], 1, prefix.device)
    rows = None if all(live) else torch.tensor(live).nonzero()[:, 0].to(prefix.device)
    logits = prefix.scores(choice.hull)
    logits = logits if rows is None else logits[rows]
    if choice.forbidden is not None:
        logits = logits.masked_fill(choice.forbidden, -torch.inf)
    new = sampling.choose(logits, uniform[:, 0]) + choice.hull.start
    if rows is None:
        return new
    return torch.zeros(len(live), dtype=new.dtype, device=new.device).index_copy(0, rows, new)


def candidate_ids(vocabulary: Vocabulary, modality: Modality, device: torch.device) -> torch.Tensor:
    """int64 (V,): the ids of a medium's codes, without those that training never used."""
    return torch.from_numpy(vocabulary.allowed[modality].nonzero()[0]).to(device)


def codebook_of(
    vocabulary: Vocabulary, modality: Modality, candidates: torch.Tensor
) -> torch.Tensor:
    """int64 (V,): which codebook of its medium each candidate is of."""
    starts = torch.tensor([r.start for r in vocabulary.ranges_of(modality)])
    return torch.searchsorted(starts.to(candidates.device), candidates, right=True) - 1


def check_open(
    vocabulary: Vocabulary, prompts: Prompts, modality: Modality, length: int
) -> list[Grammar]:
    """The grammar at the end of each prompt; refuses prompts without room for `length` codes."""
    grammars = [Grammar(vocabulary) for _ in prompts]
    for grammar, prompt in zip(grammars, prompts, strict=True):
        grammar.read(prompt)
        if grammar.open != modality or not 1 <= length <= grammar.remaining:
            name = modality.name.lower()
            raise UserError(
                f"{length} {name} codes were asked for, but the prompt has "
                f"{grammar.remaining if grammar.open == modality else 0} to come; end it with the "
                f"header of a {name} span"
            )
    return grammars
