"""Text in blocks: what it says is written in parallel, where it ends is decided one id at a time.

A block holds text ids only. Text ends by `<eod>` or by the begin of a medium, and the pass that
commits a block gives, behind each of its ids, the autoregressive probability of such an id: the
block is cut where the first one is drawn. So at every id the chance to end is that of
autoregressive decoding, for no pass more; only what stands between is drawn in another way.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.decode.blocks import Blocks, check_counts, join
from mmpt.decode.denoise import Pass
from mmpt.decode.passes import Denoising
from mmpt.decode.prefix import Prompts
from mmpt.decode.sampling import Grammar, Sampling, draw
from mmpt.model.transformer import Decoder
from mmpt.vocab import Modality, Vocabulary


def denoise_text(
    model: Decoder,
    vocabulary: Vocabulary,
    prompts: Prompts,
    *,
    max_ids: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    denoising: Denoising | None = None,
    allow: Sequence[Modality] = (),
    ends: Sequence[str] = ("<eod>",),
    unconditional: Prompts | None = None,
) -> Iterator[Pass]:
    """Continue each prompt by at most `max_ids` ids, in blocks of `model.config.noise.text_block`.

    A sample stops behind the id that ends its text: one of `ends`, or the begin of a medium of
    `allow`, whose span is for the caller to go on with. Ids are committed block by block.
    """
    size, denoising = model.config.noise.text_block, denoising or Denoising()
    if not size:
        raise UserError("this model was not adapted to blocks of text; use decoder='ar' for text")
    if max_ids < 1:
        raise UserError(f"max_ids = {max_ids}; use 1 or more")
    check_counts(len(prompts), generators=generators)
    for prompt in prompts:
        grammar = Grammar(vocabulary)
        grammar.read(prompt)
        if grammar.open is not None or grammar.ended:
            raise UserError("text goes on only outside of a span and before <eod>")
    denoising.check_block(1, min(size, max_ids))
    blocks = Blocks(
        model,
        vocabulary,
        prompts,
        modality=Modality.TEXT,
        denoising=denoising,
        sampling=sampling,
        generators=generators,
        unconditional=unconditional,
    )
    mask = Grammar(vocabulary, allow=(Modality.TEXT, *allow), ends=ends).candidates(max_ids)
    candidates = torch.from_numpy(mask.nonzero()[0]).to(blocks.prefix.device)
    drawn = _draw_ends(blocks, candidates, blocks.prefix.hidden[:, None], [1] * len(prompts))
    written = [end[end >= 0] for end in drawn]
    open_ = [not len(end) for end in written]
    done, total = 0, -(-max_ids // size) * len(blocks.sampler.steps)
    for start in range(0, max_ids, size):
        if not any(open_):
            break
        room = min(size, max_ids - start)
        sizes = [room if on else 0 for on in open_]
        before = [len(ids) for ids in written]
        for _ in blocks.write([np.full(n, -1) for n in sizes], [room] * len(prompts)):
            done += 1
            yield Pass(done, total, join(written, blocks.codes), before, blocks.nfe)
        codes = blocks.codes
        drawn = _draw_ends(blocks, candidates, blocks.commit(), sizes)
        for row, (ids, end) in enumerate(zip(codes, drawn, strict=True)):
            [stop] = np.flatnonzero(end >= 0)[:1].tolist() or [None]
            more = ids if stop is None else np.append(ids[: stop + 1], end[stop])
            written[row] = np.concatenate([written[row], more])[:max_ids]
            open_[row] = open_[row] and stop is None
    yield Pass(done, total, written, [len(ids) for ids in written], blocks.nfe)


def _draw_ends(
    blocks: Blocks, candidates: torch.Tensor, hidden: torch.Tensor, sizes: list[int]
) -> list[np.ndarray]:
    """Of each sample (n,): the id that ends text behind each of its n ids, or -1.

    candidates: text ids, then those that end it. hidden: (rows, N, D).
    """
    num_text = len(blocks.alphabet.ids_V)
    p = blocks.sampling.probabilities(blocks.prefix.scores(candidates, hidden))[..., num_text:]
    total = p.sum(-1, keepdim=True)
    uniform = blocks.draws(2, torch.tensor(sizes) > 0, sizes)
    which = candidates[num_text + draw(torch.where(total > 0, p, 1.0), uniform[1])]
    ends = torch.where(uniform[0] < total[..., 0], which, -1).cpu().numpy()
    return [row[:n] for row, n in zip(ends, sizes, strict=True)]
