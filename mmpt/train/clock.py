"""Where the time of a step goes."""

import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

import torch


class Laps:
    """Seconds by name, each until the next begins; on a GPU those of its own work, without waiting.

    What is gathered or sent while a layer computes counts as that layer's time. on_begin: hears
    every name when it begins.
    """

    def __init__(self, device: torch.device, on_begin: Callable[[str], None] | None = None) -> None:
        self._gpu, self._on_begin = device.type == "cuda", on_begin
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self, name: str) -> None:
        """What happens from here on is `name`."""
        self._marks.append((name, self._now()))
        if self._on_begin is not None:
            self._on_begin(name)

    def seconds(self) -> dict[str, float]:
        """The sum of the laps of each name until now; waits for the GPU."""
        marks = [*self._marks, ("", self._now())]
        if self._gpu:
            torch.cuda.synchronize()
        total: dict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in pairwise(marks):
            total[name] += _between(begin, end)
        return {name: round(value, 4) for name, value in total.items()}

    def _now(self) -> float | torch.cuda.Event:
        if not self._gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1000
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
