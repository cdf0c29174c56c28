"""metrics.jsonl: what a training step says, and how its lines are read and cut off again."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from mmpt.config import write_atomic
from mmpt.train.loss import Losses
from mmpt.vocab import Modality

Metrics = dict[str, Any]


def by_modality(losses: list[Losses]) -> dict[str, dict[str, float | int | None]]:
    """Mean loss and number of predicted ids of each medium, over the batches of a step."""
    if not losses:
        return {}
    nats = torch.stack([each.nats for each in losses]).sum(0).tolist()
    counts = torch.stack([each.counts for each in losses]).sum(0).tolist()
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
        lines = path.read_text().splitlines(keepends=True)
        write_atomic(path, "".join(lines[:step]))  # one line a step, bad ones included


def last_line(path: Path) -> Metrics:
    """The metrics of the last step that was done, if any."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else {}
