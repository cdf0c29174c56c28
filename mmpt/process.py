"""This process: where it computes, and the wish to stop it."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch

from mmpt.config import UserError

log = logging.getLogger(__name__)


class StopRequest:
    """Turns the first SIGINT, SIGTERM and SIGUSR1 into a flag; a second one acts as usual.

    status: 130 after SIGINT, as of other programs; a scheduler's signals end in 0. requeue: it was
    SIGUSR1, by which a scheduler says that the time is up.
    """

    def __init__(self) -> None:
        self.asked, self.requeue, self.status = False, False, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.requeue = True, self.requeue or number == signal.SIGUSR1
        self.status = 130 if number == signal.SIGINT else self.status
        # torchrun sends SIGTERM after the terminal's SIGINT: only the same one again is a second
        signal.signal(number, self._before[number])


def requeue() -> None:
    """Ask SLURM to run this job again; nothing where there is no SLURM."""
    if job := os.environ.get("SLURM_JOB_ID"):
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False
        )
        log.warning("requeue of job %s: %s", job, done.stderr.strip() or "asked for")


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread: results do not depend on how many there are.

    Small work is faster so, for threads wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str) -> torch.device:
    """ "auto" is a GPU if there is one, and under torchrun the one of the local rank.

    Raises UserError for what this machine has not.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device = {name!r} cannot be used here: {reason}") from None
