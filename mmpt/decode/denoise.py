"""Parallel decoding: whole blocks of codes, refined in a few passes over a cache of what is before.

The prefix is only read while a block is denoised; the finished block is committed by one pass.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.decode.ar import Prefix, Prompts, candidate_ids, check_open, codebook_of
from mmpt.decode.sampling import Sampling, draw, uniforms
from mmpt.model.transformer import Decoder
from mmpt.vocab import Modality, Vocabulary


class Pass(NamedTuple):
    """After pass `done` of `total`: the codes so far of each sample, as ids (n,)."""

    done: int
    total: int
    codes: list[np.ndarray]


def denoise_block(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Prompts,
    *,
    modality: Modality,
    length: int,
    num_passes: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    unconditional: Prompts | None = None,
    shift: float = 1.0,
    on_pass: Callable[[int, list[np.ndarray]], None] | None = None,
) -> list[np.ndarray]:
    """The next `length` codes, as ids int64 (length,), of the span that each prompt has open.

    As `generate_block`, in `num_passes` passes per block instead of one per code.
    """
    codes: list[np.ndarray] = []
    for preview in denoise_passes(
        model,
        vocabulary,
        prompts,
        modality=modality,
        length=length,
        num_passes=num_passes,
        sampling=sampling,
        generators=generators,
        unconditional=unconditional,
        shift=shift,
    ):
        codes = preview.codes
        if on_pass is not None:
            on_pass(preview.done, codes)
    return codes


def denoise_passes(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Prompts,
    *,
    modality: Modality,
    length: int,
    num_passes: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    unconditional: Prompts | None = None,
    shift: float = 1.0,
) -> Iterator[Pass]:
    """`denoise_block` as an iterator over its passes; a video's frames are committed one by one."""
    times = schedule(num_passes, shift)
    block = _block_size(vocabulary, [*prompts, *(unconditional or ())], modality, length)
    prefix = Prefix(model, vocabulary, prompts, unconditional, sampling)
    candidates = candidate_ids(vocabulary, modality, prefix.device)
    live = torch.ones(len(prompts), dtype=torch.bool, device=prefix.device)
    book = codebook_of(vocabulary, modality, candidates)
    wanted = torch.arange(block, device=prefix.device) % vocabulary.num_codebooks(modality)
    elsewhere = book != wanted[:, None]  # (block, V): candidates of another codebook
    count, first = (~elsewhere).sum(1), (~elsewhere).int().argmax(1)
    finished: list[torch.Tensor] = []
    total, done = num_passes * (length // block), 0
    for _ in range(length // block):
        if finished:
            prefix.append(finished[-1], torch.full_like(finished[-1], modality), live)
        uniform = uniforms(generators, block, prefix.device)
        index = (uniform * count).long().clamp(max=count - 1) + first
        for now, then in pairwise(times):
            scores = prefix.block_scores(candidates[index], modality, candidates, time=now)
            scores = scores.masked_fill(elsewhere, -torch.inf)
            uniform = uniforms(generators, 2 * block, prefix.device)
            guess = draw(sampling.probabilities(scores), uniform[:, :block])
            # exact jump probability of the mixture path between the two times
            index = torch.where(uniform[:, block:] < (then - now) / (1 - now), guess, index)
            done += 1
            codes = torch.cat([*finished, candidates[index]], dim=1)
            yield Pass(done, total, list(codes.cpu().numpy()))
        finished.append(candidates[index])


def schedule(num_passes: int, shift: float = 1.0) -> list[float]:
    """Times t_0 = 0 to t_K = 1 of K passes: u / (u + shift (1 - u)) at u = k / K."""
    if num_passes < 1 or shift <= 0:
        raise UserError(
            f"num_passes {num_passes}, shift {shift}: use at least 1 pass and shift > 0"
        )
    steps = [k / num_passes for k in range(num_passes + 1)]
    return [u / (u + shift * (1 - u)) for u in steps]


def _block_size(vocabulary: Vocabulary, prompts: Prompts, modality: Modality, length: int) -> int:
    sizes = {g.block for g in check_open(vocabulary, prompts, modality, length)}
    if len(sizes) != 1 or length % min(sizes):
        raise UserError(
            f"{length} codes are no whole number of blocks of {sorted(sizes)} codes; "
            "the prompts of one call need one grid"
        )
    return min(sizes)
