"""Autoregressive decoding: one id a step, over a cache, held to the grammar of the stream.

`generate_block` writes the codes of a span whose header is given; `generate` (and `generate_steps`,
the same as an iterator) lets the model decide what comes. Neither ever returns a broken span.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from operator import is_not
from typing import Literal, NamedTuple

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.decode.pool import Lane, Pool, Wanted
from mmpt.decode.prefix import Prefix, Prompts, candidate_ids, codebook_of
from mmpt.decode.sampling import Grammar, Sampling, Shapes, uniforms
from mmpt.model.transformer import Decoder
from mmpt.vocab import Modality, Vocabulary

Stop = Literal["document", "header"]


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
    steps = block_steps(
        model,
        vocabulary,
        prompts,
        modality=modality,
        length=length,
        sampling=sampling,
        generators=generators,
        unconditional=unconditional,
    )
    return list(torch.stack(list(steps), dim=1).cpu().numpy())


def block_steps(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Prompts,
    *,
    modality: Modality,
    length: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    unconditional: Prompts | None = None,
    pool: Pool | None = None,
) -> Iterator[torch.Tensor]:
    """`generate_block` as an iterator: the new ids int64 (samples,) of each step.

    pool: where steps are taken together with those of others that step in turn.
    """
    grammars = check_open(vocabulary, [*prompts, *(unconditional or ())], modality, length)
    prefix = Prefix(model, vocabulary, prompts, unconditional, sampling)
    candidates = candidate_ids(vocabulary, modality, prefix.device)
    uniform = uniforms(generators, length, prefix.device)
    book, num_books = (
        codebook_of(vocabulary, modality, candidates),
        vocabulary.num_codebooks(modality),
    )
    places = torch.tensor([g.place for g in grammars[: len(prompts)]], device=prefix.device)

    def spread(step: int, hidden: torch.Tensor) -> torch.Tensor:
        scores = prefix.scores(candidates, hidden)
        if num_books > 1:
            wanted = (places + step) % num_books
            scores = scores.masked_fill(book != wanted[:, None], -torch.inf)
        return sampling.spread(scores)

    def wanted(step: int) -> Wanted:
        key = (modality, (grammars[0].place + step) % num_books, sampling)
        return Wanted(key, partial(spread, step))

    lane = Lane(prefix, wanted(0), pool)
    media, live = [modality] * len(prompts), [True] * len(prompts)
    for step in range(length):
        new = candidates[sampling.pick(lane.take(), uniform[:, step])]
        if step + 1 < length:
            lane.push(new, media, live, wanted(step + 1))
        yield new


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
    ends: Collection[str] = ("<eod>",),
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
        ends=ends,
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
    ends: Collection[str] = ("<eod>",),
    unconditional: Prompts | None = None,
    pool: Pool | None = None,
) -> Iterator[Step]:
    """Continue each prompt by at most `max_ids` ids, until one of `ends` (the last id then).

    allow: the media that may be written. shapes: the grids that may be begun, per medium; any that
    fits where a medium has none. stop = "header" also stops a sample right behind the header of a
    span, so that the caller can fill the span in parallel and go on. pool: see `block_steps`.
    """
    grammars = [Grammar(vocabulary, allow=allow, shapes=shapes, ends=ends) for _ in prompts]
    for grammar, prompt in zip(grammars, prompts, strict=True):
        grammar.read(prompt)
        if grammar.in_codes and grammar.remaining >= max_ids:
            raise UserError(
                f"the prompt has a span open that needs {grammar.remaining + 1} ids; "
                f"max_ids is {max_ids}"
            )
    prefix = Prefix(model, vocabulary, prompts, unconditional, sampling)
    choices = _Choices(prefix, sampling)
    live = [max_ids > 0 and not grammar.ended for grammar in grammars]
    lane = None
    for step in range(max_ids):
        if not any(live):
            return
        if lane is None:
            lane = Lane(prefix, choices.of(grammars, live, max_ids), pool)
        new = choices.draw(lane.take(), generators)
        tokens = new.tolist()
        media = [
            grammar.push(token) if on else None
            for grammar, token, on in zip(grammars, tokens, live, strict=True)
        ]
        made = Step([t if on else None for t, on in zip(tokens, live, strict=True)], media)
        for index, grammar in enumerate(grammars):
            # remaining == prod(sizes) only between the header and the first code
            headed = stop == "header" and grammar.in_codes and media[index] == Modality.TEXT
            live[index] = live[index] and not (grammar.ended or headed)
        if any(live) and step + 1 < max_ids:
            wanted = choices.of(grammars, live, max_ids - step - 1)
            lane.push(new, [medium or 0 for medium in media], list(live), wanted)
        yield made


class _Choices:
    """What grammars allow, as what is drawn from; they mostly allow the same as a step before."""

    def __init__(self, prefix: Prefix, sampling: Sampling) -> None:
        self._prefix, self._sampling = prefix, sampling
        self._masks: list[np.ndarray] = []
        self._live: list[bool] = []
        self._hull = slice(None)  # between which ids all that may come next lie
        self._wanted: Wanted

    def of(self, grammars: Sequence[Grammar], live: Sequence[bool], room: int) -> Wanted:
        """Where at most `room` more ids come, of the samples that go on."""
        masks = [g.candidates(room) for g, on in zip(grammars, live, strict=True) if on]
        if self._live != list(live) or any(map(is_not, masks, self._masks)):
            self._masks, self._live = masks, list(live)
            self._wanted = self._plan(np.stack(masks))
        return self._wanted

    def _plan(self, masks: np.ndarray) -> Wanted:
        prefix, sampling = self._prefix, self._sampling
        allowed = np.flatnonzero(masks.any(0))
        self._hull = hull = slice(int(allowed[0]), int(allowed[-1]) + 1)
        kept = None if all(self._live) else torch.tensor(self._live).nonzero()[:, 0]
        outside = ~masks[:, hull]
        forbidden = torch.from_numpy(outside).to(prefix.device) if outside.any() else None

        def spread(hidden: torch.Tensor) -> torch.Tensor:
            logits = prefix.scores(hull, hidden)
            logits = logits if kept is None else logits[kept.to(prefix.device)]
            if forbidden is not None:
                logits = logits.masked_fill(forbidden, -torch.inf)
            return sampling.spread(logits)

        return Wanted((hull.start, outside.tobytes(), sampling), spread)

    @torch.inference_mode()
    def draw(self, spread: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """int64 (samples,); 0 where a sample does not go on."""
        # only samples that go on draw: the generators of the others stay as they are
        on = [g for g, on in zip(generators, self._live, strict=True) if on]
        uniform = uniforms(on, 1, self._prefix.device)
        new = self._sampling.pick(spread, uniform[:, 0]) + self._hull.start
        if all(self._live):
            return new
        rows = torch.tensor(self._live, device=new.device)
        return torch.zeros(len(rows), dtype=new.dtype, device=new.device).masked_scatter(rows, new)


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
