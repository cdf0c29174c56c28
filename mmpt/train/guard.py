"""What keeps bad steps out of the weights: values that are not finite, and spikes.

A spike is a loss of a medium, or a gradient norm, that lies more than some standard deviations
above its mean over the last steps (OLMo 2, arXiv 2501.00656, section 3, skips so). All ranks judge
the same sums, so that all skip or none.

A hidden state that is not finite spoils what shares its row, other documents among it (attention
multiplies what it hides by zero), and no other row; its step is skipped and counted like any.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmpt.config import UserError

ENOUGH = 32  # values that a spike is judged by, at least


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a step is skipped, and when a rank counts as stalled."""

    sigmas: float = 6.0  # a spike's distance above the mean; 0: only what is not finite is skipped
    window: int = 128  # steps that mean and deviation are of
    stall: float = 600.0  # seconds without a step before a rank is named

    def __post_init__(self) -> None:
        if self.sigmas < 0 or self.window < ENOUGH or self.stall <= 0:
            raise UserError(
                f"guard: sigmas = {self.sigmas}, window = {self.window}, stall = {self.stall}; use "
                f"at least 0, at least {ENOUGH}, and above 0"
            )


class Guard:
    """Judges steps by what was usual before; finite values of skipped ones count as usual, too.

    So a loss that stays high, after a change of the data, is not skipped for long.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped: dict[str, int] = {}  # reason -> steps
        self.in_a_row = 0
        self._seen: dict[str, deque[float]] = {}

    def judge(self, values: Mapping[str, float]) -> str | None:
        """Why a step with these values must be skipped, or None; remembers them."""
        reasons = [self._reason(name, value) for name, value in values.items()]
        reason = next((each for each in reasons if each), None)
        for name, value in values.items():
            if math.isfinite(value):
                seen = self._seen.setdefault(name, deque(maxlen=self.config.window))
                seen.append(value)
        self.in_a_row = self.in_a_row + 1 if reason else 0
        if reason:
            self.skipped[reason] = self.skipped.get(reason, 0) + 1
        return reason

    def forget(self) -> None:
        """What was usual is no more: the run changes what it trains."""
        self._seen = {}

    def _reason(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"{name} is not finite"
        seen = self._seen.get(name, ())
        if not self.config.sigmas or len(seen) < ENOUGH:
            return None
        mean, deviation = statistics.fmean(seen), statistics.pstdev(seen)
        return f"{name} spikes" if value > mean + self.config.sigmas * deviation else None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        seen = {name: list(values) for name, values in self._seen.items()}
        return {"seen": seen, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._seen = {
            name: deque(values, maxlen=self.config.window) for name, values in state["seen"].items()
        }
        self.skipped, self.in_a_row = dict(state["skipped"]), state["in_a_row"]
