"""Which rank stands still: every rank tells what it does, and the first one names who is behind.

A thread of each rank writes RUN/alive/rank-N.json every few seconds, whatever training does. When
one stands still, soon all do, for they wait for each other: named is whoever came least far and, of
those that came equally far, whoever does not wait for others. Time is the watcher's own monotonic
clock; what the clocks of others say does not matter.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

log = logging.getLogger(__name__)

SIZE = 1024  # bytes of a file: it is overwritten in place, which a full disk does not prevent
OFTEN = 5.0  # seconds between two looks, at most


class Pulse:
    """What this rank does; training sets it, `Watch` reads it."""

    def __init__(self) -> None:
        self.step, self.phase, self.beats = 0, "start", 0

    def begin(self, phase: str) -> None:
        """A part of a step begins."""
        self.phase = phase
        self.beats += 1


class Watch:
    """Used as a context manager around a run.

    folder: shared by all ranks. seconds: without a new phase, after which a rank is named, once.
    """

    def __init__(
        self,
        folder: Path,
        pulse: Pulse,
        *,
        rank: int,
        count: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._pulse, self._rank, self._count = folder, pulse, rank, count
        self._seconds, self._clock = seconds, clock
        self._trained = threading.get_ident()
        self._step, self._begun = -1, 0.0  # of those behind, and since when
        self._stand: Any = None  # who is behind, how far
        self._since, self._named = 0.0, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(OFTEN)
        with suppress(OSError):
            self._path(self._rank).unlink(missing_ok=True)
            self._folder.rmdir()  # by the last one

    def tell(self) -> None:
        """Write what this rank does."""
        pulse = self._pulse
        told = {
            "rank": self._rank,
            "step": pulse.step,
            "phase": pulse.phase,
            "beats": pulse.beats,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **_place(self._trained),
        }
        data = json.dumps(told).encode().ljust(SIZE)
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path(self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, data, 0)
            finally:
                os.close(descriptor)

    def look(self) -> None:
        """Name who holds the others up, once for each stall."""
        told = {rank: what for rank in range(self._count) if (what := self._read(rank))}
        if not told:
            return
        now, least = self._clock(), min(_progress(what) for what in told.values())
        behind = [rank for rank, what in told.items() if _progress(what) == least]
        if least[0] != self._step:
            self._step, self._begun = least[0], now
        if (least, behind) != self._stand:
            self._stand, self._since, self._named = (least, behind), now, False
        if self._named or now - self._since < self._seconds:
            return
        self._named = True
        for rank in [r for r in behind if not told[r]["waits"]] or behind:
            log.warning("%s", _sentence(told[rank], now - self._begun))

    def _work(self) -> None:
        while not self._ended.wait(min(OFTEN, self._seconds / 10)):
            self.tell()
            if self._rank == 0:
                self.look()

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _read(self, rank: int) -> dict[str, Any] | None:
        """None where it has not begun, has ended, or writes just now."""
        try:
            return json.loads(self._path(rank).read_bytes())
        except (OSError, ValueError):
            return None


def _progress(told: dict[str, Any]) -> tuple[int, int]:
    return told["step"], told["beats"]


def _sentence(told: dict[str, Any], seconds: float) -> str:
    return (
        f"rank {told['rank']} has not finished step {told['step']} for {seconds:.0f} s (in "
        f"{told['phase']}, at {told['at']}, host {told['host']}, pid {told['pid']})"
    )


def _place(thread: int) -> dict[str, Any]:
    """Where in our code a thread is, and whether it waits for other ranks."""
    frame, at, waits = sys._current_frames().get(thread), "", False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        waits |= "torch" in path.parts and "distributed" in path.parts
        if not at and "torch" not in path.parts:
            at = f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return {"at": at[:200], "waits": waits}
