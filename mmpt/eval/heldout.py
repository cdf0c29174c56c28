"""Held-out likelihood by medium: ours, baselines of the same ids, and the shuffled condition.

Documents whose parts are views of one idea are laid out with the target last, behind all their
other parts; pages are read as they are. Only content counts: text ids and codes, not begins, sizes
and ends. The shuffled control gives each target the conditions of four other documents with parts
of the same kinds: a model that ignores its condition gains nothing from the right one.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmpt.config import UserError
from mmpt.data.layout import to_conditioned_stream, to_stream
from mmpt.data.pack import split
from mmpt.data.shards import is_heldout
from mmpt.data.tokens import EncodedDocument, open_shards
from mmpt.eval.likelihood import (
    bigram,
    paired_interval,
    position_unigram,
    previous_frame,
    unigram,
)
from mmpt.eval.passes import Passes
from mmpt.model.transformer import Decoder
from mmpt.progress import Bar
from mmpt.stream import Stream
from mmpt.vocab import Modality, Vocabulary

LENGTH = 512  # ids of a row; longer pages are cut as in training
DRAWS = 8  # noisy copies of a block that a bound is estimated from
OTHERS = 4  # wrong conditions of a document, averaged: one alone may be near or far by chance
BASELINES = {
    Modality.TEXT: ("bigram", bigram),
    Modality.IMAGE: ("unigram per grid position", position_unigram),
    Modality.VIDEO: ("previous latent frame copied", lambda a, b, v, _: previous_frame(a, b, v)),
    Modality.SPEECH: ("bigram", bigram),
}
OUTSIDE = -1  # modality of ids that do not count


def evaluate_model(
    model: Path,
    overrides: Sequence[str] = (),
    *,
    tokens: Path | None = None,
    elbo: bool = False,
    draws: int | None = None,
    compare: str = "",
    recipe: Path | None = None,
    out: Path | None = None,
    tasks: str = "",
    limit: int | None = None,
    fewshot: int | None = None,
    include_path: Path | None = None,
    length: int | None = None,
) -> dict[str, Any]:
    """Held-out likelihood of MODEL by modality, in nats per id, beside baselines.

    MODEL is a model folder or a run. `tokens` is a folder of token shards, as mmpt encode writes
    it; documents are split by their base key. shuffled_minus_right is [low, mean, high], a 95%
    bootstrap over base keys.

    With --elbo, of an adapted model: an upper bound of the nats of denoising media, and text if it
    was adapted to blocks of it, from `draws` (8) noisy copies of each block, beside autoregressive
    nats of the same codes; and cross-entropy and accuracy by the time of the noise, from 0.1
    (almost all noise) to 0.9. price_of_blocks is what text in blocks costs more than id by id.

    --compare ar,dida: test instead whether the samples of one way to decode are as good as those of
    another; how is said by RECIPE and key=value OVERRIDES of it. OUT gets the samples, which are
    drawn once, gate.json and gate.html.

    --tasks hellaswag,arc_easy: instead the tasks, groups or tags of EleutherAI's lm_eval, over text
    alone: --limit documents of each, --fewshot examples, task files of --include-path, and --length
    (512) ids that the model sees at most. It needs pip install 'mmpt[eval-text]'.
    """
    from mmpt.train.adapt import find_model  # which evaluates while it trains

    if tasks:
        if tokens or elbo or compare:
            raise UserError("--tasks has data of its own; leave out --tokens, --elbo and --compare")
        options = {"limit": limit, "fewshot": fewshot, "include_path": include_path}
        return _evaluate_tasks(model, tasks.split(","), length, options)
    if limit is not None or fewshot is not None or include_path or length is not None:
        raise UserError("--limit, --fewshot, --include-path and --length belong to --tasks")
    if tokens is None:
        raise UserError("give --tokens FOLDER, as mmpt encode writes it, or --tasks NAMES")
    if draws is not None and (compare or not elbo):
        raise UserError(f"--draws {draws} is of the bounds; give --elbo, and no --compare")
    if compare:
        from mmpt.eval.compare import compare_decoders

        if recipe is None or out is None:
            raise UserError("--compare needs --recipe FILE and --out FOLDER")
        return compare_decoders(
            model, overrides, tokens=tokens, names=compare, recipe=recipe, out=out
        )
    if recipe or out or overrides:
        raise UserError("a recipe, its overrides and --out belong to --compare; give --compare")
    vocabulary = Vocabulary.load(Path(tokens) / "vocabulary.json")
    decoder = Decoder.load(find_model(model), vocabulary=vocabulary).eval()
    shards = open_shards([Path(tokens)], vocabulary)
    documents = [document for shard in shards for document in shard]
    train = [d for d in documents if not is_heldout(d.base)]
    heldout = [d for d in documents if is_heldout(d.base)]
    if not train or not heldout:
        raise UserError(
            f"{tokens} holds {len(train)} training and {len(heldout)} held-out documents"
        )
    separator = shards[0].separator
    told = {"model": str(model), "vocabulary": vocabulary.fingerprint}
    if elbo:
        from mmpt.eval.elbo import evaluate_bounds  # which lays documents out as here

        draws = DRAWS if draws is None else draws
        return told | evaluate_bounds(decoder, vocabulary, train, heldout, separator, draws=draws)
    result = {}
    for modality in Bar(Modality, desc="evaluate", unit="medium"):
        if any(segment.modality == modality for d in heldout for segment in d.segments):
            result[modality.name.lower()] = evaluate_modality(
                decoder, vocabulary, modality, train, heldout, separator
            )
    return told | {"heldout": result}


def _evaluate_tasks(
    model: Path, tasks: Sequence[str], length: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    try:
        from mmpt.eval.tasks import LENGTH, evaluate_tasks
    except ModuleNotFoundError as error:
        raise UserError(
            f"--tasks needs {error.name}, which is absent: pip install 'mmpt[eval-text]'"
        ) from None
    from mmpt.pipeline import Pipeline

    pipeline = Pipeline.load(model)
    length = LENGTH if length is None else length
    return {"model": str(model)} | evaluate_tasks(pipeline, tasks, length=length, **options)


def evaluate_modality(
    model: Decoder,
    vocabulary: Vocabulary,
    modality: Modality,
    train: Sequence[EncodedDocument],
    heldout: Sequence[EncodedDocument],
    separator: np.ndarray,
) -> dict[str, Any]:
    """One row of the table, see `evaluate_model`."""

    def streams(documents: Sequence[EncodedDocument]) -> list[Scored]:
        return [s for d in documents for s in content_streams(d, vocabulary, modality, separator)]

    seen, held = streams(train), streams(heldout)
    counted = [stream.loss_weight > 0 for stream in held]
    tokens = int(sum(mask.sum() for mask in counted))
    passes = Passes(model, vocabulary)
    ours = passes.nats([stream.told for stream in held])
    name, baseline = BASELINES[modality]
    row = {
        "tokens": tokens,
        "nats": sum(ours) / tokens,
        "unigram_nats": _mean(unigram(seen, held, vocabulary, modality), counted),
        "baseline_nats": _mean(baseline(seen, held, vocabulary, modality), counted),
    }
    row = {key: round(value, 4) for key, value in row.items()}
    return row | {"baseline": name} | _shuffled(passes, vocabulary, modality, heldout, separator)


def content_streams(
    document: EncodedDocument,
    vocabulary: Vocabulary,
    modality: Modality,
    separator: np.ndarray,
    *,
    length: int = LENGTH,
) -> Iterator["Scored"]:
    """The document's streams in which content of `modality` is scored; all other ids weigh 0."""
    if all(segment.modality != modality for segment in document.segments):
        return
    if document.order == "any":
        stream = to_conditioned_stream(document, vocabulary, modality, separator=separator)
    else:
        rng = np.random.default_rng(zlib.crc32(document.key.encode()))
        stream = to_stream(
            document, vocabulary, rng, separator=separator, condition_drop=0.0, masked_prompts=True
        )
        content = (stream.modality == modality) & (stream.loss_weight > 0)
        if modality == Modality.TEXT:
            content &= stream.ids < vocabulary.num_text
        stream.loss_weight = content.astype(np.float32)
    for piece in split(stream, length):
        scored = piece.loss_weight > 0
        scored[0] = False  # nothing stands before it
        if scored.any():
            modalities = np.where(scored, piece.modality, OUTSIDE).astype(np.int8)
            yield Scored(piece, modalities, scored)


class Scored(Stream):
    """A stream whose `modality` marks what counts; `told` is what the model sees."""

    def __init__(self, stream: Stream, counted: np.ndarray, scored: np.ndarray) -> None:
        super().__init__(stream.ids, counted, scored.astype(np.float32), stream.spans)
        self.told = Stream(stream.ids, stream.modality, scored.astype(np.float32), stream.spans)


def _shuffled(
    passes: Passes,
    vocabulary: Vocabulary,
    modality: Modality,
    heldout: Sequence[EncodedDocument],
    separator: np.ndarray,
) -> dict[str, Any]:
    def laid_out(document: EncodedDocument, source: EncodedDocument | None) -> Stream:
        return to_conditioned_stream(
            document, vocabulary, modality, separator=separator, condition_from=source
        )

    pairs = list(_with_others(heldout, modality))
    if not pairs:
        return {"shuffled_nats": None, "conditioned_nats": None, "shuffled_minus_right": None}
    bases = [document.base for document, _ in pairs]
    right = [laid_out(document, None) for document, _ in pairs]
    wrong = [laid_out(document, other) for document, others in pairs for other in others]
    counts = [int(stream.loss_weight.sum()) for stream in right]
    good, each = passes.nats(right), iter(passes.nats(wrong))
    bad = [sum(islice(each, len(others))) / len(others) for _, others in pairs]
    # documents of one idea are not independent: the bootstrap draws ideas
    by_base = (_by_base(bases, values) for values in (bad, good, counts))
    interval = paired_interval(*by_base, generator=np.random.default_rng(0))
    return {
        "shuffled_nats": round(sum(bad) / sum(counts), 4),
        "conditioned_nats": round(sum(good) / sum(counts), 4),  # of the same documents
        "shuffled_minus_right": [
            round(float(v), 4) for v in (interval.low, interval.mean, interval.high)
        ],
    }


def _by_base(bases: Sequence[str], values: Sequence[float]) -> list[float]:
    sums: dict[str, float] = defaultdict(float)
    for base, value in zip(bases, values, strict=True):
        sums[base] += value
    return list(sums.values())


def _with_others(
    documents: Sequence[EncodedDocument], target: Modality
) -> Iterator[tuple[EncodedDocument, list[EncodedDocument]]]:
    """Each document that has a condition, with others that have parts of the same kinds."""
    alike: dict[tuple[Modality, ...], list[EncodedDocument]] = defaultdict(list)
    for document in documents:
        kinds = tuple(s.modality for s in document.segments if s.modality != target)
        has_target = len(kinds) < len(document.segments)
        if document.order == "any" and kinds and has_target:
            alike[kinds].append(document)
    for group in alike.values():
        for place, document in enumerate(group):
            rest = [
                other for other in group[place + 1 :] + group[:place] if other.base != document.base
            ]
            if rest:
                yield document, rest[:OTHERS]


def _mean(nats: Sequence[np.ndarray], counted: Sequence[np.ndarray]) -> float:
    total = sum(float(n[mask].sum()) for n, mask in zip(nats, counted, strict=True))
    return total / sum(int(mask.sum()) for mask in counted)
