"""Logical streams: the fixed parts of a run's rows, whoever reads them.

A run has as many as its recipe says, for ever. Row i of the run is of stream i mod L, and stream s
reads every L-th document of each source, from the s-th on. A stream's rows depend on nothing but
itself, so that any number of ranks and processes gives the same rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np

from mmpt.config import UserError
from mmpt.data.mix import Mixer, Schedule, SourceConfig, Stage
from mmpt.data.order import ShardSource, Source
from mmpt.data.pack import PACKERS, Packer, PackReport, Piece
from mmpt.data.pipeline_source import Gone, PipelineSource, of_pipelines
from mmpt.data.tokens import open_shards
from mmpt.stream import Stream, pack_arrays
from mmpt.vocab import Modality, Vocabulary

Arrays = dict[str, np.ndarray]  # the fields of `Rows`
States = dict[int, dict[str, Any]]  # stream -> its state
MEDIA_NAMES = [modality.name.lower() for modality in Modality]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it is mixed and packed."""

    sources: dict[str, SourceConfig]
    schedule: tuple[Stage, ...] = ()  # how the weights of the sources change during the run
    rows: int = 16  # rows a batch, over all ranks
    length: int = 512  # ids a row
    packing: Literal["best-fit", "first-fit", "concatenation", "none"] = "best-fit"
    buffer: int = 256  # documents that wait for a row they fit, in each stream
    quotas: dict[str, int] = field(default_factory=dict)  # medium -> most ids of it in a row
    condition_drop: float = 0.1  # share of documents that lose their condition (guidance)
    streams: int = 1  # a multiple of every number of ranks that the run will ever have
    workers: int = 0  # processes that prepare rows ahead, at most one a stream

    def __post_init__(self) -> None:
        weights = [source.weight for source in self.sources.values()]
        if not weights or min(weights) < 0 or not sum(weights):
            raise UserError("data.sources needs weights of at least 0, one of them above 0")
        if min(self.rows, self.length, self.buffer, self.streams) < 1 or self.workers < 0:
            raise UserError(
                "data.rows, data.length, data.buffer and data.streams must be at least 1, "
                "data.workers at least 0"
            )
        if self.rows % self.streams:
            raise UserError(
                f"data.rows = {self.rows} is no multiple of data.streams = {self.streams}; every "
                "stream gives equally many rows of a batch"
            )
        for name, most in self.quotas.items():
            if name not in MEDIA_NAMES or most < 1:
                raise UserError(
                    f"data.quotas.{name} = {most}; use {', '.join(MEDIA_NAMES)} with at least 1"
                )
        if self.quotas and self.packing == "concatenation":
            raise UserError("data.quotas are not kept by concatenation; choose another packing")


class Reference(NamedTuple):
    """Where a piece comes from: the `piece`-th of what a stream read `read`-th of a source."""

    source: int  # its place among the names in order
    read: int
    piece: int


def open_sources(config: DataConfig, vocabulary: Vocabulary, seed: int) -> dict[str, Source]:
    """The sources by name, in the order of names."""
    sources: dict[str, Source] = {}
    drop = config.condition_drop
    for name, source in sorted(config.sources.items()):
        if source.pipeline:
            sources[name] = PipelineSource(
                name, source, vocabulary, seed=seed, streams=config.streams, condition_drop=drop
            )
        else:
            shards = open_shards(source.shards, vocabulary)
            sources[name] = ShardSource(name, shards, vocabulary, seed=seed, condition_drop=drop)
    return sources


class LogicalStream:
    """One stream: where it is in each source, and what waits in its packer."""

    def __init__(
        self, number: int, config: DataConfig, sources: Mapping[str, Source], schedule: Schedule
    ) -> None:
        self.number, self.config, self.schedule = number, config, schedule
        self.sources = list(sources.values())
        quotas = {Modality[name.upper()]: most for name, most in config.quotas.items()}
        self.packer: Packer[Reference] = PACKERS[config.packing](
            config.length, buffer=config.buffer, quotas=quotas
        )
        self.mixer = Mixer(list(sources))
        self._live = of_pipelines(sources)
        self._places = {name: place for place, name in enumerate(sources)}
        self._ends = {  # how many documents each source has in all
            name: len(source) * epochs
            for name, source in sources.items()
            if (epochs := config.sources[name].max_epochs) is not None
        }

    def row(self, row: int, weights: Mapping[str, float] | None) -> list[Stream]:
        """Row `row` of the run, by these weights or the schedule's; no streams after the end."""
        self._weigh(row, weights)
        while self.packer.hungry and (name := self.mixer.choose()) is not None:
            self._read(name)
            if name in self._ends and self._is_read(name):
                self._weigh(row, weights)
        return self.packer.row()

    def state(self) -> dict[str, Any]:
        """Values that later rows leave as they are; the residue is int64 (n, 3), see `Reference`.

        It is taken after every batch, and sent between processes, so it has to be cheap.
        """
        report = vars(self.packer.report)
        flat = np.fromiter(chain.from_iterable(self.packer.residue), dtype=np.int64)
        return {
            **self.mixer.state(),
            "residue": flat.reshape(-1, len(Reference._fields)),
            "taken": self.packer.taken,
            "report": report | {"ids": dict(report["ids"])},
            "live": {name: each.counts(self.number) for name, each in self._live.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: what waited in the packer is read again, where it can be."""
        self.mixer.load(state)
        for name, source in self._live.items():
            read = self.mixer.cursors[name].read
            source.resume(self.number, read, state.get("live", {}).get(name, {}))
        read = lru_cache(maxsize=4)(self._pieces)  # a document's pieces stand together
        taken = state["taken"]  # of the oldest piece
        for entry in np.asarray(state["residue"], dtype=np.int64).tolist():
            reference = Reference(*entry)
            try:
                self.packer.add(Piece(reference, read(*reference[:2])[reference.piece]))
            except Gone:
                taken = taken if len(self.packer) else 0
        self.packer.taken = taken
        self.packer.report = PackReport(**state["report"] | {"ids": dict(state["report"]["ids"])})

    def _weigh(self, row: int, weights: Mapping[str, float] | None) -> None:
        weights = weights or self.schedule.at(row)
        self.mixer.set_weights(
            {name: 0.0 if self._is_read(name) else weight for name, weight in weights.items()}
            if self._ends
            else weights
        )

    def _is_read(self, name: str) -> bool:
        return (
            name in self._ends
            and self._document(self.mixer.cursors[name].read) >= (self._ends[name])
        )

    def _document(self, read: int) -> int:
        return self.number + read * self.config.streams

    def _read(self, name: str) -> None:
        cursor, place = self.mixer.cursors[name], self._places[name]
        pieces = self._pieces(place, cursor.read)
        for number, stream in enumerate(pieces):
            self.packer.add(Piece(Reference(place, cursor.read, number), stream))
            cursor.tokens += len(stream)
        self.packer.report.cut += len(pieces) > 1
        cursor.read += 1

    def _pieces(self, source: int, read: int) -> list[Stream]:
        return self.packer.split(self.sources[source].stream(self._document(read)))


class Plan(NamedTuple):
    """What some of the streams give from a row of the run on; enough for a process to start."""

    config: DataConfig
    vocabulary: Vocabulary
    seed: int
    total_rows: int | None
    numbers: Sequence[int]  # of the streams
    states: States  # of the streams that are not fresh
    first_row: int  # a multiple of the number of streams
    weights: Mapping[str, float] | None  # instead of the schedule's

    def schedule(self) -> Schedule:
        """The weights by rows."""
        weights = {name: source.weight for name, source in sorted(self.config.sources.items())}
        return Schedule(
            weights, self.config.schedule, length=self.config.length, total_rows=self.total_rows
        )


def batches(
    plan: Plan, sources: Mapping[str, Source] | None = None
) -> Iterator[tuple[Arrays, States]]:
    """The rows of these streams, batch after batch, and the streams' states after each.

    Ends before a batch that would have padding alone.
    """
    config, schedule = plan.config, plan.schedule()
    sources = sources or open_sources(config, plan.vocabulary, plan.seed)
    streams = [LogicalStream(number, config, sources, schedule) for number in plan.numbers]
    for stream in streams:
        if stream.number in plan.states:
            stream.load(plan.states[stream.number])
    pad, first = plan.vocabulary.structure_id("<pad>"), plan.first_row
    while True:
        rounds = range(first, first + config.rows, config.streams)
        rows = [
            stream.row(row + stream.number, plan.weights) for row in rounds for stream in streams
        ]
        if not any(rows):
            return
        arrays = pack_arrays(rows, config.length, pad)
        yield arrays, {stream.number: stream.state() for stream in streams}
        first += config.rows
