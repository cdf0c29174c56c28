"""What a model predicts for noisy copies of blocks: sums of nats and hits, by piece.

Clean ids are computed once, and kept in a cache that the copies read; many copies stand side by
side in a row, as in training, and do not see each other.

Legend: B rows, M noisy ids of a row, N codes of a block, V candidates, S shares, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from mmpt.decode.noise import Alphabet
from mmpt.eval.bounds import KINDS, LEVELS, QUARTERS, Copy, mixture_nats, shares_of
from mmpt.model.cache import KVCache
from mmpt.model.transformer import Decoder
from mmpt.progress import Bar
from mmpt.stream import Rows, Stream
from mmpt.vocab import Modality, Vocabulary

BATCH = 8  # rows of a pass
NOISY = 512  # noisy ids of a row that are computed at once; a longer block is computed alone
SCORES = 1 << 20  # that are held at once, in float64
BOUND = len(LEVELS)  # parts: levels, quarters of the bound, the autoregressive pass
AUTOREGRESSIVE = BOUND + QUARTERS


class Block(NamedTuple):
    """Clean codes (N,), as indices, that begin at id `start` of a stream, and noisy copies."""

    start: int
    clean: torch.Tensor
    copies: list[Copy]


@dataclass(frozen=True)
class Piece:
    """A stream that is one row, and its blocks; others were left out."""

    base: str
    stream: Stream
    blocks: list[Block]
    left_out: int


class Sums(NamedTuple):
    """Over codes, by their weights: float64 (pieces, parts), nats (pieces, parts, S).

    What shares do not matter for is the same for all. hits: of codes whose score was the best.
    """

    nats: torch.Tensor
    hits: torch.Tensor
    weights: torch.Tensor


class Scorer:
    """Runs pieces of one medium, and their noisy copies, through a model."""

    def __init__(
        self, model: Decoder, vocabulary: Vocabulary, modality: Modality, alphabet: Alphabet
    ) -> None:
        self._model, self._modality, self._alphabet = model, modality, alphabet
        self._pad, self._shares = vocabulary.structure_id("<pad>"), shares_of(alphabet.path)

    @torch.inference_mode()
    def sums(self, pieces: Sequence[Piece]) -> Sums:
        """What each piece comes to, whatever the others are."""
        zeros = torch.zeros(
            len(pieces),
            AUTOREGRESSIVE + 1,
            len(self._shares),
            dtype=torch.float64,
            device=self._model.embedding.device,
        )
        sums = Sums(zeros, zeros[..., 0].clone(), zeros[..., 0].clone())
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i].stream))  # little padding
        name = f"denoise {self._modality.name.lower()}"
        for begin in Bar(range(0, len(order), BATCH), desc=name, unit="batch"):
            self._batch(pieces, order[begin : begin + BATCH], sums)
        return Sums(*(each.cpu() for each in sums))

    def _batch(self, pieces: Sequence[Piece], chosen: list[int], sums: Sums) -> None:
        length = max(len(pieces[i].stream) for i in chosen)
        rows = Rows.pack([[pieces[i].stream] for i in chosen], length, self._pad)
        rows = rows.to(self._model.embedding.device)
        axes, cache = self._model.axes_of(rows), self._model.new_cache()
        columns = {n: getattr(rows, n) for n in ("ids", "modality", "document", "position")}
        hidden = self._model(**columns, axes=axes, cache=cache)
        for row, i in enumerate(chosen):
            for block in pieces[i].blocks:
                states = hidden[row, block.start - 1 : block.start - 1 + len(block.clean)]
                nats, hits = self._score(states, block.clean)
                sums.nats[i, AUTOREGRESSIVE] += nats.sum(0)
                sums.hits[i, AUTOREGRESSIVE] += hits.sum()
                sums.weights[i, AUTOREGRESSIVE] += len(hits)
        number = torch.tensor(chosen, device=hidden.device)
        for told in _passes([pieces[i].blocks for i in chosen]):
            noisy = _lay_out(told, self._alphabet.shown)
            scored = noisy["weight"] > 0
            states = self._denoise(rows, axes, cache, noisy)[scored]
            nats, hits = self._score(
                states, *(noisy[n][scored] for n in ("clean", "noisy", "time", "kind"))
            )
            weight = noisy["weight"][scored]
            where = number[:, None].expand_as(scored)[scored], noisy["part"][scored]
            sums.nats.index_put_(where, nats * weight[:, None], accumulate=True)
            sums.hits.index_put_(where, hits * weight, accumulate=True)
            sums.weights.index_put_(where, weight, accumulate=True)

    def _denoise(
        self,
        rows: Rows,
        axes: torch.Tensor | None,
        cache: KVCache,
        noisy: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Hidden states (B, M, D) of copies laid out by `_lay_out`."""
        place, slot, live = noisy["place"], noisy["slot"], noisy["block"] >= 0
        return self._model(
            torch.where(place == slot, rows.ids.gather(1, place), noisy["ids"]),
            modality=torch.where(live, int(self._modality), 0),
            position=rows.position.gather(1, place),
            document=torch.where(live, rows.document.gather(1, place), -1),
            block=noisy["block"],
            limit=rows.position.gather(1, slot),
            axes=None if axes is None else axes.gather(1, place[..., None].expand(-1, -1, 3)),
            time=noisy["time"].float(),
            cache=cache,
            append=False,
        )

    def _score(
        self, states: torch.Tensor, clean: torch.Tensor, *noisy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats (n, S) and hits (n,), float64, of clean codes (n,) at hidden states (n, D).

        noisy: the noisy codes, their times, and their kinds (`KINDS`); without, all are plain.
        """
        book_V, columns = self._alphabet.book_V, (states, clean, *noisy)
        rows, parts = max(1, SCORES // len(book_V)), []
        for state, code, *rest in zip(*(c.split(rows) for c in columns), strict=True):
            inside = book_V == book_V[code][:, None]  # a position has one codebook
            scores = self._model.logits(state, self._alphabet.ids_V).double()
            log_p = scores.masked_fill(~inside, -torch.inf).log_softmax(-1)
            nats = -log_p.gather(1, code[:, None]).repeat(1, len(self._shares))
            if rest and bool((shared := rest[2] > 0).any()):
                told = (each[shared] for each in (log_p, code, *rest[:2], inside))
                nats[shared] = mixture_nats(*told, rates=rest[2][shared] == KINDS.index("rates"))
            parts.append((nats, (log_p.argmax(-1) == code).double()))
        nats, hits = (torch.cat(part) for part in zip(*parts, strict=True))
        return nats, hits


class Told(NamedTuple):
    """A copy, and the block that it is of."""

    block: Block
    copy: Copy


def _passes(blocks: Sequence[list[Block]]) -> Iterator[list[list[Told]]]:
    """The copies of each row's blocks, as many at once as `NOISY` allows, until none is left."""
    rows = [[Told(b, copy) for b in each for copy in b.copies][::-1] for each in blocks]
    while any(rows):
        taken: list[list[Told]] = [[] for _ in rows]
        for waiting, now in zip(rows, taken, strict=True):
            room = NOISY
            while waiting and (not now or room > len(waiting[-1].block.clean)):
                now.append(waiting.pop())
                room -= 1 + len(now[-1].block.clean)
        yield taken


# of copies laid out; where a row has no copy they are 0, and the block is -1
COLUMNS = {
    **dict.fromkeys(
        ("ids", "place", "slot", "block", "clean", "noisy", "part", "kind"), torch.int64
    ),
    **dict.fromkeys(("time", "weight"), torch.float64),
}


def _lay_out(rows: Sequence[Sequence[Told]], shown: torch.Tensor) -> dict[str, torch.Tensor]:
    """Columns (B, M) of copies side by side, each a slot and N codes.

    ids: what codes are shown as. place, slot: columns of the clean ids that ids and their slot
    stand for. block: the number of the copy. The others are about the code behind.
    """
    told = [[_columns(each, n, shown) for n, each in enumerate(row)] for row in rows]
    return {
        name: pad_sequence(
            [torch.cat([shown.new_zeros(0, dtype=kind), *(c[name] for c in row)]) for row in told],
            batch_first=True,
            padding_value=-1 if name == "block" else 0,
        )
        for name, kind in COLUMNS.items()
    }


def _columns(told: Told, number: int, shown: torch.Tensor) -> dict[str, torch.Tensor]:
    block, copy = told
    place = torch.arange(len(block.clean) + 1, device=shown.device) + block.start - 1
    return {
        "ids": F.pad(shown[copy.noisy], (1, 0)),
        "place": place,
        "slot": torch.full_like(place, block.start - 1),
        "block": torch.full_like(place, number),
        "clean": F.pad(block.clean, (0, 1)),
        "noisy": F.pad(copy.noisy, (0, 1)),
        "part": torch.full_like(place, copy.part),
        "kind": torch.full_like(place, KINDS.index(copy.kind)),
        "time": torch.full_like(place, copy.time, dtype=torch.float64),
        "weight": F.pad(copy.weight, (0, 1)),
    }
