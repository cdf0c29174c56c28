"""Parallel decoding: whole blocks of codes, refined in a few passes over a cache of what is before.

A block is an image, one latent frame of a video, or a span of speech. `samplers` says what a pass
writes. Any codes can be held: they never change, and are shown clean in every pass.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.decode.ar import check_open
from mmpt.decode.blocks import Blocks, check_counts, join
from mmpt.decode.passes import Denoising
from mmpt.decode.prefix import Prompts
from mmpt.decode.sampling import Sampling
from mmpt.model.transformer import Decoder
from mmpt.vocab import Modality, Vocabulary

Held = Sequence[np.ndarray | None]
"""Of each sample the ids (length,) that stay, and -1 where codes are to be drawn; None: nowhere."""


class Pass(NamedTuple):
    """After pass `done` of at most `total`.

    committed counts the codes of each sample that will not change any more, held ones too. nfe
    counts forward passes that were run so far, two where both branches were, with those that
    committed blocks (the last block is committed by who goes on); prompts are not counted.
    """

    done: int
    total: int
    codes: list[np.ndarray]  # of each sample the codes so far, as ids (n,)
    committed: list[int]
    nfe: int


def denoise_block(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Prompts,
    *,
    modality: Modality,
    length: int | Sequence[int],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    denoising: Denoising | None = None,
    unconditional: Prompts | None = None,
    held: Held | None = None,
    on_pass: Callable[[Pass], None] | None = None,
) -> list[np.ndarray]:
    """The next `length` codes, as ids int64 (length,), of the span that each prompt has open.

    As `generate_block`, in `denoising.num_passes` passes per block instead of one per code.
    """
    codes: list[np.ndarray] = []
    for preview in denoise_passes(
        model,
        vocabulary,
        prompts,
        modality=modality,
        length=length,
        sampling=sampling,
        generators=generators,
        denoising=denoising,
        unconditional=unconditional,
        held=held,
    ):
        codes = preview.codes
        if on_pass is not None:
            on_pass(preview)
    return codes


def denoise_passes(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Prompts,
    *,
    modality: Modality,
    length: int | Sequence[int],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    denoising: Denoising | None = None,
    unconditional: Prompts | None = None,
    held: Held | None = None,
) -> Iterator[Pass]:
    """`denoise_block` as an iterator over its passes; a video's frames are committed one by one.

    length: of all samples, or of each: prompts and grids of a batch may differ. held: see `Held`; a
    block that is held as a whole takes no passes.
    """
    denoising = denoising or Denoising()
    lengths = [length] * len(prompts) if isinstance(length, int) else list(length)
    check_counts(len(prompts), length=lengths, generators=generators, held=held)
    grids = _grids(vocabulary, prompts, unconditional, modality, lengths)
    for grid in grids:
        denoising.check_block(*grid)
    sizes, widths = [prod(grid) for grid in grids], [grid[1] for grid in grids]
    given = _given(vocabulary, modality, lengths, held)
    blocks = Blocks(
        model,
        vocabulary,
        prompts,
        modality=modality,
        denoising=denoising,
        sampling=sampling,
        generators=generators,
        unconditional=unconditional,
    )
    count = max(n // size for n, size in zip(lengths, sizes, strict=True))
    done, total = 0, count * len(blocks.sampler.steps)
    written = [np.zeros(0, dtype=np.int64)] * len(prompts)
    for number in range(count):
        if number:
            blocks.commit()
        before = done
        now = [ids[number * size :][:size] for ids, size in zip(given, sizes, strict=True)]
        for settled in blocks.write(now, widths):
            done += 1
            committed = [len(w) + n for w, n in zip(written, settled, strict=True)]
            yield Pass(done, total, join(written, blocks.codes), committed, blocks.nfe)
        written = join(written, blocks.codes)
    if done == before:  # the last block is held, and took no pass
        yield Pass(done, done, written, lengths, blocks.nfe)


def _grids(
    vocabulary: Vocabulary,
    prompts: Prompts,
    unconditional: Prompts | None,
    modality: Modality,
    lengths: Sequence[int],
) -> list[tuple[int, int]]:
    """Rows and columns of the blocks that each prompt has open; `lengths` are whole blocks."""
    grids = []
    for row, length in enumerate(lengths):
        both = [prompts[row], *([] if unconditional is None else unconditional[row : row + 1])]
        grammars = check_open(vocabulary, both, modality, length)
        sizes = {tuple(g.sizes[-2:]) for g in grammars}
        block = grammars[0].block
        if len(sizes) > 1 or length % block or any(g.remaining % block for g in grammars):
            raise UserError(
                f"{length} codes are no whole number of blocks of {block} codes; a prompt and its "
                "unconditional one need one grid"
            )
        grids.append((block // grammars[0].sizes[-1], grammars[0].sizes[-1]))
    return grids


def _given(
    vocabulary: Vocabulary, modality: Modality, lengths: Sequence[int], held: Held | None
) -> list[np.ndarray]:
    ranges, out = vocabulary.ranges_of(modality), []
    for length, ids in zip(lengths, held or [None] * len(lengths), strict=True):
        ids = np.full(length, -1) if ids is None else np.asarray(ids, dtype=np.int64)
        if ids.shape != (length,):
            raise UserError(
                f"held ids of shape {ids.shape} for {length} codes; give ({length},), -1 where "
                "codes are drawn"
            )
        book = np.arange(length) % len(ranges)
        start, stop = (np.array([getattr(r, n) for r in ranges])[book] for n in ("start", "stop"))
        if ((ids != -1) & ~((start <= ids) & (ids < stop))).any():
            raise UserError(
                f"held ids are not all {modality.name.lower()} codes of their codebook; use "
                "Vocabulary.ids_of, and -1 where codes are drawn"
            )
        out.append(ids)
    return out
