"""Autoregressive decoding: one id a step, over a cache, held to the grammar of the stream.

`generate_block` writes the codes of a span whose header is given; `generate` (and `generate_steps`,
the same as an iterator) lets the model decide what comes. Neither ever returns a broken span.

Legend: B rows (samples, then their unconditional branches), T ids, D width.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.decode.axes import Axes
from mmpt.decode.sampling import Grammar, Sampling, Shapes, draw, guide, uniforms
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
        self.last = torch.zeros_like(self.length)
        self._commit(*(torch.from_numpy(a).to(self.device) for a in (ids, modality, live)))

    def append(self, ids: torch.Tensor, modality: torch.Tensor, live: torch.Tensor) -> None:
        """Commit ids and media (samples, T) to both branches, where `live` (samples,)."""
        parts = (ids, modality, live[:, None].expand_as(ids))
        if self.guided:
            parts = tuple(torch.cat((part, part)) for part in parts)
        self._commit(*parts)

    @torch.no_grad()
    def _commit(self, ids: torch.Tensor, modality: torch.Tensor, live: torch.Tensor) -> None:
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

    @torch.no_grad()
    def scores(self, candidates: torch.Tensor | None = None) -> torch.Tensor:
        """Guided scores (samples, V) of the next id, among `candidates` ids (V,) or all."""
        return self._guided(self.model.logits(self.hidden, candidates))

    @torch.no_grad()
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
            time=torch.full(ids.shape, time, device=self.device),
            axes=self._block_axes(codes.shape[1]),
            cache=self.cache,
            append=False,
        )
        return self._guided(self.model.logits(hidden[:, :-1], candidates))

    def _guided(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, self.guidance)


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
    live = torch.ones(len(prompts), dtype=torch.bool, device=prefix.device)
    ids = torch.zeros(len(prompts), length, dtype=torch.int64, device=prefix.device)
    book = codebook_of(vocabulary, modality, candidates)
    places = torch.tensor([g.place for g in grammars[: len(prompts)]], device=prefix.device)
    for step in range(length):
        wanted = (places + step) % vocabulary.num_codebooks(modality)
        scores = prefix.scores(candidates).masked_fill(book != wanted[:, None], -torch.inf)
        p = sampling.probabilities(scores)
        ids[:, step] = candidates[draw(p, uniform[:, step])]
        if step + 1 < length:
            token = ids[:, step : step + 1]
            prefix.append(token, torch.full_like(token, modality), live)
    return list(ids.cpu().numpy())


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
    live = np.array([max_ids > 0 and not grammar.ended for grammar in grammars])
    for step in range(max_ids):
        if not live.any():
            return
        tokens = _next_ids(prefix, grammars, live, max_ids - step, sampling, generators)
        modality = [
            grammar.push(token) if on else None
            for grammar, token, on in zip(grammars, tokens, live, strict=True)
        ]
        yield Step([t if on else None for t, on in zip(tokens, live, strict=True)], modality)
        for index, grammar in enumerate(grammars):
            # remaining == prod(sizes) only between the header and the first code
            headed = stop == "header" and grammar.in_codes and modality[index] == Modality.TEXT
            live[index] &= not (grammar.ended or headed)
        if live.any():
            new = torch.tensor([tokens, [m or 0 for m in modality]], device=prefix.device)
            on = torch.from_numpy(live.copy()).to(prefix.device)
            prefix.append(new[0, :, None], new[1, :, None], on)


def _next_ids(
    prefix: Prefix,
    grammars: Sequence[Grammar],
    live: np.ndarray,
    room: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> list[int]:
    # only samples that go on draw: the generators of the others stay as they are
    on = live.nonzero()[0].tolist()
    masks = np.stack([grammars[i].candidates(room) for i in on])
    logits = prefix.scores()[on]
    logits = logits.masked_fill(~torch.from_numpy(masks).to(prefix.device), -torch.inf)
    uniform = uniforms([generators[i] for i in on], 1, prefix.device)[:, 0]
    tokens = np.zeros(len(live), dtype=np.int64)
    tokens[on] = draw(sampling.probabilities(logits), uniform).cpu().numpy()
    return tokens.tolist()


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
