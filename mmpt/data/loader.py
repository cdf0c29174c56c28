"""The loader: token shards -> a sequence of packed rows that any run can resume.

The order of documents is a pure function of (seed, epoch, source) over logical streams (`logical`),
so the state is a few integers per stream and source plus references to the pieces that wait in the
packers; on load they are read again. Another number of ranks or workers gives the same rows.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmpt.config import UserError
from mmpt.data.accounts import accounts
from mmpt.data.ahead import Ahead, Died
from mmpt.data.logical import Arrays, DataConfig, Plan, States, batches, open_sources
from mmpt.data.mix import SourceConfig, Stage, check_names
from mmpt.data.pack import PackReport
from mmpt.data.pipeline_source import of_pipelines, warn_of_pipelines
from mmpt.flat import pack_arrays
from mmpt.stream import Rows
from mmpt.vocab import Vocabulary

__all__ = ["DataConfig", "Loader", "SourceConfig", "Stage", "merge_states"]

FORMAT_VERSION = 2  # 1 knew one stream, and no schedule, quotas and kinds of packing
MAX_DEATHS = 3  # of workers, before any of them gave a batch

log = logging.getLogger(__name__)


class Loader(Iterator[Rows]):
    """Batches of packed rows; `state_dict` after any batch resumes there.

    Rank r of W gives the rows r, r + W, ... of each batch. It ends (StopIteration) when all sources
    have reached their `max_epochs`. total_rows: of the whole run, for schedules in parts of it.
    """

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary,
        *,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        total_rows: int | None = None,
    ) -> None:
        if config.streams % num_ranks:
            raise UserError(
                f"data.streams = {config.streams} is no multiple of the {num_ranks} ranks; start "
                f"with as many ranks as divide it, or a new run with data.streams = {num_ranks}"
            )
        self.config, self.vocabulary, self.seed = config, vocabulary, seed
        self.sources = open_sources(config, vocabulary, seed)
        self._numbers = range(rank, config.streams, num_ranks)
        self._total_rows = total_rows
        self._rows = 0  # of the run that were handed out, over all ranks
        self._weights: dict[str, float] | None = None  # instead of the schedule's
        self._states: States = {}
        self._readers: list[Iterator[tuple[Arrays, States]]] = []
        self._schedule = self._plan(self._numbers).schedule()
        self._pad = vocabulary.structure_id("<pad>")

    def __next__(self) -> Rows:
        if not (parts := self._read()):
            raise StopIteration
        self._rows += self.config.rows
        return Rows.from_arrays(self._deal(parts))

    def padding(self) -> Rows:
        """A batch of this rank that has no documents."""
        rows = len(self._numbers) * self.config.rows // self.config.streams
        return Rows.pack([[]] * rows, self.config.length, self._pad)

    def close(self) -> None:
        """End the workers; the next batch starts others."""
        for reader in self._readers:
            if isinstance(reader, Ahead):
                reader.close()
        self._readers = []

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Mix by these weights from the next row on, instead of the schedule.

        Sources not named keep their weight. All ranks must say so after the same batch.
        """
        check_names(weights, self.sources, "set_weights")
        changed = self.weights() | dict(weights)
        if min(changed.values()) < 0 or not sum(changed.values()):
            raise UserError("set_weights needs weights of at least 0, one of them above 0")
        self.close()  # what was read ahead followed the old weights
        self._weights = changed
        log.info("weights of the sources from row %d on: %s", self._rows, changed)

    def weights(self) -> dict[str, float]:
        """The weights for the next row."""
        return self._weights or self._schedule.at(self._rows)

    @property
    def report(self) -> PackReport:
        """Fill, cuts and modality shares so far, over this rank's streams."""
        return PackReport.sum(PackReport(**state["report"]) for state in self._states.values())

    def summary(self) -> dict[str, Any]:
        """What was read so far, as plain values."""
        return {
            "fill": self.report.fill,
            "cut": self.report.cut,
            "over_quota": self.report.over_quota,
            "modality_shares": self.report.shares(),
            "source_shares": self.mix(),
            "epochs": self.epochs(),
            "samples": accounts(self.sources, self._states.values()),
        }

    def mix(self) -> dict[str, float]:
        """Source -> its share of the ids read so far."""
        tokens = {name: self._sum(name, 1) for name in self.sources}
        total = max(sum(tokens.values()), 1)
        return {name: count / total for name, count in tokens.items()}

    def epochs(self) -> dict[str, float]:
        """Source -> how often its documents were read, as far as this rank's streams say."""
        share = len(self._numbers) / self.config.streams
        return {
            name: self._sum(name, 0) / share / len(source)
            for name, source in self.sources.items()
            if len(source)  # 0: a pipeline
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and small: of this rank's streams, after the last batch that was handed out."""
        return {
            "format_version": FORMAT_VERSION,
            "settings": self._settings(),
            "rows": self._rows,
            "weights": self._weights,
            "inexact": list(of_pipelines(self.sources)),  # sources that start anew
            "streams": {
                str(number): state | {"residue": np.asarray(state["residue"]).tolist()}
                for number, state in self._states.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, of any number of ranks: `merge_states` makes one of theirs.

        Refuses a state of other data or settings, and one that lacks streams of this rank.
        """
        if state["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"the loader's state has format {state['format_version']}; this mmpt reads "
                f"{FORMAT_VERSION}: upgrade"
            )
        if state["format_version"] == 1:
            state = self._upgrade(state)
        settings = {"prompts": "learned", **state["settings"]}  # which older ones do not name
        for key, ours in self._settings().items():
            if (theirs := settings.get(key)) != ours:
                raise UserError(
                    f"the loader's state has {key} = {theirs}, this recipe {ours}; start a new run "
                    "or restore the old value"
                )
        states = {int(number): each for number, each in state["streams"].items()}
        if state["rows"] and (missing := sorted(set(self._numbers) - states.keys())):
            raise UserError(
                f"the loader's state lacks stream {missing[0]}; merge the states of all ranks"
            )
        self.close()
        self._rows, self._weights = state["rows"], state["weights"]
        self._states = {number: states[number] for number in self._numbers if number in states}

    def _read(self) -> dict[int, Arrays]:
        """The next batch: reader -> its rows, without those whose streams have ended."""
        self._readers = self._readers or self._start()
        parts, states = {}, {}
        try:
            for place in range(len(self._readers)):
                if (item := self._next(place)) is not None:
                    parts[place] = item[0]
                    states |= item[1]
        except BaseException:
            self.close()  # some readers are a batch ahead of others
            raise
        self._states |= states
        return parts

    def _next(self, place: int) -> tuple[Arrays, States] | None:
        """What a reader has next; a dead one is replaced, and goes on after what was handed out."""
        reason = None
        for _ in range(MAX_DEATHS):
            try:
                return next(self._readers[place], None)
            except Died as death:
                reason = death
                log.warning("a data worker died (%s); another one goes on", reason)
                share = self._shares()[place]
                warn_of_pipelines(self.sources, self._states, share)
                self._readers[place] = self._ahead(share)
        raise UserError(
            f"{MAX_DEATHS} data workers died one after another ({reason}); see how much memory is "
            "free, or set data.workers = 0"
        )

    def _start(self) -> list[Iterator[tuple[Arrays, States]]]:
        warn_of_pipelines(self.sources, self._states, self._numbers)
        if not self.config.workers:
            return [batches(self._plan(self._numbers), self.sources)]
        return [self._ahead(numbers) for numbers in self._shares()]

    def _shares(self) -> list[Sequence[int]]:
        """The streams of each reader."""
        num = min(max(self.config.workers, 1), len(self._numbers))
        return [self._numbers[place::num] for place in range(num)]

    def _ahead(self, numbers: Sequence[int]) -> Ahead[tuple[Arrays, States]]:
        return Ahead(batches, self._plan(numbers))

    def _deal(self, parts: Mapping[int, Arrays]) -> Arrays:
        """The rows of several readers, in the order of the run."""
        num = len(self._shares())
        if num == 1:
            return parts[0]
        rows = len(self._numbers) * self.config.rows // self.config.streams
        out = pack_arrays([[]] * rows, self.config.length, self._pad)
        places = np.arange(rows).reshape(-1, len(self._numbers))
        spans = []
        for part, arrays in parts.items():
            place = places[:, part::num].reshape(-1)
            for name in out.keys() - {"spans"}:
                out[name][place] = arrays[name]
            table = arrays["spans"].copy()
            table[:, 0] = place[table[:, 0]]
            spans.append(table)
        table = np.concatenate(spans)
        out["spans"] = table[np.argsort(table[:, 0], kind="stable")]
        return out

    def _plan(self, numbers: Sequence[int]) -> Plan:
        states = {number: self._states[number] for number in numbers if number in self._states}
        return Plan(
            self.config,
            self.vocabulary,
            self.seed,
            self._total_rows,
            numbers,
            states,
            self._rows,
            self._weights,
        )

    def _sum(self, name: str, column: int) -> int:
        return sum(state["cursors"][name][column] for state in self._states.values())

    def _settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "streams": self.config.streams,
            "length": self.config.length,
            "packing": self.config.packing,
            "buffer": self.config.buffer,
            "quotas": self.config.quotas,
            "condition_drop": self.config.condition_drop,
            "prompts": self.config.prompts,
            "sources": {name: source.fingerprint for name, source in self.sources.items()},
        }

    def _upgrade(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state of format 1, as this one: it was of one stream, and named epochs and sources."""

        def read(name: str, epoch: int, place: int) -> int:
            return epoch * len(self.sources[name]) + place

        settings = {"streams": 1, "packing": "best-fit", "quotas": {}} | state["settings"]
        if settings["sources"].keys() != self.sources.keys():
            return {"settings": settings}  # which are refused
        cursors = {
            name: [read(name, each["epoch"], each["place"]), each["tokens"], 0.0, weight]
            for name, weight in self.weights().items()
            for each in [state["cursors"][name]]
        }
        places = {name: place for place, name in enumerate(self.sources)}
        residue = [
            [places[name], read(name, epoch, place), piece]
            for name, epoch, place, piece in state["residue"]
        ]
        stream = {"cursors": cursors, "since": 0, "residue": residue, "taken": 0}
        return {
            "settings": settings,
            "rows": state["report"]["rows"],
            "weights": None,
            "streams": {"0": stream | {"report": state["report"]}},
        }


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of all streams from those that the ranks have after the same batch."""
    whole = dict(states[0])
    whole["streams"] = {}
    for state in states:
        for key in ("format_version", "settings", "rows", "weights"):
            if state[key] != states[0][key]:
                raise UserError(
                    f"the ranks' states differ in {key}: {state[key]} and {states[0][key]}; merge "
                    "states of one run after the same batch"
                )
        whole["streams"] |= state["streams"]
    return whole
