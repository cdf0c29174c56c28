"""Is one way of decoding worse than another? Non-inferiority by a paired bootstrap over prompts.

A margin, fixed beforehand, says how much worse is still as good. The loss is how much worse the
candidate does than the reference; each draw takes the same prompts of both. With one-sided 95%
bounds of the loss, the candidate is

    not inferior   if the upper bound lies below the margin,
    inferior       if the lower bound lies above it,
    cannot tell    otherwise, and wherever fewer than `FEWEST` prompts are counted.

Percentiles of a bootstrap are too narrow for few prompts; they are taken a little further out, as
far as Student's t lies beyond the normal (Hesterberg 2015, "expanded percentiles"). When several
metrics must all be not inferior, each may be tested at its full level (intersection-union).

Legend: N prompts, B draws, V codes, M samples, F features.
"""

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, Protocol

import numpy as np

Verdict = Literal["not inferior", "inferior", "cannot tell"]

FEWEST = 20  # prompts
LEVEL = 0.05  # of a one-sided test
NUM_DRAWS = 2000


class Statistic(Protocol):
    """A number of N prompts, which can be had again of other draws of them."""

    @property
    def counted(self) -> np.ndarray:
        """bool (N,): the prompts that say something."""
        ...

    def redraw(self, times: np.ndarray) -> np.ndarray:
        """float (B,): the number when prompt n was drawn times[b, n] times; int (B, N)."""
        ...


@dataclass(frozen=True)
class Ratio:
    """A sum over another: nats over codes, errors over words. float (N,) each."""

    above: np.ndarray
    below: np.ndarray

    @property
    def counted(self) -> np.ndarray:
        return self.below > 0

    def redraw(self, times: np.ndarray) -> np.ndarray:
        return (times @ self.above) / (times @ self.below)


@dataclass(frozen=True)
class Entropy:
    """Nats of the codes of all samples together; counts (N, V) of each code."""

    counts: np.ndarray

    @property
    def counted(self) -> np.ndarray:
        return self.counts.sum(1) > 0

    def redraw(self, times: np.ndarray) -> np.ndarray:
        total = times @ self.counts
        p = total / total.sum(1, keepdims=True)
        return -(p * np.log(np.where(p > 0, p, 1.0))).sum(1)


@dataclass(frozen=True)
class KernelDistance:
    """Squared maximum mean discrepancy of samples and real media, without bias.

    Kernels (N, N) between samples, between real ones, and across. A prompt is never compared with
    itself, nor with its copies in a draw.
    """

    samples: np.ndarray
    real: np.ndarray
    across: np.ndarray

    @property
    def counted(self) -> np.ndarray:
        return np.ones(len(self.samples), dtype=bool)

    def redraw(self, times: np.ndarray) -> np.ndarray:
        kernel = self.samples + self.real - self.across - self.across.T
        kernel = kernel - np.diag(np.diag(kernel))
        pairs = times.sum(1) ** 2 - (times**2).sum(1)
        return ((times @ kernel) * times).sum(1) / pairs


class FrechetDistance:
    """Distance of two normal distributions with the means and covariances of features (FID).

    The root of the product of covariances has the trace that is the sum of the singular values of
    the centred features' products, so no matrix is larger than there are samples.
    """

    def __init__(self, samples: np.ndarray, real: np.ndarray, places: np.ndarray) -> None:
        """samples: float64 (M, F), places: int (M,), the prompt of each. real: (N, F)."""
        middle = real.mean(0)  # of no matter but for rounding
        x, y = samples - middle, real - middle
        self.places, self.num_prompts = places, len(real)
        self.within, self.real, self.across = x @ x.T, y @ y.T, x @ y.T

    @property
    def counted(self) -> np.ndarray:
        return np.ones(self.num_prompts, dtype=bool)

    def redraw(self, times: np.ndarray) -> np.ndarray:
        return np.array([self._distance(row[self.places], row) for row in times])

    def _distance(self, often: np.ndarray, times: np.ndarray) -> float:
        """often: how many times each sample was drawn, times: each real one."""
        of, on = np.flatnonzero(often), np.flatnonzero(times)
        p, q = often[of] / often.sum(), times[on] / times.sum()
        within, real = self.within[np.ix_(of, of)], self.real[np.ix_(on, on)]
        across = self.across[np.ix_(of, on)]
        means = p @ within @ p, q @ real @ q
        apart = means[0] + means[1] - 2 * p @ across @ q
        # covariances divide by one less than there are
        scale = often.sum() / (often.sum() - 1), times.sum() / (times.sum() - 1)
        spread = scale[0] * (p @ np.diag(within) - means[0])
        spread += scale[1] * (q @ np.diag(real) - means[1])
        centred = across - (across @ q)[:, None] - (p @ across) + p @ across @ q
        weight = np.sqrt(np.outer(p * scale[0], q * scale[1]))
        root = np.linalg.svd(centred * weight, compute_uv=False).sum()
        return float(apart + spread - 2 * root)


@dataclass(frozen=True, kw_only=True)
class Margin:
    """How much worse is still as good: of the reference's value, or in the metric's own unit."""

    size: float
    relative: bool = False
    higher_is_better: bool = False


@dataclass(frozen=True)
class Outcome:
    """A test. loss: how much worse the candidate is, in the margin's unit; low, high: its one-sided
    95% bounds, None where nothing can be drawn.
    """

    reference: float
    candidate: float
    loss: float
    low: float | None
    high: float | None
    verdict: Verdict
    num_prompts: int


def value(statistic: Statistic) -> float:
    """The number of all prompts; NaN where none is counted."""
    if not statistic.counted.any():
        return float("nan")
    return float(statistic.redraw(np.ones((1, len(statistic.counted))))[0])


def noninferiority(
    reference: Statistic, candidate: Statistic, margin: Margin, *, seed: int = 0
) -> Outcome:
    """Test the candidate against the reference on the same prompts."""
    # beside other prompts, other ones may count
    num = int(min(reference.counted.sum(), candidate.counted.sum()))
    ours, theirs = value(candidate), value(reference)
    loss = float(_loss(np.array(theirs), np.array(ours), margin))
    if num < FEWEST:
        return Outcome(theirs, ours, loss, None, None, "cannot tell", num)
    size = len(reference.counted)
    times = np.random.default_rng(seed).multinomial(size, [1 / size] * size, size=NUM_DRAWS)
    losses = _loss(reference.redraw(times), candidate.redraw(times), margin)
    tail = expanded_tail(num)
    low, high = (float(bound) for bound in np.quantile(losses, [tail, 1 - tail]))
    verdict: Verdict = "cannot tell"
    if high < margin.size:
        verdict = "not inferior"
    elif low > margin.size:
        verdict = "inferior"
    return Outcome(theirs, ours, loss, low, high, verdict, num)


def expanded_tail(num: int) -> float:
    """The share of draws to leave out at one end, so that the bound of `num` prompts has LEVEL."""
    normal, freedom = NormalDist(), num - 1
    z = -normal.inv_cdf(LEVEL)
    # Student's t by Cornish and Fisher; off by less than 0.001 from 19 degrees of freedom on
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return normal.cdf(-t * (num / freedom) ** 0.5)


def _loss(reference: np.ndarray, candidate: np.ndarray, margin: Margin) -> np.ndarray:
    worse = reference - candidate if margin.higher_is_better else candidate - reference
    return worse / abs(reference) if margin.relative else worse
