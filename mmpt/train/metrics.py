"""metrics.jsonl: what a training step says, and how its lines are read and cut off again."""

import json
import logging
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from mmpt.config import write_atomic
from mmpt.vocab import Modality

log = logging.getLogger(__name__)

Metrics = dict[str, Any]


def by_modality(
    nats: Sequence[float], counts: Sequence[float]
) -> dict[str, dict[str, float | int | None]]:
    """Mean loss and number of predicted ids of each medium that has any, from their sums."""
    return {
        modality.name.lower(): {
            "loss": finite_or_none(nats[modality] / counts[modality]),
            "tokens": int(counts[modality]),
        }
        for modality in Modality
        if counts[modality]
    }


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def summary(metrics: Metrics) -> str:
    """A line for the progress bar."""
    losses = [
        f"{name} {values['loss']:.2f}"
        for name, values in metrics["modality"].items()
        if values["loss"] is not None
    ]
    speed = metrics["step_tokens"] / max(metrics["step_seconds"], 1e-9)
    return " ".join([*losses, f"{speed:,.0f} tok/s"])


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again; the last may be half a line."""
    if path.is_file():
        rows = map(_parse, path.read_text().splitlines(keepends=True))
        kept = (line for done, line in rows if 0 < done <= step)
        write_atomic(path, "".join(kept))


def _parse(line: str) -> tuple[int, str]:
    """The step of a line, 0 where it is no whole one."""
    try:
        return int(json.loads(line)["step"]), line
    except (KeyError, TypeError, ValueError):
        return 0, line


class Log:
    """Appends metrics to a file and never fails: what cannot be written is kept and tried again.

    path: None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._waiting = path, ""
        self.failed = 0  # times that writing failed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()

    def write(self, metrics: Metrics) -> None:
        """One line."""
        self._waiting += json.dumps(metrics) + "\n"
        self._flush()

    def _flush(self) -> None:
        if self._path is None:
            self._waiting = ""
            return
        whole = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab") as file:
                file.write(self._waiting.encode())
        except OSError as error:
            if not self.failed:
                log.error("cannot write %s (%s); training goes on", self._path, error.strerror)
            self.failed += 1
            with suppress(OSError):
                os.truncate(self._path, whole)  # of half a line
        else:
            self._waiting = ""


def last_line(path: Path) -> Metrics:
    """The metrics of the last step that was done, if any."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else {}
