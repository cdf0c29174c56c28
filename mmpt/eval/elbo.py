"""How likely an adapted model finds held-out media when it denoises them, beside autoregression.

A block of an image, of a frame, of speech or of text is bounded from above in nats, given the clean
ids before it; those of a span or a video add up. Autoregressive nats are of the same codes among
the same candidates: the used codes of the codebook of each position, of text its plain ids. The
metric path has no simple bound; cross-entropy and accuracy by the time of the noise are reported
for all paths.

Text is cut as decoding cuts it, every `text_block` ids from where it begins. Where it ends is left
out: both ways to decode draw that from the same autoregressive probabilities. So the difference is
the price of text in blocks, measured from above, as the bound is.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.data.tokens import EncodedDocument
from mmpt.decode.noise import Alphabet, denoised_media
from mmpt.eval.bounds import LEVELS, bound_copies, level_copies, shares_of
from mmpt.eval.denoised import AUTOREGRESSIVE, BOUND, Block, Piece, Scorer, Sums
from mmpt.eval.heldout import LENGTH, content_streams
from mmpt.model.transformer import Decoder
from mmpt.stream import Stream
from mmpt.vocab import Modality, Vocabulary

FITTED_ON = 64  # training documents


def evaluate_bounds(
    model: Decoder,
    vocabulary: Vocabulary,
    train: Sequence[EncodedDocument],
    heldout: Sequence[EncodedDocument],
    separator: np.ndarray,
    *,
    draws: int,
) -> dict[str, Any]:
    """A row for each medium of which there are held-out documents, see `bound_modality`."""
    if not any(group.noisy for group in model.config.groups.values()):
        raise UserError("a bound needs a model that denoises; run mmpt adapt on this one first")
    if draws < 1:
        raise UserError(f"draws = {draws}; use 1 or more")
    rows = {}
    for modality in denoised_media(vocabulary, model.config.noise):
        seen, held = (
            [d for d in documents if any(s.modality == modality for s in d.segments)]
            for documents in (train, heldout)
        )
        if held:
            row = bound_modality(model, vocabulary, modality, seen, held, separator, draws=draws)
            rows[modality.name.lower()] = row
    return {"noise": model.config.noise.path, "draws": draws, "heldout": rows}


def bound_modality(
    model: Decoder,
    vocabulary: Vocabulary,
    modality: Modality,
    train: Sequence[EncodedDocument],
    heldout: Sequence[EncodedDocument],
    separator: np.ndarray,
    *,
    draws: int,
) -> dict[str, Any]:
    """Nats per code of documents with one medium, each with the standard error over base keys.

    Drawing noise adds to the errors, and less with more draws. Blocks with codes that training
    never used are left out, and counted. shares: for each quarter of the time, the one of `SHARES`
    that is best for some of the training documents.
    """
    alphabet, size = Alphabet.of(model, vocabulary, modality), model.config.noise.text_block
    scorer = Scorer(model, vocabulary, modality, alphabet)

    def laid_out(documents: Sequence[EncodedDocument]) -> tuple[list[Piece], int]:
        pieces = [
            piece
            for document in documents
            for piece in _pieces(document, vocabulary, modality, separator, alphabet, draws, size)
        ]
        return [p for p in pieces if p.blocks], sum(p.left_out for p in pieces)

    held, left_out = laid_out(heldout)
    if not held:
        return {"codes": 0, "blocks_left_out": left_out}
    shares = shares_of(alphabet.path)
    best = torch.zeros(AUTOREGRESSIVE - BOUND, dtype=torch.int64)
    if len(shares) > 1:
        seen, _ = laid_out(train[:: max(1, len(train) // FITTED_ON)])
        best = scorer.sums(seen).nats[:, BOUND:AUTOREGRESSIVE].sum(0).argmin(-1)
    row = _report(held, scorer.sums(held), best) | {"blocks_left_out": left_out}
    if modality == Modality.TEXT and "upper_bound" in row:
        row["price_of_blocks"] = _price(row, size)
    return row | ({"shares": [shares[n] for n in best]} if len(shares) > 1 else {})


def _price(row: dict[str, Any], size: int) -> dict[str, Any]:
    gap = row["upper_bound_minus_autoregressive"]
    return {
        "ids_of_a_block": size,
        "nats_an_id": gap["nats"],
        "standard_error": gap["standard_error"],
        "percent": round(100 * gap["nats"] / row["autoregressive"]["nats"], 2),
    }


def _pieces(
    document: EncodedDocument,
    vocabulary: Vocabulary,
    modality: Modality,
    separator: np.ndarray,
    alphabet: Alphabet,
    draws: int,
    text_block: int,
) -> Iterator[Piece]:
    # noise is a function of the document's key, whatever other documents there are
    generator = torch.Generator().manual_seed(zlib.crc32(document.key.encode()))
    spans = [
        s.codes.size for s in document.segments if s.modality in (Modality.IMAGE, Modality.VIDEO)
    ]
    length = LENGTH + max(spans, default=0)  # no span is cut, nor parted from what it is about
    for stream in content_streams(document, vocabulary, modality, separator, length=length):
        if modality == Modality.TEXT:
            places = list(_text_places(stream.told, vocabulary, text_block))
        else:
            places = list(_places(stream.told, modality))
        blocks = []
        for place in places:
            ids = stream.ids[place]
            if not vocabulary.allowed[modality][ids].all():
                continue
            clean = alphabet.index(torch.from_numpy(ids).to(alphabet.ids_V.device))
            levels = level_copies(alphabet.path, clean, generator)
            bound = bound_copies(alphabet.path, clean, generator, draws=draws)
            blocks.append(Block(place.start, clean, [*levels, *bound]))
        yield Piece(document.base, stream.told, blocks, len(places) - len(blocks))


def _places(stream: Stream, modality: Modality) -> Iterator[slice]:
    """Where the blocks that count are: images, frames of videos, spans of speech."""
    for span in stream.spans:
        size = span.grid[1] * span.grid[2]
        if span.modality == modality and stream.loss_weight[span.start] > 0:
            for start in range(span.start, span.start + span.length, size):
                yield slice(start, start + size)


def _text_places(stream: Stream, vocabulary: Vocabulary, size: int) -> Iterator[slice]:
    """Runs of plain text, what separates texts included, cut every `size` ids."""
    plain = (stream.modality == Modality.TEXT) & (stream.ids < vocabulary.num_text)
    plain[0] = False  # nothing stands before it
    edges = np.flatnonzero(np.diff(plain, append=False)) + 1
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        for start in range(begin, end, size):
            yield slice(start, min(start + size, end))


def _report(pieces: Sequence[Piece], sums: Sums, best: torch.Tensor) -> dict[str, Any]:
    bases, index = np.unique([piece.base for piece in pieces], return_inverse=True)

    def by_base(values: torch.Tensor) -> np.ndarray:
        return np.stack([values.numpy()[index == base].sum(0) for base in range(len(bases))])

    plain, weights, hits = by_base(sums.nats[..., -1]), by_base(sums.weights), by_base(sums.hits)
    codes, alone = weights[:, AUTOREGRESSIVE], plain[:, AUTOREGRESSIVE]
    row = {
        "codes": int(codes.sum()),
        "base_keys": len(bases),
        "autoregressive": _mean(alone, codes),
    }
    if weights[:, BOUND:AUTOREGRESSIVE].any():
        chosen = sums.nats[:, BOUND:AUTOREGRESSIVE].gather(
            2, best.expand(len(pieces), -1)[..., None]
        )
        bound = by_base(chosen.sum((1, 2)))
        row["upper_bound"] = _mean(bound, codes)
        row["upper_bound_minus_autoregressive"] = _mean(bound - alone, codes)
    row["by_time"] = [
        {"time": time}
        | _mean(plain[:, level], weights[:, level])
        | {"accuracy": round(float(hits[:, level].sum() / weights[:, level].sum()), 4)}
        for level, time in enumerate(LEVELS)
        if weights[:, level].any()
    ]
    return row


def _mean(sums: np.ndarray, counts: np.ndarray) -> dict[str, float | None]:
    """Nats per code, and the standard error if base keys (n,) are drawn anew; None of one alone."""
    mean, error = sums.sum() / counts.sum(), None
    if len(sums) > 1:
        spread = ((sums - mean * counts) ** 2).sum() * len(sums) / (len(sums) - 1)
        error = round(float(spread**0.5 / counts.sum()), 4)
    return {"nats": round(float(mean), 4), "standard_error": error}
