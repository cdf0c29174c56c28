"""How much compute a variant saves: eta, from held-out losses of its runs and of dense ones.

eta = cost at which the dense run reaches the variant's last loss / cost of the variant's run. The
dense curve is made to fall by isotonic regression of its losses, evenly weighted, and is linear in
the logarithm of the cost between evaluations; where it is level, the first cost counts. The
variant's loss is taken as measured. Nothing is extrapolated: a loss that the dense run has not
reached at its end makes eta a bound from below, one that it had at its first evaluation from above.

The n-th run of a variant is compared with the n-th dense one, which read the same rows. Over seeds
log eta is averaged, with a 95% interval by Student's t.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mmpt.eval.runs import Run
from mmpt.eval.savings_variants import DENSE
from mmpt.page.markup import MODALITIES

ALL = "all"  # all media together
COSTS = ("flops", "seconds")
Bound = Literal["", "above", "below", "unknown"]


@dataclass(frozen=True)
class LossCurve:
    """Held-out losses of a run at N evaluations.

    steps (N,). costs: flops and seconds -> float (N,), spent in training until then, ascending.
    nats: medium or ALL -> float (N,), under the router that inference uses. gap: medium or ALL ->
    what these are above the nats under training's router at the end; empty where it is the same.
    """

    run: str
    steps: np.ndarray
    costs: dict[str, np.ndarray]
    nats: dict[str, np.ndarray]
    gap: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Saving:
    """eta over some seeds. Of a bound, `value` is the bound, and low and high are NaN.

    above: dense runs did not reach the loss with `value` times the cost. below: they were there
    at their first evaluation. unknown: some seeds say the one, some the other. low, high: the 95%
    interval; NaN for a single seed.
    """

    value: float
    low: float
    high: float
    bound: Bound

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for what is not known."""
        known = {"eta": self.value, "low": self.low, "high": self.high}
        rounded = {key: float(f"{v:.5g}") if np.isfinite(v) else None for key, v in known.items()}
        return rounded | {"bound": self.bound}


@dataclass(frozen=True)
class Comparison:
    """Variant -> the curves of its runs that are done, seed by seed; the dense ones come first."""

    curves: dict[str, list[LossCurve]]

    @property
    def variants(self) -> list[str]:
        """All but the dense one."""
        return [name for name in self.curves if name != DENSE]

    @property
    def media(self) -> list[str]:
        """ALL, and those that every run has held-out losses of."""
        found = [set(curve.nats) for curves in self.curves.values() for curve in curves]
        return [ALL, *(medium for medium in MODALITIES if all(medium in each for each in found))]

    def saving(self, variant: str, medium: str, cost: str, place: int = -1) -> "Saving":
        """eta of a variant at one of its evaluations, the last unless given."""
        ours = self.curves[variant]
        etas, bounds = [], []
        for curve, dense in zip(ours, self.curves[DENSE][: len(ours)], strict=True):
            target = float(curve.nats[medium][place])
            reached, bound = cost_to_reach(dense.costs[cost], dense.nats[medium], target)
            etas.append(reached / curve.costs[cost][place])
            bounds.append(bound)
        return combine(np.array(etas), bounds)

    def relative_cost(self, variant: str, cost: str) -> float:
        """Of a step, as a part of a dense one's; the mean over seeds."""
        ours, dense = (
            np.mean([each.costs[cost][-1] / each.steps[-1] for each in self.curves[name]])
            for name in (variant, DENSE)
        )
        return float(ours / dense)

    def gap(self, variant: str, medium: str) -> float | None:
        """Nats that causal routing costs, the mean over seeds; None where training's is causal."""
        gaps = [run.gap[medium] for run in self.curves[variant] if medium in run.gap]
        return float(np.mean(gaps)) if gaps else None

    def to_json(self) -> dict[str, Any]:
        """Plain values: what the variants save, and where each run ended."""
        return {
            "causality_gap": {
                name: {medium: self.gap(name, medium) for medium in self.media}
                for name in self.variants
            },
            "step_of_a_dense_one": {
                name: {cost: round(self.relative_cost(name, cost), 4) for cost in COSTS}
                for name in self.variants
            },
            "savings": {
                name: {
                    cost: {m: self.saving(name, m, cost).to_json() for m in self.media}
                    for cost in COSTS
                }
                for name in self.variants
            },
            "runs": [
                {"run": each.run, "steps": int(each.steps[-1])}
                | {cost: float(f"{spent[-1]:.6g}") for cost, spent in each.costs.items()}
                | {"nats": {m: round(float(nats[-1]), 5) for m, nats in each.nats.items()}}
                for curves in self.curves.values()
                for each in curves
            ],
        }


def shares_of(run: Run) -> dict[str, float]:
    """Medium -> its part of the ids that a run learned to predict: what losses are averaged by."""
    ids = {medium: float(np.nansum(run.get(f"{medium} ids"))) for medium in run.media}
    return {medium: count / sum(ids.values()) for medium, count in ids.items()}


def read_curve(
    runs: Sequence[Run], shares: Mapping[str, float], gap: Mapping[str, float]
) -> LossCurve:
    """The held-out losses of the last of some runs, which go on from each other.

    Seconds are steps times the median step's, so that pauses, and other work of the machine for
    some of the time, do not count. Losses of all media are means by `shares`, without media that
    are not evaluated; so is their gap.
    """
    last = runs[-1]
    steps = np.array([row["step"] for row in last.evaluations], float)
    flops = last.get("flops")[np.searchsorted(last.get("step"), steps)]
    seconds = steps * _step_seconds(last)
    for run in runs[:-1]:
        flops = flops + run.get("flops")[-1]
        seconds = seconds + run.get("step")[-1] * _step_seconds(run)
        steps = steps + run.get("step")[-1]
    losses = [row["loss"] for row in last.evaluations]
    media = [medium for medium in shares if all(medium in each for each in losses)]
    nats = {m: np.array([each[m]["nats"] for each in losses], float) for m in media}
    whole = sum(shares[medium] for medium in media)
    parts = {medium: shares[medium] / whole for medium in media}
    nats[ALL] = np.sum([nats[medium] * part for medium, part in parts.items()], axis=0)
    gaps = dict(gap)
    if gaps:
        gaps[ALL] = sum(gaps[medium] * part for medium, part in parts.items())
    return LossCurve(runs[0].name, steps, {"flops": flops, "seconds": seconds}, nats, gaps)


def _step_seconds(run: Run) -> float:
    return float(np.nanmedian(run.get("step_seconds")))


def cost_to_reach(costs: np.ndarray, nats: np.ndarray, target: float) -> tuple[float, Bound]:
    """The least cost (N,) at which losses (N,), made to fall, are at `target`; or a bound of it."""
    from scipy.optimize import isotonic_regression

    falling = isotonic_regression(nats, increasing=False).x
    if target < falling[-1]:
        return float(costs[-1]), "above"
    first = int(np.argmax(falling <= target))
    if first == 0:
        return float(costs[0]), "" if target == falling[0] else "below"
    high, low = falling[first - 1], falling[first]
    share = (high - target) / (high - low)
    begin, end = np.log(costs[first - 1 : first + 1])
    return float(np.exp(begin + share * (end - begin))), ""


def combine(etas: np.ndarray, bounds: Sequence[Bound]) -> Saving:
    """The geometric mean of eta over seeds (S,), and its interval unless some are bounds only."""
    from scipy.stats import t

    logs = np.log(etas)
    value = float(np.exp(logs.mean()))
    kinds: set[Bound] = {bound for bound in bounds if bound}
    if len(kinds) > 1:
        return Saving(float("nan"), float("nan"), float("nan"), "unknown")
    if kinds:  # the mean of values and bounds of one side is a bound of that side
        return Saving(value, float("nan"), float("nan"), kinds.pop())
    if len(logs) < 2:
        return Saving(value, float("nan"), float("nan"), "")
    spread = float(t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)))
    return Saving(
        value, float(np.exp(logs.mean() - spread)), float(np.exp(logs.mean() + spread)), ""
    )
