"""Where the time of a step goes."""

import time
from collections import defaultdict

import torch


class Laps:
    """Seconds by name since the last lap; on a GPU those of its own work, without waiting for it.

    What is gathered or sent while a layer computes counts as that layer's time.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def lap(self, name: str) -> None:
        """What happened since the last lap was `name`."""
        self._marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """The sum of the laps of each name; waits for the GPU."""
        if self._gpu:
            torch.cuda.synchronize()
        total: dict[str, float] = defaultdict(float)
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
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
