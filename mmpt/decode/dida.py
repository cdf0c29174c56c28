"""DiDA: media blocks decoded in parallel by discrete diffusion (Emu3.5, arXiv 2510.26583).

A *block* is an image, one latent frame of a video, or a span of speech. Its noisy copy is a slot
and N codes. The slot is a copy of the id before the block, so that the shift of an autoregressive
model is kept: the output at the slot or at a code is about the code behind it; the last output is
unused. Noisy ids see the clean ids up to and including the one that the slot copies, and their own
block both ways; clean ids see clean ids only. Noise replaces codes by uniform ones (the mixture
path of discrete flow matching, arXiv 2407.15595): at time t from 0 (noise) to 1 (clean) each code
is kept with probability t, and nothing marks which ones were.

Legend: B batch, L clean ids of a row, M noisy ids of a row, N codes of a block, V candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmpt.decode.ar import candidate_ids, codebook_of
from mmpt.model.rotary import axes_of
from mmpt.model.transformer import Decoder
from mmpt.stream import SPAN_COLUMNS, Rows
from mmpt.vocab import MEDIA, Modality, Vocabulary


@dataclass
class JointRows:
    """[clean | noisy blocks]; all (B, L + M), int64 but for the last two.

    ids, modality, document, position, block, limit: see `Rows` and `Layout`. axes: (B, L + M, 3),
    see `axes_of`. labels: the clean id that the output here is about, -1 for clean ids, last
    outputs and pads. loss_weight, time: float32, time is the t of the block (1 for clean ids).
    num_clean: L.
    """

    ids: torch.Tensor
    modality: torch.Tensor
    document: torch.Tensor
    position: torch.Tensor
    block: torch.Tensor
    limit: torch.Tensor
    axes: torch.Tensor
    labels: torch.Tensor
    loss_weight: torch.Tensor
    time: torch.Tensor
    num_clean: int

    def to(self, device: torch.device | str) -> "JointRows":
        """The same rows on another device."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if f.name != "num_clean"
        }
        return JointRows(**moved, num_clean=self.num_clean)


def corrupt(
    rows: Rows,
    vocabulary: Vocabulary,
    *,
    generators: Sequence[torch.Generator],
    max_noisy: int,
) -> JointRows:
    """Lay noisy copies of the rows' media blocks behind them, at most `max_noisy` ids a row.

    Blocks are chosen at random where not all fit; each has its own time. Blocks whose codes carry
    no loss weight are conditions and get no copy. Rows are on the host; each has its generator, so
    that its noise does not depend on the other rows.
    """
    chosen = [
        _choose(blocks, max_noisy, generator)
        for blocks, generator in zip(_blocks(rows), generators, strict=True)
    ]
    # one at least, for the weights of noisy ids take part in every step, on every rank
    num_noisy = max(1, *(sum(1 + block.length for block in blocks) for blocks in chosen))
    size = rows.ids.shape
    noisy = _empty(size[0], num_noisy)
    candidates = {
        m: candidates_by_book(vocabulary, m, rows.ids.device) for m in MEDIA if vocabulary.has(m)
    }
    axes = axes_of(rows)
    for row, blocks in enumerate(chosen):
        offset = 0
        for number, block in enumerate(blocks):
            place = slice(offset, offset + 1 + block.length)
            books, generator = candidates[block.modality], generators[row]
            _write(noisy, rows, row, place, number, block, books, generator)
            noisy.axes[row, place] = axes[row, block.start - 1 : block.start + block.length]
            offset = place.stop
    clean = JointRows(
        rows.ids,
        rows.modality,
        rows.document,
        rows.position,
        block=torch.full(size, -1),
        limit=rows.position,
        axes=axes,
        labels=torch.full(size, -1),
        loss_weight=torch.zeros(size),
        time=torch.ones(size),
        num_clean=size[1],
    )
    return _cat(clean, noisy)


def joint_forward(
    model: Decoder, joint: JointRows, *, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """Hidden states (B, L + M, D) of clean and noisy ids, in one pass over the joint layout.

    noise: int64 (B,), seeds of what routers draw.

    When clean ids meet frozen weights only, they are computed first and without gradients, and the
    noisy ids read their keys from a cache: the same numbers at about half the cost.
    """
    names = "ids", "modality", "document", "position", "block", "limit", "axes", "time"
    columns = {name: getattr(joint, name) for name in names}
    if not model.frozen_clean or joint.num_clean == joint.ids.shape[1]:
        return model(**columns, noise=noise)
    cache = model.new_cache()
    with torch.no_grad():
        clean = model(**{name: c[:, : joint.num_clean] for name, c in columns.items()}, cache=cache)
    noisy = {name: c[:, joint.num_clean :] for name, c in columns.items()}
    hidden = model(**noisy, noise=noise, cache=cache, append=False)
    return torch.cat((clean, hidden), dim=1)


class BlockLoss(NamedTuple):
    """Weighted sum of cross-entropies in nats (with gradient), the sum of weights, and the hits."""

    nats: torch.Tensor
    weight: torch.Tensor
    correct: torch.Tensor  # weighted count of labels that had the best score


def denoising_loss(
    model: Decoder, vocabulary: Vocabulary, joint: JointRows, hidden: torch.Tensor
) -> dict[Modality, BlockLoss]:
    """Cross-entropy of every noisy position's clean code, among the used codes of its medium.

    All positions count alike, kept or not, and at every time (URSA, arXiv 2510.24717). The sums of
    several batches or ranks may be added before dividing.
    """
    out = {}
    for modality in MEDIA:
        if not vocabulary.has(modality):
            continue
        candidates = candidate_ids(vocabulary, modality, hidden.device)
        index = torch.full((len(vocabulary) + 1,), -1, device=hidden.device)  # label -1: the last
        index[candidates] = torch.arange(len(candidates), device=hidden.device)
        label = index[joint.labels]
        chosen = (joint.modality == modality) & (label >= 0)
        logits, label = model.logits(hidden[chosen], candidates), label[chosen]
        book = codebook_of(vocabulary, modality, candidates)
        if vocabulary.num_codebooks(modality) > 1:  # a position has one codebook
            logits = logits.masked_fill(book != book[label][:, None], -torch.inf)
        weight = joint.loss_weight[chosen].to(logits.dtype)
        nats = F.cross_entropy(logits, label, reduction="none")
        hits = (logits.detach().argmax(-1) == label).to(weight.dtype)
        out[modality] = BlockLoss((nats * weight).sum(), weight.sum(), (hits * weight).sum())
    return out


def candidates_by_book(
    vocabulary: Vocabulary, modality: Modality, device: torch.device
) -> list[torch.Tensor]:
    """The ids of a medium's used codes, int64 (V,) for each of its codebooks."""
    ids = candidate_ids(vocabulary, modality, device)
    book = codebook_of(vocabulary, modality, ids)
    return [ids[book == index] for index in range(vocabulary.num_codebooks(modality))]


class _Block(NamedTuple):
    start: int  # of the first code, in its row
    length: int
    modality: Modality


def _blocks(rows: Rows) -> list[list[_Block]]:
    out: list[list[_Block]] = [[] for _ in rows.ids]
    for values in rows.spans.tolist():
        span = dict(zip(SPAN_COLUMNS, values, strict=True))
        length = span["height"] * span["width"]
        for frame in range(span["frames"]):
            block = _Block(span["start"] + frame * length, length, Modality(span["modality"]))
            if rows.loss_weight[span["row"], block.start] > 0:
                out[span["row"]].append(block)
    return out


def _choose(blocks: list[_Block], room: int, generator: torch.Generator) -> list[_Block]:
    chosen = []
    for index in torch.randperm(len(blocks), generator=generator).tolist():
        if 1 + blocks[index].length <= room:
            chosen.append(blocks[index])
            room -= 1 + blocks[index].length
    return sorted(chosen)


def _empty(num_rows: int, num_noisy: int) -> JointRows:
    shape = (num_rows, num_noisy)
    zero, none = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    axes = torch.zeros(*shape, 3, dtype=torch.int64)
    columns = (zero, zero, none, zero, none, zero, axes, none)
    return JointRows(
        *(column.clone() for column in columns),
        loss_weight=torch.zeros(shape),
        time=torch.zeros(shape),
        num_clean=0,
    )


def _write(
    out: JointRows,
    rows: Rows,
    row: int,
    place: slice,
    number: int,
    block: _Block,
    candidates: list[torch.Tensor],
    generator: torch.Generator,
) -> None:
    # the slot and the noisy copy of one block, at `place` of the noisy part
    source = slice(block.start - 1, block.start + block.length)
    codes = rows.ids[row, block.start : source.stop]
    time = torch.rand((), generator=generator)
    noise = torch.empty_like(codes)
    for index, book in enumerate(candidates):  # blocks begin with the first codebook
        size = noise[index :: len(candidates)].shape
        noise[index :: len(candidates)] = book[torch.randint(len(book), size, generator=generator)]
    kept = torch.rand(codes.shape, generator=generator) < time
    out.ids[row, place.start] = rows.ids[row, source.start]
    out.ids[row, place.start + 1 : place.stop] = torch.where(kept, codes, noise)
    out.modality[row, place] = block.modality
    out.document[row, place] = rows.document[row, source]
    out.position[row, place] = rows.position[row, source]
    out.block[row, place] = number
    out.limit[row, place] = rows.position[row, source.start]
    out.labels[row, place.start : place.stop - 1] = codes
    out.loss_weight[row, place.start : place.stop - 1] = rows.loss_weight[
        row, block.start : source.stop
    ]
    out.time[row, place] = time


def _cat(clean: JointRows, noisy: JointRows) -> JointRows:
    columns = {
        f.name: torch.cat((getattr(clean, f.name), getattr(noisy, f.name)), dim=1)
        for f in fields(clean)
        if f.name != "num_clean"
    }
    return JointRows(**columns, num_clean=clean.num_clean)
