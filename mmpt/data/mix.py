"""Mixing: which source the next document comes from, so that weights in tokens are kept.

Weights are a pure function of the row's number in the run (`Schedule`); a `Mixer` reads from the
source that lags most behind what it should have given so far. Every logical stream has its own
mixer, so that each realises the mix by itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmpt.config import UserError


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Token shards that are mixed as one source, or a live pipeline."""

    shards: tuple[str, ...] = ()  # paths, folders or globs
    weight: float = 1.0  # its part of the tokens, relative to the other sources
    max_epochs: float | None = None  # how often it may be read; then the others share its part
    pipeline: str = ""  # instead of shards: module:function, see `pipeline_source`
    processor: str = ""  # folder of the processor.json that encodes the pipeline's samples
    quarantine: str = ""  # file that lists the pipeline's bad samples

    def __post_init__(self) -> None:
        if bool(self.shards) == bool(self.pipeline):
            raise UserError(
                f"a source has shards = {list(self.shards)} and pipeline = {self.pipeline!r}; give "
                "one of the two"
            )
        if self.pipeline and self.max_epochs is not None:
            raise UserError("max_epochs of a pipeline: its length is not known; leave it out")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise UserError(f"max_epochs = {self.max_epochs}; use more than 0, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """From `start` on the named sources have other weights; the others keep theirs.

    `unit` says what start and ramp count: parts of the run (0 to 1), rows, or tokens, which are the
    places of the rows, padding included. Upsampling at the end is a stage that starts at 0.8.
    """

    start: float
    weights: dict[str, float]
    ramp: float = 0.0  # how long the weights take to get there, linearly
    unit: Literal["run", "rows", "tokens"] = "run"

    def __post_init__(self) -> None:
        if min(self.start, self.ramp, *self.weights.values()) < 0:
            raise UserError("data.schedule: start, ramp and weights must be at least 0")
        if self.unit == "run" and self.start >= 1:
            raise UserError(
                f"data.schedule: start = {self.start} of a run is never reached; use 0 to 1, or "
                'unit = "rows" or "tokens"'
            )


class Schedule:
    """The weights of all sources at any row of the run.

    length: ids a row. total_rows: of the whole run, which stages in parts of it need.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        stages: Sequence[Stage] = (),
        *,
        length: int,
        total_rows: int | None = None,
    ) -> None:
        self._weights = dict(weights)
        self._stages: list[tuple[float, float, dict[str, float]]] = []
        for stage in stages:
            if stage.unit == "run" and total_rows is None:
                raise UserError(
                    "data.schedule has stages in parts of the run, whose length is not known here; "
                    'give total_rows, or unit = "rows" or "tokens"'
                )
            check_names(stage.weights, self._weights, "data.schedule")
            rows = {"run": total_rows or 0, "rows": 1, "tokens": 1 / length}[stage.unit]
            self._stages.append((stage.start * rows, stage.ramp * rows, stage.weights))
        self._stages.sort(key=lambda stage: stage[0])
        for start, ramp, _ in self._stages:
            if not any(self.at(row := math.ceil(start + ramp)).values()):
                raise UserError(
                    f"data.schedule leaves no source with a weight above 0 at row {row}; name one "
                    "that goes on"
                )

    def at(self, row: int) -> dict[str, float]:
        """The weights for row `row`, counted over all streams from the beginning of the run."""
        weights = dict(self._weights)
        for start, ramp, targets in self._stages:
            if row < start:
                break
            part = min((row - start) / ramp, 1.0) if ramp else 1.0
            for name, target in targets.items():
                weights[name] = (1 - part) * weights[name] + part * target
        return weights


def check_names(weights: Mapping[str, float], known: Mapping[str, Any], where: str) -> None:
    """Refuse weights of sources that are not there."""
    if unknown := sorted(weights.keys() - known.keys()):
        raise UserError(
            f"{where} names {', '.join(unknown)}; the sources are {', '.join(sorted(known))}"
        )


@dataclass
class Cursor:
    """How far one source was read, by one stream."""

    read: int = 0  # documents
    tokens: int = 0  # ids that they had
    owed: float = 0.0  # ids that they should have had when weights last changed
    weight: float = 0.0  # since then


class Mixer:
    """Chooses sources so that their ids follow the weights, also when those change."""

    def __init__(self, names: Sequence[str]) -> None:
        self.cursors = {name: Cursor() for name in names}
        self.since = 0  # ids of all sources when the weights last changed
        self._count()

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """The weights from here on; what a source lags behind so far is not forgotten."""
        if weights == self._weights:
            return
        for name, cursor in self.cursors.items():
            if self._whole:
                cursor.owed += cursor.weight / self._whole * (self._total - self.since)
            cursor.weight = weights[name]
        self.since = self._total
        self._count()

    def choose(self) -> str | None:
        """The source that lags most behind; None when all weights are 0."""
        if len(self._open) < 2:
            return self._open[0][0] if self._open else None
        since, chosen, most = self._total - self.since + 1, None, 0.0
        for name, cursor, share in self._open:
            lag = cursor.owed + share * since - cursor.tokens
            if chosen is None or (lag, name) > (most, chosen):
                chosen, most = name, lag
        return chosen

    def was_read(self, name: str, tokens: int) -> None:
        """A document of so many ids was read from a source."""
        cursor = self.cursors[name]
        cursor.read += 1
        cursor.tokens += tokens
        self._total += tokens

    def _count(self) -> None:
        """What follows from the cursors, and changes only with the weights."""
        self._weights = {name: cursor.weight for name, cursor in self.cursors.items()}
        self._total = sum(cursor.tokens for cursor in self.cursors.values())
        self._whole = 0.0
        for weight in self._weights.values():  # newer Pythons sum otherwise
            self._whole += weight
        self._open = [
            (name, cursor, cursor.weight / self._whole)
            for name, cursor in self.cursors.items()
            if cursor.weight
        ]

    def state(self) -> dict[str, Any]:
        """Four numbers per source, and one."""
        cursors = {
            name: [cursor.read, cursor.tokens, cursor.owed, cursor.weight]
            for name, cursor in self.cursors.items()
        }
        return {"cursors": cursors, "since": self.since}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.cursors = {name: Cursor(*state["cursors"][name]) for name in self.cursors}
        self.since = state["since"]
        self._count()
