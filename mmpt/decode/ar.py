"""Autoregressive decoding: one id a step, over a cache, held to the grammar of the stream.

`generate_block` writes the codes of a span whose header is given; `generate` (and `generate_steps`,
the same as an iterator) lets the model decide what comes. Neither ever returns a broken span.
"""

from collections.abc import Collection, Iterator, Sequence
from operator import is_not
from typing import Literal, NamedTuple

import numpy as np
import torch

from mmpt.config import UserError
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
) -> Iterator[torch.Tensor]:
    """`generate_block` as an iterator: the new ids int64 (samples,) of each step."""
    grammars = check_open(vocabulary, [*prompts, *(unconditional or ())], modality, length)
    prefix = Prefix(model, vocabulary, prompts, unconditional, sampling)
    candidates = candidate_ids(vocabulary, modality, prefix.device)
    uniform = uniforms(generators, length, prefix.device)
    book, num_books = (
        codebook_of(vocabulary, modality, candidates),
        vocabulary.num_codebooks(modality),
    )
    places = torch.tensor([g.place for g in grammars[: len(prompts)]], device=prefix.device)
    new = None
    for step in range(length):
        if new is not None:
            prefix.push(new, [modality] * len(prompts), [True] * len(prompts))
        scores = prefix.scores(candidates)
        if num_books > 1:
            wanted = (places + step) % num_books
            scores = scores.masked_fill(book != wanted[:, None], -torch.inf)
        new = candidates[sampling.choose(scores, uniform[:, step])]
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
) -> Iterator[Step]:
    """Continue each prompt by at most `max_ids` ids, until one of `ends` (the last id then).

    allow: the media that may be written. shapes: the grids that may be begun, per medium; any that
    fits where a medium has none. stop = "header" also stops a sample right behind the header of a
    span, so that the caller can fill the span in parallel and go on.
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
