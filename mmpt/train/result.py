"""How far a run is, and how it ended."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmpt.train.metrics import Metrics


@dataclass
class Counters:
    """How far a run is, over all its parts; saved in the checkpoint."""

    step: int = 0
    tokens: int = 0  # ids read, without padding
    seconds: float = 0.0  # spent in steps
    bad_steps: int = 0  # that were skipped
    flops: dict[str, int] = field(default_factory=dict)  # by medium, see `Flops`


@dataclass
class TrainResult:
    """How a run ended; `checkpoint` is also a model folder."""

    finished: bool
    checkpoint: Path
    counters: Counters
    last: Metrics = field(default_factory=dict)  # of the last step
    data: dict[str, Any] = field(default_factory=dict)  # fill, cuts, shares, epochs
    status: int = 0  # exit status of a command that was asked to stop

    def to_json(self) -> dict[str, Any]:
        """Plain values; of a run that was interrupted at the terminal, exit status 130."""
        return {
            "finished": self.finished,
            "checkpoint": str(self.checkpoint),
            **asdict(self.counters),
            "last": self.last,
            "data": self.data,
            "exit_status": self.status,
        }
