"""DiDA: media blocks decoded in parallel by discrete diffusion (Emu3.5, arXiv 2510.26583).

A *block* is an image, one latent frame of a video, a span of speech or a few ids of text. Its noisy
copy is a slot and N codes. The slot is a copy of the id before the block, so that the shift of an
autoregressive model is kept: the output at the slot or at a code is about the code behind it; the
last output is unused. Noisy ids see the clean ids up to and including the one that the slot copies,
and their own copy both ways; clean ids see clean ids only. How codes become noise, from time 1
(clean) to 0, is the path's matter (`mmpt.decode.noise`). A block may have several copies at other
times: they do not see each other.

Legend: B batch, L clean ids of a row, M noisy ids of a row, N codes of a block, V candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mmpt.decode.ar import codebook_of
from mmpt.decode.noise import Alphabet, denoised_ids, denoised_media
from mmpt.model.config import NoiseConfig
from mmpt.model.rotary import axes_of
from mmpt.model.transformer import Decoder
from mmpt.stream import SPAN_COLUMNS, Rows
from mmpt.vocab import Modality, Vocabulary

SCORES = 1 << 22  # of candidates, that exist at a time


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
    copies: int = 1,
    noise: NoiseConfig | None = None,
    alphabets: Mapping[Modality, Alphabet] | None = None,
) -> JointRows:
    """Lay noisy copies of the rows' blocks behind them, at most `max_noisy` ids a row.

    Blocks are chosen at random where not all fit. Each has up to `copies` copies, one in each equal
    part of time; on the masked path they are pairs that mask what the other one shows. Blocks whose
    codes carry no loss weight are conditions and get no copy. alphabets: by medium, those of
    `noise` unless given. Rows are on the host; each has its generator, so that its noise does not
    depend on the other rows. noise: the mixture path unless given.
    """
    noise = noise or NoiseConfig()
    if alphabets is None:
        media = denoised_media(vocabulary, noise)
        alphabets = {m: Alphabet.over(vocabulary, m, noise) for m in media}
    blocks = _media_blocks(rows)
    if noise.text_block:
        phases = [torch.randint(noise.text_block, (1,), generator=g) for g in generators]
        plain = (rows.modality == Modality.TEXT) & (rows.ids < vocabulary.num_text)
        text = _text_blocks(rows, plain, noise.text_block, torch.cat(phases))
        blocks = torch.cat((blocks, text))
    blocks = blocks[rows.loss_weight[blocks[:, 0], blocks[:, 1]] > 0]
    blocks = blocks[(blocks[:, 0] * rows.ids.shape[1] + blocks[:, 1]).argsort()]
    drawn = [
        _draw(blocks[blocks[:, 0] == row], generator, max_noisy, copies, noise.path == "masked")
        for row, generator in enumerate(generators)
    ]
    size, axes = rows.ids.shape, axes_of(rows)
    noisy = _noisy(rows, axes, drawn, alphabets, by_time=noise.path == "masked")
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
    """Weighted sum of cross-entropies in nats (with gradient), and the sum of weights."""

    nats: torch.Tensor
    weight: torch.Tensor


def denoising_loss(
    model: Decoder, vocabulary: Vocabulary, joint: JointRows, hidden: torch.Tensor
) -> dict[Modality, BlockLoss]:
    """Cross-entropy of the clean codes of noisy positions with weight, among the used ones.

    On the mixture and the metric path all positions count alike, kept or not, and at every time
    (URSA, arXiv 2510.24717). The sums of several batches or ranks may be added before dividing.
    Where there are more than `SCORES`, they are made in parts, and again for the gradients.
    """
    out, head = {}, model.embedding if model.head is None else model.head
    for modality in denoised_media(vocabulary, model.config.noise):
        candidates = denoised_ids(vocabulary, modality, hidden.device)
        index = torch.full((len(vocabulary) + 1,), -1, device=hidden.device)  # label -1: the last
        index[candidates] = torch.arange(len(candidates), device=hidden.device)
        label = index[joint.labels]
        chosen = (joint.modality == modality) & (label >= 0) & (joint.loss_weight > 0)
        book = None
        if modality != Modality.TEXT and vocabulary.num_codebooks(modality) > 1:
            book = codebook_of(vocabulary, modality, candidates)
        columns = hidden[chosen], label[chosen], joint.loss_weight[chosen]
        head_VD, rows = head.index_select(0, candidates), max(1, SCORES // len(candidates))
        measure = partial(_weighted_nats, head_VD=head_VD, book=book)
        if len(columns[0]) > rows:
            measure = partial(checkpoint, measure, use_reentrant=False)
        parts = zip(*(column.split(rows) for column in columns), strict=True)
        nats = torch.stack(cast(list[torch.Tensor], [measure(*part) for part in parts])).sum()
        out[modality] = BlockLoss(nats, columns[2].to(nats.dtype).sum())
    return out


def _weighted_nats(
    hidden: torch.Tensor,
    label: torch.Tensor,
    weight: torch.Tensor,
    *,
    head_VD: torch.Tensor,
    book: torch.Tensor | None,
) -> torch.Tensor:
    """book: int64 (V,), where candidates have several: a position has that of its label."""
    scores = F.linear(hidden, head_VD)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if book is not None:
        scores = scores.masked_fill(book != book[label][:, None], -torch.inf)
    return (F.cross_entropy(scores, label, reduction="none") * weight.to(scores.dtype)).sum()


class _Drawn(NamedTuple):
    """Of one row: its C copies, in order of their blocks, and the noise of their M ids.

    blocks: (C, 4), see `_media_blocks`. time: float64 (C,). partner: int64 (C,), the copy whose
    noise is turned round; itself where there is none. uniform: float64 (2, M).
    """

    blocks: torch.Tensor
    time: torch.Tensor
    partner: torch.Tensor
    uniform: torch.Tensor


def _media_blocks(rows: Rows) -> torch.Tensor:
    """int64 (K, 4): row, start of the codes, length and medium of each block."""
    columns = dict(zip(SPAN_COLUMNS, rows.spans.T, strict=True))
    frames, length = columns["frames"], columns["height"] * columns["width"]
    span = torch.arange(len(frames)).repeat_interleave(frames)
    frame = torch.arange(len(span)) - (frames.cumsum(0) - frames)[span]
    length = length[span]
    start = columns["start"][span] + frame * length
    return torch.stack((columns["row"][span], start, length, columns["modality"][span]), dim=1)


def _text_blocks(rows: Rows, plain: torch.Tensor, size: int, phase: torch.Tensor) -> torch.Tensor:
    """As `_media_blocks`, of runs of plain text (bool (B, L)), cut every `size` ids of a document.

    phase: int64 (B,), where the cuts are: a prompt may end anywhere.
    """
    plain = plain & (rows.position > 0) & (rows.document >= 0)  # nothing stands before the first id
    begins = (rows.position + phase[:, None]) % size == 0
    begins[:, 1:] |= ~plain[:, :-1] | (rows.document[:, 1:] != rows.document[:, :-1])
    begins[:, 0] = True
    begins &= plain
    length = torch.bincount(begins.flatten().cumsum(0)[plain.flatten()] - 1)
    row, start = begins.nonzero().T
    return torch.stack((row, start, length, torch.full_like(row, Modality.TEXT)), dim=1)


def _draw(
    blocks: torch.Tensor, generator: torch.Generator, room: int, copies: int, pairs: bool
) -> _Drawn:
    counts, sizes = torch.zeros(len(blocks), dtype=torch.int64), (1 + blocks[:, 2]).tolist()
    for index in torch.randperm(len(blocks), generator=generator).tolist():
        counts[index] = min(copies, room // sizes[index])
        room -= int(counts[index]) * sizes[index]
    block = torch.arange(len(blocks)).repeat_interleave(counts)
    partner = torch.arange(len(block))
    number, count = partner - (counts.cumsum(0) - counts)[block], counts[block]
    uniform = torch.rand(len(block), generator=generator, dtype=torch.float64)
    time = (number + uniform) / count
    if pairs:
        turned = 2 * number >= count
        partner = torch.where(turned, partner + count - 1 - 2 * number, partner)
        time = torch.where(turned, 1 - time[partner], time)
    num_ids = int((1 + blocks[block, 2]).sum())
    noise = torch.rand(2, num_ids, generator=generator, dtype=torch.float64)
    return _Drawn(blocks[block], time, partner, noise)


def _noisy(
    rows: Rows,
    axes: torch.Tensor,
    drawn: Sequence[_Drawn],
    alphabets: Mapping[Modality, Alphabet],
    *,
    by_time: bool,
) -> JointRows:
    # all ids of all copies at once, one after another: `copy` is whose each is, `place` where in
    # it, 0 the slot; `source` and `target` are where it comes from and goes to, in all rows
    row, start, length, modality = torch.cat([each.blocks for each in drawn]).T
    numbers = torch.cat([torch.arange(len(each.time)) for each in drawn])
    first = (1 + length).cumsum(0) - 1 - length
    copy = torch.arange(len(length)).repeat_interleave(1 + length)
    place = torch.arange(len(copy)) - first[copy]
    source = (row * rows.ids.shape[1] + start - 1)[copy] + place
    widths = [each.uniform.shape[1] for each in drawn]
    # one at least, for the weights of noisy ids take part in every step, on every rank
    out = _empty(len(drawn), max(1, *widths))
    target = torch.cat(
        [number * out.ids.shape[1] + torch.arange(width) for number, width in enumerate(widths)]
    )
    time = torch.cat([each.time for each in drawn])
    partner = torch.cat([each.partner for each in drawn]) + torch.arange(len(numbers)) - numbers
    uniform = torch.cat([each.uniform for each in drawn], dim=1)
    turned = (partner != torch.arange(len(partner)))[copy]
    uniform = torch.where(turned, 1 - uniform[:, first[partner][copy] + place], uniform)

    ids, weight = rows.ids.flatten()[source], rows.loss_weight.flatten()[source]
    shown, medium = ids.clone(), modality[copy]
    for each, alphabet in alphabets.items():
        chosen = (medium == each) & (place > 0)
        noisy = alphabet.corrupt(ids[chosen], time[copy[chosen]], uniform[:, chosen])
        shown[chosen] = noisy.shown
        weight[chosen] = weight[chosen] * noisy.hidden
    last = place == length[copy]
    columns = {
        "ids": shown,
        "modality": medium,
        "document": rows.document.flatten()[source],
        "position": rows.position.flatten()[source],
        "block": numbers[copy],
        "limit": rows.position.flatten()[source - place],
        "axes": axes.flatten(0, 1)[source],
        "labels": ids.roll(-1).masked_fill(last, -1),
        "loss_weight": weight.roll(-1).masked_fill(last, 0.0),
        "time": time[copy].float(),
    }
    if by_time:  # of text the bound of the likelihood (arXiv 2406.07524), to one code a block
        rate = torch.maximum(1 - columns["time"], 1 / length[copy])
        columns["loss_weight"] /= torch.where(medium == Modality.TEXT, rate, 1.0)
    for name, values in columns.items():
        getattr(out, name).flatten(0, 1)[target] = values
    return out


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


def _cat(clean: JointRows, noisy: JointRows) -> JointRows:
    columns = {
        f.name: torch.cat((getattr(clean, f.name), getattr(noisy, f.name)), dim=1)
        for f in fields(clean)
        if f.name != "num_clean"
    }
    return JointRows(**columns, num_clean=clean.num_clean)
