"""Logical streams: the fixed parts of a run's rows, whoever reads them.

A run has as many as its recipe says, for ever. Row i of the run is of stream i mod L, and stream s
reads every L-th document of each source, from the s-th on. A stream's rows depend on nothing but
itself, so that any number of ranks and processes gives the same rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal, NamedTuple

import numpy as np

from mmpt.config import UserError
from mmpt.data.mix import Mixer, Schedule, SourceConfig, Stage
from mmpt.data.order import BlockSource, ShardSource, Source
from mmpt.data.pack import PACKERS, Packer, PackReport
from mmpt.data.pipeline_source import Gone, PipelineSource, of_pipelines
from mmpt.data.tokens import open_shards
from mmpt.flat import Piece, Streams, pack_arrays
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
    # of conversations, see `to_stream`: whether what the user says is learned, too
    prompts: Literal["learned", "masked"] = "learned"
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


# where a piece comes from: the source's place among the names in order, how many documents of it
# the stream had read before, and which piece of the document it is
Reference = tuple[int, int, int]


AHEAD = 2048  # documents that are looked for ahead of their rows, over all streams and sources
LEAST_AHEAD = 256  # of one source of one stream
MEAN_IDS = 128  # of a document; of longer ones it is fewer


def open_sources(config: DataConfig, vocabulary: Vocabulary, seed: int) -> dict[str, Source]:
    """The sources by name, in the order of names."""
    sources: dict[str, Source] = {}
    how = {
        "seed": seed,
        "condition_drop": config.condition_drop,
        "masked_prompts": config.prompts == "masked",
    }
    for name, source in sorted(config.sources.items()):
        if source.pipeline:
            sources[name] = PipelineSource(name, source, vocabulary, streams=config.streams, **how)
        else:
            shards = open_shards(source.shards, vocabulary)
            sources[name] = ShardSource(name, shards, vocabulary, **how)
    return sources


class LogicalStream:
    """One stream: where it is in each source, and what waits in its packer.

    Documents are laid out ahead of their rows, many at once. In memory are of each source: where
    the segments of these documents lie; at most 64k of their ids (1 MB), or one longer document;
    and older parts of that size as long as a piece of them waits, which is at most `buffer` rows.
    That is about 3 MB for one stream of one source, and 1 MB for each of many.
    """

    def __init__(
        self, number: int, config: DataConfig, sources: Mapping[str, Source], schedule: Schedule
    ) -> None:
        self.number, self.config, self.schedule = number, config, schedule
        self.sources = list(sources.values())
        quotas = {Modality[name.upper()]: most for name, most in config.quotas.items()}
        self.packer: Packer = PACKERS[config.packing](
            config.length, buffer=config.buffer, quotas=quotas
        )
        self.mixer = Mixer(list(sources))
        self._live = of_pipelines(sources)
        self._ends = {  # how many documents each source has in all
            name: len(source) * epochs
            for name, source in sources.items()
            if (epochs := config.sources[name].max_epochs) is not None
        }
        self._most = max(AHEAD // (config.streams * len(sources)), LEAST_AHEAD)
        self._open()

    def row(self, row: int, weights: Mapping[str, float] | None) -> list[Piece]:
        """Row `row` of the run, by these weights or the schedule's; no pieces after the end."""
        self._weigh(row, weights)
        packer, mixer, ahead = self.packer, self.mixer, self._ahead
        while packer.hungry and (name := mixer.choose()) is not None:
            size = 0
            for piece in (pieces := next(ahead[name])):
                packer.add(piece)
                size += piece.end - piece.begin
            mixer.was_read(name, size)
            if len(pieces) > 1:
                packer.report.cut += 1
            if name in self._ends and self._is_read(name):
                self._weigh(row, weights)
        return packer.row()

    def state(self) -> dict[str, Any]:
        """Values that later rows leave as they are; the residue is a list of `Reference`.

        It is taken after every batch, and sent between processes, so it has to be cheap.
        """
        report = vars(self.packer.report)
        return {
            **self.mixer.state(),
            "residue": self.packer.residue,
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
        self._open()
        residue = np.asarray(state["residue"], dtype=np.int64).reshape(-1, 3)
        pieces = {}
        for place in np.unique(residue[:, 0]).tolist():
            reads = np.unique(residue[residue[:, 0] == place, 1]).tolist()
            for document in self._lay_out_again(place, reads):
                pieces |= {piece.reference: piece for piece in document}
        taken = state["taken"]  # of the oldest piece
        for entry in map(tuple, residue.tolist()):
            if entry in pieces:
                self.packer.add(pieces[entry])
            elif not len(self.packer):
                taken = 0
        self.packer.taken = taken
        self.packer.report = PackReport(**state["report"] | {"ids": dict(state["report"]["ids"])})

    def _weigh(self, row: int, weights: Mapping[str, float] | None) -> None:
        weights = weights or self.schedule.at(row)
        if self._ends:
            weights = {n: 0.0 if self._is_read(n) else weight for n, weight in weights.items()}
        self.mixer.set_weights(weights)

    def _is_read(self, name: str) -> bool:
        return (
            name in self._ends and self._document(self.mixer.cursors[name].read) >= self._ends[name]
        )

    def _document(self, read: int) -> int:
        return self.number + read * self.config.streams

    def _open(self) -> None:
        # each begins to read when it is first asked, and then from its cursor on
        places = enumerate(self.mixer.cursors)
        self._ahead = {name: self._documents(name, place) for place, name in places}

    def _documents(self, name: str, place: int) -> Iterator[tuple[Piece, ...]]:
        """The documents of a source from its cursor on, each as its pieces.

        It looks ahead for more and more of them, so that the first row does not wait.
        """
        many, cursor = isinstance(self.sources[place], BlockSource), self.mixer.cursors[name]
        number = 16 if many else 1
        while True:
            before = cursor.tokens
            yield from self._lay_out(place, range(cursor.read, cursor.read + number))
            mean = (cursor.tokens - before) // number
            fewer = self._most * MEAN_IDS // max(mean, 1) + 1
            number = min(2 * number, self._most, fewer) if many else 1

    def _lay_out_again(self, place: int, reads: Sequence[int]) -> Iterator[tuple[Piece, ...]]:
        """What was read before, without what a pipeline cannot give a second time."""
        if not isinstance(self.sources[place], PipelineSource):
            yield from self._lay_out(place, reads)
            return
        for read in reads:
            with suppress(Gone):
                yield from self._lay_out(place, [read])

    def _lay_out(self, place: int, reads: Sequence[int]) -> Iterator[tuple[Piece, ...]]:
        source, first = self.sources[place], 0
        numbers = self.number + np.array(reads) * self.config.streams
        if isinstance(source, BlockSource):
            parts = source.streams(numbers)
        else:
            parts = (Streams.of([source.stream(number)]) for number in numbers.tolist())
        for streams in parts:
            chosen = reads[first : first + len(streams)]
            first += len(streams)
            documents = streams.pieces(zip(repeat(place), chosen, repeat(0)))
            begin = 0
            for long in np.flatnonzero(np.diff(streams.starts) > self.config.length).tolist():
                yield from zip(documents[begin:long])
                yield tuple(
                    piece._replace(reference=(place, chosen[long], number))
                    for number, piece in enumerate(self.packer.split(documents[long]))
                )
                begin = long + 1
            yield from zip(documents[begin:])


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
