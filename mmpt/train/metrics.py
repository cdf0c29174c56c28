"""metrics.jsonl: what a training step says, and how its lines are read and cut off again."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpt.config import write_atomic
from mmpt.vocab import Modality

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


def shares(ids: Sequence[float]) -> dict[str, float]:
    """The part of each medium in the ids that were read; those that had any."""
    total = sum(ids)
    return {m.name.lower(): round(ids[m] / total, 4) for m in Modality if ids[m]}


def speed(ids: int, flops: int, seconds: float, peak: float | None) -> dict[str, float]:
    """Ids and operations a second, and their part of the measured peak where there is one."""
    rates = {"ids": round(ids / seconds, 1), "flops": round(flops / seconds)}
    return rates | ({"peak": round(peak), "mfu": round(flops / seconds / peak, 4)} if peak else {})


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


def last_line(path: Path) -> Metrics:
    """The metrics of the last step that was done, if any."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else {}


def progress_bar(steps: int, *, done: int, shown: bool) -> Any:
    """What tells of the steps, with a postfix for the last of them."""
    from mmpt.progress import Bar

    return Bar(
        total=steps,
        initial=done,
        unit="step",
        desc="train",
        disable=not shown,
    )
