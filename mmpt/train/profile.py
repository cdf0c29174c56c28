"""PyTorch's profiler on demand: a few steps, in RUN/profile.

It begins with the next step after SIGUSR2 (this rank alone), when a file RUN/profile-now appears
(all ranks; the first one removes it), or at the step that the recipe's `profile` says. Nothing that
goes wrong here stops a training.
"""

import logging
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch

log = logging.getLogger(__name__)

STEPS = 3  # that are recorded on demand
ROWS = 40  # of the table of operators


class Profiler:
    """Used as a context manager around a run; `before` and `after` go around each step.

    planned: the first step to record and how many, or nothing.
    """

    def __init__(self, folder: Path, planned: Sequence[int] = (), *, rank: int = 0) -> None:
        self._folder, self._planned, self._rank = folder, tuple(planned), rank
        self._wish = folder / "profile-now"
        self._asked, self._granted = False, False  # by a signal; by this file, once
        self._handler: Any = None
        self._profile: Any = None
        self._first, self._last, self._left = 0, 0, 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGUSR2, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGUSR2, self._handler)
        if self._profile is not None:
            self._finish()

    def before(self, step: int) -> None:
        """Begin to record, where that is wanted."""
        if self._profile is None and (count := self._wanted(step)):
            try:
                self._profile = torch.profiler.profile(activities=_kinds(), acc_events=True)
                self._profile.start()
                self._first, self._last, self._left = step, step, count
            except Exception as error:
                self._fail(error)

    def after(self, step: int) -> None:
        """Write what was recorded, after the last of its steps."""
        if self._profile is not None:
            self._last, self._left = step, self._left - 1
            if not self._left:
                self._finish()

    def _wanted(self, step: int) -> int:
        """How many steps to record from here on."""
        if self._planned and self._planned[0] == step:
            return self._planned[1]
        there = self._wish.exists()
        new, self._granted = there and not self._granted, there
        asked, self._asked = self._asked or new, False
        return STEPS if asked else 0

    def _finish(self) -> None:
        profile, self._profile = self._profile, None
        folder = self._folder / "profile"
        path = folder / f"step-{self._first}-rank-{self._rank}.json"
        temporary = path.with_suffix(".tmp")
        try:
            profile.stop()
            table = profile.key_averages().table(sort_by=_longest(), row_limit=ROWS)
            folder.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".txt").write_text(f"steps {self._first} to {self._last}\n{table}\n")
            profile.export_chrome_trace(str(temporary))
            if not _whole(temporary):
                raise OSError(f"{path} could not be written whole")
            temporary.rename(path)
            log.warning("profile of steps %d to %d: %s", self._first, self._last, path)
        except Exception as error:
            self._fail(error)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            if self._rank == 0:
                self._wish.unlink(missing_ok=True)

    def _fail(self, error: Exception) -> None:
        self._profile = None
        log.warning("no profile: %s; training goes on", " ".join(str(error).split())[:200])

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


def _whole(trace: Path) -> bool:
    """Whether it ends as JSON does: the library that writes it does not say when a disk is full."""
    with trace.open("rb") as file:
        file.seek(-min(trace.stat().st_size, 64), 2)
        return file.read().rstrip().endswith(b"}")


def _kinds() -> list[torch.profiler.ProfilerActivity]:
    cpu, gpu = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
    return [cpu, gpu] if torch.cuda.is_available() else [cpu]


def _longest() -> str:
    return "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
