"""Evaluation while a run goes on: held-out losses, early signals, probes, as lines of a file.

It draws nothing at random, leaves the model as it was, and counts towards no expert's load: a run
with it ends bit-equal to one without.
"""

import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmpt.config import UserError
from mmpt.data.shards import is_heldout
from mmpt.data.tokens import SUFFIX, EncodedDocument, TokenShard, open_shards
from mmpt.eval.choices import measure_choices
from mmpt.eval.config import EvaluateConfig, ProbeConfig
from mmpt.eval.heldout import content_streams
from mmpt.eval.passes import Passes
from mmpt.eval.probe import measure_probe
from mmpt.model.transformer import Decoder
from mmpt.stream import Stream
from mmpt.train.metrics import forget_after
from mmpt.train.parallel import Ranks
from mmpt.train.track import Log
from mmpt.vocab import MEDIA, Modality, Vocabulary

FILE = "evaluations.jsonl"
MAX_READ = 20_000  # documents that are looked at to choose from
TRAIN_FACTOR = 4  # a probe learns from so many times the documents that it is judged on


class Evaluation:
    """Measures a model every so many steps, and appends what it finds to the run's file.

    encoded: the folder of token shards, where the config names none. step: how far the run is;
    lines of later steps are dropped, because they will be done again.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        run: Path,
        *,
        vocabulary: Vocabulary,
        encoded: Path | None,
        ranks: Ranks,
        step: int,
        bf16: bool,
    ) -> None:
        self.config, self._vocabulary, self._ranks, self._bf16 = config, vocabulary, ranks, bf16
        patterns = [*config.shards] or ([encoded] if encoded is not None else [])
        if not patterns:
            raise UserError("evaluate.shards is missing; name token shards with held-out documents")
        shards = open_shards(patterns, vocabulary)
        self._separator = shards[0].separator
        by_source: dict[str, list[TokenShard]] = {}
        for shard in shards:
            by_source.setdefault(source_of(shard.path), []).append(shard)
        self._documents = {
            source: _by_medium(_read(own, heldout=True), config.documents)
            for source, own in by_source.items()
        }
        if not any(self._documents.values()):
            raise UserError(
                f"evaluate: {', '.join(map(str, patterns))} has no held-out document; encode the "
                "held-out shards too, or name them as evaluate.shards"
            )
        self._probes = {name: _labelled(shards, p, config) for name, p in config.probes.items()}
        if ranks.first:
            forget_after(run / FILE, step)
        self._log = Log(run / FILE if ranks.first else None)

    def after(self, step: int, tokens: int, model: Decoder, *, last: bool) -> None:
        """Measure and write a line if it is time to; all ranks call it."""
        if self.config.is_due(step) or last:
            begin = time.monotonic()
            row = {"step": step, "tokens": tokens} | self.measure(model)
            self._log.write(row | {"seconds": round(time.monotonic() - begin, 3)})

    def measure(self, model: Decoder) -> dict[str, Any]:
        """loss: medium -> nats; sources: source -> medium -> nats; choices; probes."""
        passes = Passes(model, self._vocabulary, ranks=self._ranks, bf16=self._bf16)
        sources = self._losses(passes)
        choices: dict[str, Any] = {}
        for medium in MEDIA if self.config.candidates else ():
            documents = [each.get(medium, []) for each in self._documents.values()]
            choices |= measure_choices(
                passes,
                self._vocabulary,
                medium,
                documents,
                self._separator,
                candidates=self.config.candidates,
            )
        probes = {
            name: measure_probe(
                passes,
                self._vocabulary,
                Modality[self.config.probes[name].medium.upper()],
                *labelled,
                self._separator,
            )
            for name, labelled in self._probes.items()
        }
        return {
            "loss": _together(sources.values()),
            "sources": {source: _means(sums) for source, sums in sources.items()},
            "choices": choices,
            "probes": {name: row for name, row in probes.items() if row},
        }

    def streams(self) -> list[tuple[str, str, Stream]]:
        """Source, medium, and a held-out stream in which content of that medium alone counts."""
        return [
            (source, medium.name.lower(), each.told)
            for source, by_medium in self._documents.items()
            for medium, documents in by_medium.items()
            for document in documents
            for each in content_streams(document, self._vocabulary, medium, self._separator)
        ]

    def _losses(self, passes: Passes) -> dict[str, dict[str, tuple[float, int]]]:
        """Source -> medium -> summed nats, and ids."""
        found = self.streams()
        nats = passes.nats([stream for *_, stream in found])
        sums: dict[str, dict[str, tuple[float, int]]] = {source: {} for source in self._documents}
        for (source, medium, stream), each in zip(found, nats, strict=True):
            total, count = sums[source].get(medium, (0.0, 0))
            sums[source][medium] = total + each, count + int(stream.loss_weight.sum())
        return sums


def source_of(path: Path) -> str:
    """emoji-heldout-0000.tokens.tar -> emoji."""
    name = path.name.removesuffix(SUFFIX)
    return re.sub(r"(-(train|heldout|val|test))?(-\d+)?$", "", name) or name


def _read(shards: Sequence[TokenShard], *, heldout: bool) -> list[EncodedDocument]:
    """Documents of one side of the split; of very many, every k-th."""
    found = [
        (shard, number)
        for shard in shards
        for number, base in enumerate(shard.bases)
        if is_heldout(base) == heldout
    ]
    return [shard[number] for shard, number in _spread(found, MAX_READ)]


def _by_medium(
    documents: Sequence[EncodedDocument], count: int
) -> dict[Modality, list[EncodedDocument]]:
    found = {m: [d for d in documents if _has(d, m)] for m in Modality}
    return {m: _spread(each, count) for m, each in found.items() if each}


def _has(document: EncodedDocument, medium: Modality) -> bool:
    return any(segment.modality == medium for segment in document.segments)


def _spread(documents: list[Any], count: int) -> list[Any]:
    """At most `count`, every k-th."""
    return documents[:: -(-len(documents) // count)] if documents else []


def _labelled(
    shards: Sequence[TokenShard], probe: ProbeConfig, config: EvaluateConfig
) -> tuple[list[tuple[EncodedDocument, str]], list[tuple[EncodedDocument, str]]]:
    """Documents of training and held-out ones, each with its label."""
    medium, pattern = Modality[probe.medium.upper()], re.compile(probe.pattern)

    def find(*, heldout: bool, count: int) -> list[tuple[EncodedDocument, str]]:
        pairs = [
            (document, match[1])
            for document in _read(shards, heldout=heldout)
            if (match := pattern.search(document.key)) and match[1] and _has(document, medium)
        ]
        return _spread(pairs, count)

    train = find(heldout=False, count=TRAIN_FACTOR * config.documents)
    return train, find(heldout=True, count=config.documents)


def _together(sources: Iterable[dict[str, tuple[float, int]]]) -> dict[str, dict[str, Any]]:
    sums: dict[str, tuple[float, int]] = {}
    for source in sources:
        for medium, (nats, count) in source.items():
            total, before = sums.get(medium, (0.0, 0))
            sums[medium] = total + nats, before + count
    return _means(
        {m.name.lower(): sums[m.name.lower()] for m in Modality if m.name.lower() in sums}
    )


def _means(sums: dict[str, tuple[float, int]]) -> dict[str, dict[str, Any]]:
    return {
        medium: {"nats": round(nats / count, 5), "ids": count}
        for medium, (nats, count) in sums.items()
        if count
    }
