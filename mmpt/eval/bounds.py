"""Evidence bounds of noise paths: which noisy copies of a block to predict, and what they count.

A model that predicts clean codes from noisy ones is a reversed noise process, and the likelihood of
that has an upper bound in nats, an integral over times (0 noise, 1 clean). It is estimated from a
few noisy copies of a block, whose times are spread evenly behind one random offset.

- masked (MDLM, arXiv 2406.07524): with l of N codes masked, N / l times the nats of those, for l
  drawn evenly from 1 to N. Exact numbers of masked codes have less variance than times.
- mixture (UDLM, arXiv 2412.10193; Duo, arXiv 2506.10892): the divergence of the true jump rates
  from the predicted ones, up to the time `last_time`, when what remains is predicted at once.

Rates of the mixture follow from predictions that see the noisy code itself, which trained ones
should, and from predictions that do not. A model that is not told the time, or is not trained to
the end, is between the two; any share of the way is a bound, and the best may be chosen on training
documents: see `SHARES`.

Legend: N codes of a block, V candidates.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from mmpt.decode.noise import Masked, Mixture, NoisePath

LEVELS = tuple(k / 10 for k in range(1, 10))  # times at which all paths report cross-entropy
QUARTERS = 4  # parts of the time from 0 to `last_time`, each with a share of its own
SHARES = (0.0, 0.25, 0.5, 1.0)  # of what a noisy code tells, how much a prediction counts already
KINDS = ("plain", "last", "rates")  # cross-entropies, the same by shares, rates by shares
SMALLEST = 1e-6  # of a time, where rates are 0 / 0


@dataclass(frozen=True)
class Copy:
    """Noisy codes of a block, and how to sum up what is predicted for them.

    noisy: int64 (N,), indices. weight: float64 (N,), of each position's nats. part: the number of
    the level, or len(LEVELS) and the quarter that it counts in. kind: what its nats are, see
    `KINDS`.
    """

    noisy: torch.Tensor
    time: float
    weight: torch.Tensor
    part: int
    kind: Literal["plain", "last", "rates"] = "plain"


def level_copies(path: NoisePath, clean: torch.Tensor, generator: torch.Generator) -> list[Copy]:
    """One copy of clean codes (N,) per time of `LEVELS`; masked codes alone count, if any are."""
    copies = []
    for part, time in enumerate(LEVELS):
        noisy = _corrupt(path, clean, time, generator)
        hidden = noisy == path.mask if isinstance(path, Masked) else torch.ones_like(clean)
        copies.append(Copy(noisy, time, hidden.double(), part))
    return copies


def bound_copies(
    path: NoisePath, clean: torch.Tensor, generator: torch.Generator, *, draws: int
) -> list[Copy]:
    """Copies of clean codes (N,) whose weighted nats sum up to the bound of the block, on average.

    `draws` of them, and one more on the mixture path; none on a path without a simple bound.
    """
    if isinstance(path, Masked):
        return _masked(path, clean, generator, draws)
    return _mixture(path, clean, generator, draws) if isinstance(path, Mixture) else []


def shares_of(path: NoisePath) -> tuple[float, ...]:
    """Those between which there is a choice: a masked code tells nothing."""
    return SHARES if isinstance(path, Mixture) else (1.0,)


def last_time(num_codes: int) -> float:
    """When the reversed mixture process predicts the rest at once: half a code is noise by then.

    A model that is not told the time cannot know that a block is all but clean, and its rates would
    cost the more the later they count.
    """
    return 1 - 0.5 / num_codes


def mixture_nats(
    log_p: torch.Tensor,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    time: torch.Tensor,
    inside: torch.Tensor,
    *,
    rates: torch.Tensor,
) -> torch.Tensor:
    """float64 (n, S): nats of predictions for each of `SHARES`.

    rates: bool (n,), whether they are those of `rate_nats`, which see, or cross-entropies.
    """
    told, out = _low(time, inside).log(), []
    for share in SHARES:
        tilt = torch.zeros_like(log_p).scatter(1, noisy[:, None], (share - 1) * told[:, None])
        q = (log_p + tilt).log_softmax(-1)
        nats = -q.gather(1, clean[:, None])[:, 0]
        out.append(torch.where(rates, rate_nats(q, clean, noisy, time, inside), nats))
    return torch.stack(out, dim=1)


def rate_nats(
    log_p: torch.Tensor,
    clean: torch.Tensor,
    noisy: torch.Tensor,
    time: torch.Tensor,
    inside: torch.Tensor,
) -> torch.Tensor:
    """float64 (n,): divergence of the true rates of noisy codes from the predicted, per unit time.

    log_p: float64 (n, V), of the clean code given the noisy block, the noisy code itself included.
    clean, noisy: int64 (n,). time: float64 (n,). inside: bool (n, V), the candidates of the
    codebook; no other is predicted.

    Noise replaces codes at rate 1 / t, each by any of V. In the reversed process a code z jumps to
    j at rate r_j / (t V), where r_j is the ratio of how likely j and z are at time t. If the clean
    code were z, that is a = (1 - t) / (1 - t + V t); if it were j, 1 / a; and 1 otherwise.
    Predicted rates are the mean of those, by the prediction.
    """
    time = time.clamp(min=SMALLEST)
    low, p = _low(time, inside)[:, None], log_p.exp()
    own, index = noisy[:, None], torch.arange(p.shape[1], device=p.device)
    predicted = 1 + p.gather(1, own) * (low - 1) + p * (1 / low - 1)
    true = torch.where(index == clean[:, None], 1 / low, 1.0)
    true = torch.where(own == clean[:, None], low, true)
    nats = predicted - true + true * (true / predicted).log()
    nats = torch.where(inside & (index != own), nats, 0.0).sum(-1)
    return nats / (inside.sum(-1) * time)


def _low(time: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    # how likely another code is at a time, in units of how likely the clean one is
    return (1 - time) / (1 - time + inside.sum(-1) * time)


def _masked(
    path: Masked, clean: torch.Tensor, generator: torch.Generator, draws: int
) -> list[Copy]:
    num, copies = len(clean), []
    for at in _spread(draws, generator):
        masked = 1 + int(at * num)
        hidden = torch.randperm(num, generator=generator).to(clean.device) < masked
        weight = hidden.double() * (num / masked / draws)
        noisy = torch.where(hidden, path.mask, clean)
        copies.append(Copy(noisy, 1 - masked / num, weight, _part(1 - at)))
    return copies


def _mixture(
    path: Mixture, clean: torch.Tensor, generator: torch.Generator, draws: int
) -> list[Copy]:
    last, ones = last_time(len(clean)), torch.ones_like(clean, dtype=torch.float64)
    weight, copies = ones * (last / draws), []
    for at in _spread(draws, generator):
        noisy = _corrupt(path, clean, at * last, generator)
        copies.append(Copy(noisy, at * last, weight, _part(at), "rates"))
    noisy = _corrupt(path, clean, last, generator)
    return [*copies, Copy(noisy, last, ones, _part(1), "last")]


def _part(at: float) -> int:
    return len(LEVELS) + min(int(at * QUARTERS), QUARTERS - 1)


def _spread(number: int, generator: torch.Generator) -> list[float]:
    offset = float(torch.rand((), generator=generator, dtype=torch.float64))
    return [(k + offset) / number for k in range(number)]


def _corrupt(
    path: NoisePath, clean: torch.Tensor, time: float, generator: torch.Generator
) -> torch.Tensor:
    uniform = torch.rand(2, len(clean), generator=generator, dtype=torch.float64)
    times = torch.full(clean.shape, time, dtype=torch.float64, device=clean.device)
    return path.corrupt(clean, times, uniform.to(clean.device))
