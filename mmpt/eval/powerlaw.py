"""Power laws with a floor, L = E + sum of A_k X_k^-alpha_k, fitted to few and noisy losses.

As in Chinchilla (arXiv 2203.15556, appendix D.3) the logarithm of the loss is fitted under a Huber
loss from a grid of starts, the best one wins, and exp keeps E and A_k above 0. Each fit is a few
Levenberg-Marquardt steps with the weights of the Huber loss; all starts, and all draws of an
interval, are rows of one batch.

Intervals: losses are drawn again from the fitted law with normal noise in log L. As the noise is
known from n - p residuals only, its size is drawn as well (so the tails are those of Student's t).

Legend: R fits at once, N runs, K terms, P = 1 + 2 K parameters (log E, log A_k, alpha_k).
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from mmpt.config import UserError

DELTA = 5e-3  # of the Huber loss, in log L: about the noise between seeds
ALPHAS = (0.05, 3.0)  # limits of an exponent
FLOOR = 1e-4  # least E, as a share of the least loss
STEPS = 80
DRAWS = 300
SHUFFLES = 100


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> list[float]:
        """[value, low, high]."""
        return [float(f"{each:.5g}") for each in (self.value, self.low, self.high)]


@dataclass(frozen=True)
class Law:
    """A fitted law, and as many others as the noise allows.

    parameters (P,), draws (R, P), noise: of log L; noises (R,). centre (K,): log X that is 0.
    explained: share of the variance of log L. by_chance: share of shuffled losses that fit as well.
    """

    parameters: np.ndarray
    draws: np.ndarray
    noise: float
    noises: np.ndarray
    centre: np.ndarray
    explained: float
    by_chance: float

    @property
    def floor(self) -> Estimate:
        """E."""
        return _estimate(np.exp(self.parameters[0]), np.exp(self.draws[:, 0]))

    def exponent(self, term: int = 0) -> Estimate:
        """alpha of a term."""
        at = 1 + self._terms + term
        return _estimate(self.parameters[at], self.draws[:, at])

    def factor(self, term: int = 0) -> Estimate:
        """A of a term."""

        def raw(each: np.ndarray) -> np.ndarray:
            alpha = each[..., 1 + self._terms + term]
            return np.exp(each[..., 1 + term] + alpha * self.centre[term])

        return _estimate(float(raw(self.parameters)), raw(self.draws))

    def predict(self, sizes: np.ndarray, *, of_run: bool = False) -> list[Estimate]:
        """sizes (M, K) -> the loss at each; with `of_run` the interval holds a run's noise too."""
        x = np.log(sizes) - self.centre
        value = np.exp(_log_loss(self.parameters[None], x)[0])
        drawn = _log_loss(self.draws, x)
        if of_run:
            rng = np.random.default_rng(1)
            drawn = drawn + self.noises[:, None] * rng.standard_normal(drawn.shape)
        return [_estimate(v, np.exp(d)) for v, d in zip(value, drawn.T, strict=True)]

    @property
    def _terms(self) -> int:
        return len(self.centre)


def fit_law(sizes: np.ndarray, losses: np.ndarray) -> Law:
    """sizes (N, K), losses (N,), all above 0 -> the law. Needs N > P = 1 + 2 K.

    UserError where the sizes do not tell the terms apart.
    """
    count, terms = sizes.shape
    freedom = count - 1 - 2 * terms
    if freedom < 1:
        raise UserError(f"{count} runs for {1 + 2 * terms} parameters; give {2 + 2 * terms}")
    if not separable(sizes):
        raise UserError("the runs do not differ enough in size; give smaller and larger ones")
    centre = np.log(sizes).mean(0)
    x, y = np.log(sizes) - centre, np.log(losses)
    starts = _starts(y, terms)
    best, cost = _best_of(starts, x, y[None])
    best = best[0]
    residual = y - _log_loss(best[None], x)[0]
    # median-based where an outlier would blow it up, scaled up for the parameters that were fitted
    robust = 1.4826 * float(np.median(np.abs(residual))) * np.sqrt(count / freedom)
    noise = max(min(float(np.sqrt((residual**2).sum() / freedom)), 3 * robust), 1e-6)
    rng = np.random.default_rng(0)
    noises = noise * np.sqrt(freedom / rng.chisquare(freedom, DRAWS))
    noises = np.minimum(noises, 10 * noise)
    drawn = y - residual + noises[:, None] * rng.standard_normal((DRAWS, count))
    near = np.concatenate([best[None], starts[:: max(len(starts) // 3, 1)]])
    draws, _ = _best_of(near, x, drawn)
    shuffled = np.stack([rng.permutation(y) for _ in range(SHUFFLES)])
    _, others = _best_of(near, x, shuffled)
    spread = float(((y - y.mean()) ** 2).sum())
    return Law(
        parameters=best,
        draws=draws,
        noise=noise,
        noises=noises,
        centre=centre,
        explained=1 - float((residual**2).sum()) / spread if spread else 0.0,
        by_chance=float((others <= cost[0] + 1e-12).mean()),
    )


def separable(sizes: np.ndarray) -> bool:
    """Whether each of K sizes varies by a factor of 1.5 at least, whatever the others do."""
    x = np.log(sizes) - np.log(sizes).mean(0)
    return bool(np.linalg.svd(x, compute_uv=False)[-1] > np.log(1.5) / 2)


def _log_loss(parameters_RP: np.ndarray, x_NK: np.ndarray) -> np.ndarray:
    """(R, N)."""
    return np.logaddexp.reduce(_log_terms(parameters_RP, x_NK), axis=-1)


def _log_terms(parameters_RP: np.ndarray, x_NK: np.ndarray) -> np.ndarray:
    """(R, N, 1 + K): log E, log A_k - alpha_k x_k."""
    terms = x_NK.shape[1]
    powers = parameters_RP[:, None, 1 : 1 + terms] - parameters_RP[:, None, 1 + terms :] * x_NK
    floor = np.broadcast_to(parameters_RP[:, :1, None], (*powers.shape[:2], 1))
    return np.concatenate([floor, powers], axis=-1)


def _starts(y: np.ndarray, terms: int) -> np.ndarray:
    """(R, P): floors, shares of the rest, exponents."""
    least, middle = np.exp(y.min()), np.exp(np.median(y))
    grid = product((0.1, 0.5, 0.8, 0.95), product((0.1, 0.3, 0.6, 1.2), repeat=terms))
    rows = []
    for share, alphas in grid:
        rest = np.log(max(middle - share * least, 1e-3 * middle) / terms)
        rows.append([np.log(share * least), *[rest] * terms, *alphas])
    return np.array(rows)


def _best_of(starts: np.ndarray, x: np.ndarray, y_RN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best fit (R, P) of each row of losses from any start, and its cost (R,)."""
    rows, count = len(y_RN), len(starts)
    fitted, cost = _descend(np.tile(starts, (rows, 1)), x, np.repeat(y_RN, count, axis=0))
    fitted, cost = fitted.reshape(rows, count, -1), cost.reshape(rows, count)
    best = cost.argmin(1)
    return fitted[np.arange(rows), best], cost[np.arange(rows), best]


def _descend(parameters: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg-Marquardt on the Huber loss, row by row: parameters (R, P), cost (R,)."""
    terms = x.shape[1]
    low = y.min(1) + np.log(FLOOR)
    damping = np.full(len(y), 1e-2)
    cost = _huber(y - _log_loss(parameters, x))
    identity = np.eye(parameters.shape[1])
    for _ in range(STEPS):
        logs = _log_terms(parameters, x)
        share = np.exp(logs - np.logaddexp.reduce(logs, axis=-1)[..., None])
        jacobian = np.concatenate([share, -x * share[..., 1:]], axis=-1)
        residual = y - np.logaddexp.reduce(logs, axis=-1)
        weight = DELTA / np.maximum(np.abs(residual), DELTA)
        weighted = jacobian * weight[..., None]
        square = np.einsum("rnp,rnq->rpq", weighted, jacobian)
        gradient = np.einsum("rnp,rn->rp", weighted, residual)
        square += damping[:, None, None] * identity * (1e-9 + np.einsum("rpp->rp", square)[:, None])
        step = np.linalg.solve(square + 1e-12 * identity, gradient[..., None])[..., 0]
        tried = parameters + np.clip(step, -1.0, 1.0)
        tried[:, 0] = np.maximum(tried[:, 0], low)
        tried[:, 1 + terms :] = np.clip(tried[:, 1 + terms :], *ALPHAS)
        new = _huber(y - _log_loss(tried, x))
        better = new < cost
        parameters = np.where(better[:, None], tried, parameters)
        cost = np.where(better, new, cost)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e9)
    return parameters, cost


def _huber(residual: np.ndarray) -> np.ndarray:
    size = np.abs(residual)
    values = np.where(size < DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))
    return values.sum(1)


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(value), float(min(low, value)), float(max(high, value)))
