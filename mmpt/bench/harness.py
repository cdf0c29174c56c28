"""How two things are compared fairly on a machine that is busy with others."""

import dataclasses
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmpt.config import UserError

log = logging.getLogger(__name__)

REPETITIONS = 9  # at least
BUDGET = 0.6  # seconds for more of them, where they are short
PARTS = 3  # that the repetitions are dealt into, for the bounds
# seconds of one repetition; what is faster is run several times in it. Short, so that some of them
# are not interrupted on a busy machine
SHORTEST = 5e-4
PACKAGES = (
    "mmpt",
    "torch",
    "vector-quantize-pytorch",
    "webdataset",
    "megatron-energon",
    "transformers",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a benchmark. ours, peer: in `unit`; ratio above 1: ours is better.

    low, high: bounds of the ratio, see `compare`.
    """

    case: str
    device: str
    dtype: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, to five digits."""
        values = dataclasses.asdict(self).items()
        return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values}


def run_rows(rows: Iterable[Row]) -> list[Row]:
    """All rows, each told of on stderr as soon as it is measured."""
    gathered = []
    for row in rows:
        numbers = row.ours, row.peer, row.unit, row.ratio, row.peer_name
        log.info("%-60s %10.4g %10.4g %-12s %6.3fx  %s", row.case, *numbers)
        gathered.append(row)
    return gathered


@dataclass(frozen=True)
class Comparison:
    """Best seconds of a call of either, and the ratio peer / ours with its bounds."""

    ours: float
    peer: float
    ratio: float
    low: float
    high: float


def compare(ours: Callable[[], Any], peer: Callable[[], Any], *, device: str = "cpu") -> Comparison:
    """Time two functions in turn, so that what else the machine does meets both alike.

    At least 9 repetitions of each; who goes first changes every time. ratio: the peer's best time
    over ours. low and high: repetitions are dealt into three parts, and these are the smallest and
    the largest ratio of best times of a part; the ratio of all always lies between them.
    """
    number = {f: max(1, math.ceil(SHORTEST / _seconds(f, 1, device))) for f in (ours, peer)}
    times: dict[Callable[[], Any], list[float]] = {ours: [], peer: []}
    began = time.perf_counter()
    while len(times[ours]) < REPETITIONS or time.perf_counter() - began < BUDGET:
        even = len(times[ours]) % 2 == 0
        for function in (ours, peer) if even else (peer, ours):
            times[function].append(_seconds(function, number[function], device))
    parts = [min(times[peer][i::PARTS]) / min(times[ours][i::PARTS]) for i in range(PARTS)]
    best, best_peer = min(times[ours]), min(times[peer])
    return Comparison(best, best_peer, best_peer / best, min(parts), max(parts))


def best_seconds(function: Callable[[], Any], *, device: str = "cpu") -> tuple[float, list[float]]:
    """The best time of at least 9 repetitions, and the best of each of their three parts."""
    _seconds(function, 1, device)
    times = [_seconds(function, 1, device) for _ in range(REPETITIONS)]
    return min(times), [min(times[i::PARTS]) for i in range(PARTS)]


def check_device(device: str) -> str:
    """A device that can be used here. Raises UserError."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device = {device!r}, but there is no GPU here; use cpu")
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device = {device!r}; use cpu or cuda")
    return device


def environment(device: str) -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions, and how busy the machine was."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _seconds(function: Callable[[], Any], number: int, device: str) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(number):
        function()
    _wait(device)
    return (time.perf_counter() - began) / number


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
