"""Where metrics go: metrics.jsonl always, and TensorBoard, W&B or trackio where a recipe says so.

None of them can stop or slow a training. What the file cannot take is kept and tried again. Each of
the others works in a thread of its own behind a queue of limited length: one that hangs, raises or
dies loses its own rows, which are counted.
"""

import json
import logging
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from mmpt.config import UserError, write_atomic
from mmpt.train.metrics import Metrics

log = logging.getLogger(__name__)

Name = Literal["tensorboard", "wandb", "trackio"]
EXTRAS: dict[Name, str] = {"tensorboard": "track", "wandb": "track", "trackio": "trackio"}
ROOM = 256  # rows that wait for a slow sink
PATIENCE = 5.0  # seconds that the end of a run waits for all sinks together


class Sink(Protocol):
    """What shows scalars elsewhere; made, used and closed in one thread."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row."""
        ...

    def close(self) -> None:
        """Everything was written."""
        ...


def check_installed(names: Iterable[Name]) -> None:
    """UserError for what a recipe tracks with and this environment lacks."""
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            raise UserError(
                f"track names {name}, which is not installed; pip install 'mmpt[{EXTRAS[name]}]', "
                "or leave it out"
            ) from None


class Track:
    """All places of a run's metrics; used as a context manager.

    first: the first step that will be written. config: the recipe, for those that show it. write:
    whether this rank does so at all.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[Name] = (),
        *,
        first: int = 1,
        config: Mapping[str, Any] | None = None,
        write: bool = True,
    ) -> None:
        self._log = Log(folder / "metrics.jsonl" if write else None)
        self._behind = [
            Behind(name, lambda name=name: SINKS[name](folder, first, config or {}))
            for name in (names if write else ())
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._log.close()
        deadline = time.monotonic() + PATIENCE
        for each in self._behind:
            each.close(deadline)

    @property
    def dropped(self) -> int:
        """Rows that sinks did not take so far."""
        return sum(each.dropped for each in self._behind)

    def write(self, metrics: Metrics) -> None:
        """One row, everywhere."""
        self._log.write(metrics)
        if self._behind:
            scalars = flatten(metrics)
            step = int(scalars.pop("step"))
            for each in self._behind:
                each.write(step, scalars)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row as `modality/image/loss`; lists by place, without lists of lists."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, list):
            value = {str(n): each for n, each in enumerate(value) if not isinstance(each, list)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = float(value)
    return flat


class Log:
    """Appends metrics to a file and never fails: what cannot be written is kept and tried again.

    path: None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._waiting = path, ""
        self.failed = 0  # times that writing failed

    def write(self, metrics: Metrics) -> None:
        """One line."""
        self._waiting += json.dumps(metrics) + "\n"
        self.close()

    def close(self) -> None:
        """Write what waits."""
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


class Behind:
    """A sink in a thread of its own.

    make: makes the sink, in that thread.
    """

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name, self._make = name, make
        self._rows: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(ROOM)
        self._no_room, self._refused = 0, 0  # counted by one thread each
        self._warned = False
        self._thread = threading.Thread(target=self._work, name=f"track-{name}", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Rows that the sink did not take."""
        return self._no_room + self._refused

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Never waits."""
        try:
            self._rows.put_nowait((step, scalars))
        except queue.Full:
            self._no_room += 1
            self._warn("does not keep up")

    def close(self, deadline: float) -> None:
        """Wait for what is queued, until `deadline` of the monotonic clock at the latest."""
        with suppress(queue.Full):
            self._rows.put(None, timeout=max(deadline - time.monotonic(), 0.0))
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._no_room += self._rows.qsize() + 1  # with the one it hangs on
        if self.dropped:
            log.warning("%s lacks %d rows; metrics.jsonl has them", self._name, self.dropped)

    def _work(self) -> None:
        sink: Sink | None = None
        try:
            sink = self._make()
        except Exception as error:
            self._warn(f"does not start ({error})")
        while (row := self._rows.get()) is not None:
            try:
                if sink is None:
                    self._refused += 1
                else:
                    sink.write(*row)
            except Exception as error:
                self._refused += 1
                self._warn(f"failed ({error})")
        if sink is not None:
            with suppress(Exception):
                sink.close()

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s %s; training goes on without it", self._name, " ".join(what.split()))


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, first: int, config: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # untyped, for their classes are made when they are loaded
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._writer = EventFileWriter(str(folder / "tensorboard"))
        # so that steps which are done again do not show twice
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(first, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """All scalars as one event: one each would take as long as a small step."""
        summary = self._summaries.Summary()
        for name, value in scalars.items():
            summary.value.add(tag=name, simple_value=value)
        self._add(step, summary=summary)

    def close(self) -> None:
        """Flush."""
        self._writer.close()

    def _add(self, step: int, **what: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, **what))


class Wandb:
    """Weights & Biases; WANDB_PROJECT and WANDB_MODE say where. A resumed run is the same run."""

    def __init__(self, folder: Path, first: int, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mmpt"),
            name=folder.resolve().name,
            id=_run_id(folder),
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row of the history."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()


class Trackio:
    """trackio, local unless TRACKIO_SPACE_ID names a Space; TRACKIO_DIR says where."""

    def __init__(self, folder: Path, first: int, config: Mapping[str, Any]) -> None:
        import trackio  # type: ignore[import-not-found] # where it is installed

        with redirect_stdout(sys.stderr):  # results go to stdout
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "mmpt"),
                name=f"{folder.resolve().name}-{_run_id(folder)}",
                config=dict(config),
                resume="allow",
                embed=False,
            )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Write the rest."""
        with redirect_stdout(sys.stderr):
            self._run.finish()


SINKS: dict[Name, Callable[[Path, int, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def _run_id(folder: Path) -> str:
    """The same for all parts of a run that was interrupted."""
    path = folder / "run-id"
    if not path.is_file():
        write_atomic(path, uuid.uuid4().hex[:8])
    return path.read_text()
