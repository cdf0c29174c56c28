"""Self-distillation: a model learns to denoise what it wrote itself, id by id.

Before the first step, the start model samples media of training documents anew, autoregressively,
each on the condition of the other media of its document, with guidance baked in. The samples are
token shards in the run folder, each whole or absent, so that the same command goes on; training
reads them as one more source.
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpt.config import UserError, to_dict
from mmpt.data.layout import to_conditioned_stream
from mmpt.data.logical import open_sources
from mmpt.data.mix import SourceConfig
from mmpt.data.order import ShardSource, mix_keys, permute
from mmpt.data.tokens import SUFFIX, EncodedDocument, ShardWriter, TokenShard
from mmpt.decode.ar import generate_block
from mmpt.flat import offsets
from mmpt.model.transformer import Decoder
from mmpt.model.weights import fingerprint
from mmpt.process import pick_device
from mmpt.stream import Span, parse
from mmpt.train.recipe import AdaptRecipe, DistillConfig
from mmpt.vocab import MEDIA, Vocabulary

NAME = "distilled"  # of the source, and of its folder
PER_SHARD = 512  # documents

log = logging.getLogger(__name__)


def with_samples(
    recipe: AdaptRecipe, run: str | Path, start: Path, vocabulary: Vocabulary
) -> AdaptRecipe:
    """The recipe with samples of the model at `start` as a source, which are made if they lack.

    Ranks share the work. Raises UserError for samples that were made otherwise.
    """
    if not recipe.distill.documents or NAME in recipe.data.sources:  # as in a run's own recipe
        return recipe
    sources = _sources(recipe, vocabulary)
    chosen = _choose(recipe, sources, vocabulary)
    folder = Path(run) / NAME
    parts = {
        folder / f"{NAME}-{number:05d}{SUFFIX}": chosen[first : first + PER_SHARD]
        for number, first in enumerate(range(0, len(chosen), PER_SHARD))
    }
    notes = _notes(recipe, sources, start)
    rank, count = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    model: Decoder | None = None
    for path in list(parts)[rank::count]:
        if not path.is_file():
            if model is None:
                model = Decoder.load(start, vocabulary=vocabulary)
                model = model.to(pick_device(recipe.device)).eval()
            jobs = [_job(recipe, sources, each, vocabulary) for each in parts[path]]
            _write(path, jobs, model, vocabulary, recipe.distill, notes)
            log.info("%s: %d documents are sampled anew", path, len(jobs))
    for path in parts:
        while not path.is_file():  # another rank is at it
            time.sleep(1.0)
        if (theirs := TokenShard(path).notes) != notes:
            key = next(key for key in notes if theirs.get(key) != notes[key])
            raise UserError(
                f"{path} was sampled with {key} = {theirs.get(key)}, now it is {notes[key]}; "
                f"choose a new --out, or delete {folder}"
            )
    return _mix(recipe, folder)


@dataclass
class _Job:
    """A document whose ids are written anew from left to right.

    spans: which are still to come. begin: where the header of the first one began.
    """

    document: EncodedDocument
    ids: np.ndarray
    spans: list[Span]
    begin: int
    generator: torch.Generator


Reference = tuple[str, int]  # a source, and a number among its documents that are not held out


def _sources(recipe: AdaptRecipe, vocabulary: Vocabulary) -> dict[str, ShardSource]:
    opened = open_sources(recipe.data, vocabulary, recipe.seed)
    sources = {name: each for name, each in opened.items() if isinstance(each, ShardSource)}
    if not sources:
        raise UserError("distill needs documents of token shards; the data has live pipelines only")
    return sources


def _choose(
    recipe: AdaptRecipe, sources: dict[str, ShardSource], vocabulary: Vocabulary
) -> list[Reference]:
    """In a seeded order over all documents: those with media that fit a row."""
    names, starts = list(sources), offsets([len(each) for each in sources.values()])
    size, chosen = int(starts[-1]), []
    for place in range(size):
        if len(chosen) == recipe.distill.documents:
            break
        order = np.array([mix_keys(recipe.seed, 0)], dtype=np.uint64)
        [at] = permute(np.array([place], dtype=np.uint64), size, order).astype(np.int64)
        source = int(np.searchsorted(starts, at, side="right")) - 1
        reference = names[source], int(at - starts[source])
        document, _ = sources[reference[0]].read(reference[1])
        # of a conversation some media are given, not answered
        if not document.roles and any(s.modality in MEDIA for s in document.segments):
            job = _job(recipe, sources, reference, vocabulary)
            chosen += [reference] if len(job.ids) <= recipe.data.length else []
    if not chosen:
        raise UserError(
            f"distill: no document has media and fits data.length = {recipe.data.length}"
        )
    return chosen


def _job(
    recipe: AdaptRecipe,
    sources: dict[str, ShardSource],
    reference: Reference,
    vocabulary: Vocabulary,
) -> _Job:
    name, number = reference
    document, separator = sources[name].read(number)
    key = mix_keys(mix_keys(recipe.seed, list(sources).index(name)), number)
    media = sorted({s.modality for s in document.segments if s.modality in MEDIA})
    target = media[key % len(media)]
    stream = to_conditioned_stream(document, vocabulary, target, separator=separator)
    spans = [span for span in stream.spans if span.modality == target]
    generator = torch.Generator().manual_seed(key >> 1)
    return _Job(document, stream.ids, spans, spans[0].start - spans[0].num_header, generator)


def _notes(recipe: AdaptRecipe, sources: dict[str, ShardSource], start: Path) -> dict[str, Any]:
    settings = {f"distill.{k}": v for k, v in to_dict(recipe.distill).items()}
    for free in ("batch", "share"):  # which change no sample
        del settings[f"distill.{free}"]
    return settings | {
        "weights": fingerprint(start),
        "seed": recipe.seed,
        "data.length": recipe.data.length,
        "data": {name: each.fingerprint for name, each in sources.items()},
    }


def _write(
    path: Path,
    jobs: Sequence[_Job],
    model: Decoder,
    vocabulary: Vocabulary,
    config: DistillConfig,
    notes: dict[str, Any],
) -> None:
    with ShardWriter(path, vocabulary) as writer:
        while waiting := [job for job in jobs if job.spans]:
            for batch in _batches(waiting, config.batch):
                _sample(batch, model, vocabulary, config)
        for job in jobs:
            document = job.document
            segments = list(parse(job.ids, vocabulary))
            writer.add(EncodedDocument(f"{document.key}-{NAME}", document.base, "fixed", segments))
        writer.finish(notes)


def _batches(jobs: Sequence[_Job], size: int) -> Iterator[list[_Job]]:
    def kind(job: _Job) -> tuple[int, int]:
        return job.spans[0].modality, job.spans[0].length

    for _, group in groupby(sorted(jobs, key=kind), kind):
        alike = list(group)
        yield from (alike[first : first + size] for first in range(0, len(alike), size))


def _sample(
    jobs: Sequence[_Job], model: Decoder, vocabulary: Vocabulary, config: DistillConfig
) -> None:
    spans = [job.spans.pop(0) for job in jobs]
    prompts = [job.ids[: span.start] for job, span in zip(jobs, spans, strict=True)]
    unconditional = None
    if config.guidance != 1:
        dropped = [vocabulary.structure_id(name) for name in ("<bod>", "<null>")]
        unconditional = [
            np.concatenate((dropped, prompt[job.begin :]))
            for job, prompt in zip(jobs, prompts, strict=True)
        ]
    codes = generate_block(
        model,
        vocabulary,
        prompts,
        modality=spans[0].modality,
        length=spans[0].length,
        sampling=config.sampling,
        generators=[job.generator for job in jobs],
        unconditional=unconditional,
    )
    for job, span, ids in zip(jobs, spans, codes, strict=True):
        job.ids[span.start : span.start + span.length] = ids


def _mix(recipe: AdaptRecipe, folder: Path) -> AdaptRecipe:
    real, share = dict(recipe.data.sources), recipe.distill.share
    total = sum(source.weight for source in real.values())
    if share == 1:
        real = {name: replace(source, weight=0.0) for name, source in real.items()}
    weight = 1.0 if share == 1 else total * share / (1 - share)
    samples = SourceConfig(shards=(str(folder),), weight=weight)
    return replace(recipe, data=replace(recipe.data, sources={**real, NAME: samples}))
