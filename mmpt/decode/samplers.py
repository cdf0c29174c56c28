"""Samplers of parallel decoding: what a pass over a block writes, and in which order.

By time: each code of the block jumps towards a guess with the probability of the noise path.
- euler: one guess for each code, drawn from what the model thinks of it (any path).
- tau: leaps at the expected rate over all guesses (mixture, metric), with corrections if wanted:
  noise goes back to where the pass began, and the pass is made again.
- remask: codes that are there may be masked again (masked; ReMDM, arXiv 2503.00307).

By order: each pass writes some of the masked codes for good (masked path only).
- maskgit: those whose drawn values have the best log-probability, plus Gumbel noise that fades
  (arXiv 2202.04200). Values decide about places, so it is biased towards likely values.
- entropy: the surest, as long as their entropies but for the largest sum up to at most
  `entropy_bound` nats (arXiv 2505.24857).
- threshold: all whose best value has at least the probability `threshold`.
- raster, diagonal: in the order of reading, or of anti-diagonals, all steps of which an image of
  h x w codes has h w, or h + w - 1.

Of one code a pass, entropy, threshold, raster and diagonal draw from the model's joint distribution
exactly: places are chosen before values are drawn. By time, passes have to be many.

Legend: B samples, N codes of a block, V candidates, P places of all samples.
"""

import math

import torch

from mmpt.config import UserError
from mmpt.decode.noise import CHUNK, Masked, Metric, Mixture, NoisePath
from mmpt.decode.passes import Denoising, Moment, Sampler, Step
from mmpt.decode.sampling import Sampling, draw


class Tau(Sampler):
    """Jumps at the rate that is expected over all clean values, not over one that is drawn."""

    paths = (Mixture, Metric)

    def __init__(self, denoising: Denoising, path: NoisePath) -> None:
        super().__init__(denoising, path)
        if denoising.corrections and not isinstance(path, Mixture):
            raise UserError("corrections need a model of noise path mixture; use 0")
        self.num_draws = 4 if denoising.corrections else 2

    def prepare(self, at: Moment) -> Moment:
        if not at.step.again:
            return at
        kept = torch.tensor(at.step.now / at.step.then, device=at.index.device)
        noisier = self.path.corrupt(at.index, kept, at.uniform[2:])
        return at._replace(index=torch.where(at.free, noisier, at.index))

    def propose(
        self, scores: torch.Tensor, sampling: Sampling, at: Moment
    ) -> tuple[torch.Tensor, torch.Tensor]:
        p, (where, leaves) = sampling.probabilities(scores), at.uniform[:2]
        if at.step.then == 1:
            return draw(p, where), torch.zeros_like(where)
        if isinstance(self.path, Metric):
            rate = _metric_rate(self.path, p.flatten(0, 1), at.index.flatten(), at.step).view_as(p)
        else:  # 1 / (1 - t) towards each value, over the time of the pass
            length = math.log((1 - at.step.now) / (1 - at.step.then))
            rate = length * p.scatter(-1, at.index[..., None], 0.0)
        total = rate.sum(-1, keepdim=True)
        target = draw(torch.where(total > 0, rate, 1.0), where)
        jumps = leaves < -torch.expm1(-total[..., 0])
        return torch.where(jumps, target, at.index), torch.zeros_like(where)

    def advance(self, guess: torch.Tensor, sure: torch.Tensor, at: Moment) -> torch.Tensor:
        return guess


class Remask(Sampler):
    """Masks codes again: ReMDM with its rescaled sigma, `remask` of the largest one there is."""

    paths = (Masked,)

    def settled(self, index: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(index, dtype=torch.bool)

    def advance(self, guess: torch.Tensor, sure: torch.Tensor, at: Moment) -> torch.Tensor:
        assert isinstance(self.path, Masked)
        mask, (_, now, then, _), uniform = self.path.mask, at.step, at.uniform[1]
        sigma = self.denoising.remask * min(1.0, (1 - then) / now) if now else 0.0
        appears = uniform < (then - (1 - sigma) * now) / (1 - now)
        stays = torch.where(uniform < sigma, mask, at.index)
        return torch.where(at.index == mask, torch.where(appears, guess, mask), stays)


class ByOrder(Sampler):
    """Writes masked codes for good: the surest, as many as the schedule says, or more."""

    paths = (Masked,)

    def unfinished(self, index: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        return (free & ~self.settled(index)).any(1)

    def time(self, at: Moment) -> torch.Tensor:
        known = (at.free & self.settled(at.index)).sum(1)
        return (known / at.free.sum(1).clamp(min=1)).float()

    def propose(
        self, scores: torch.Tensor, sampling: Sampling, at: Moment
    ) -> tuple[torch.Tensor, torch.Tensor]:
        guess = draw(sampling.probabilities(scores), at.uniform[0])
        return guess, self.sure(scores.double().log_softmax(-1), guess, at)

    def sure(self, log_p: torch.Tensor, guess: torch.Tensor, at: Moment) -> torch.Tensor:
        """float64 (B, n), from log-probabilities (B, n, V) that no temperature has touched."""
        return torch.zeros_like(guess, dtype=torch.float64)

    def advance(self, guess: torch.Tensor, sure: torch.Tensor, at: Moment) -> torch.Tensor:
        masked = at.free & ~self.settled(at.index)
        order = sure.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank, left = order.argsort(dim=1), masked.sum(1)
        least = (left - _left(at.free.sum(1), at.step.then)).clamp(min=1)
        chosen = (rank < least[:, None]) | self.more(sure, order, rank)
        return torch.where(masked & chosen, guess, at.index)

    def more(self, sure: torch.Tensor, order: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """bool (B, N): which may be written besides. order, rank: by `sure`, masked ones first."""
        return torch.zeros_like(rank, dtype=torch.bool)


class MaskGIT(ByOrder):
    """Sure are values that the model finds likely."""

    def sure(self, log_p: torch.Tensor, guess: torch.Tensor, at: Moment) -> torch.Tensor:
        # a function of the pass alone: scaled from pass to pass, it would be gone too soon
        left = 1 - (at.step.number + 1) / self.denoising.num_passes
        gumbel = -torch.log(-torch.log(at.uniform[1].clamp(min=1e-300)))
        known = log_p.gather(-1, guess[..., None])[..., 0]
        return known + self.denoising.confidence_temperature * left * gumbel


class Threshold(ByOrder):
    """Sure are places whose best value is likely; their values are drawn as ever."""

    def sure(self, log_p: torch.Tensor, guess: torch.Tensor, at: Moment) -> torch.Tensor:
        return log_p.amax(-1).exp()

    def more(self, sure: torch.Tensor, order: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        return sure >= self.denoising.threshold


class Entropy(ByOrder):
    """Sure are places of low entropy."""

    def sure(self, log_p: torch.Tensor, guess: torch.Tensor, at: Moment) -> torch.Tensor:
        return -torch.special.entr(log_p.exp()).sum(-1)

    def more(self, sure: torch.Tensor, order: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        entropy = -sure.gather(1, order)  # ascending: of those up to one, it is the largest
        return (entropy.cumsum(1) - entropy).gather(1, rank) <= self.denoising.entropy_bound


class Given(ByOrder):
    """Level by level, which follow from the places alone."""

    def advance(self, guess: torch.Tensor, sure: torch.Tensor, at: Moment) -> torch.Tensor:
        place, width = torch.arange(guess.shape[1], device=guess.device), at.width[:, None]
        diagonal = self.denoising.sampler == "diagonal"
        level = place // width + place % width if diagonal else place.expand_as(guess)
        # levels without codes to write take no pass
        there = torch.zeros_like(level).scatter_add_(1, level, at.free.long()) > 0
        level = (there.cumsum(1) - 1).gather(1, level)
        masked = at.free & ~self.settled(at.index)
        first = level.masked_fill(~masked, level.shape[1]).amin(1)
        done = there.sum(1) - _left(there.sum(1), at.step.then)
        chosen = level < torch.maximum(done, first + 1)[:, None]
        return torch.where(masked & chosen, guess, at.index)


def _left(count: torch.Tensor, time: float) -> torch.Tensor:
    # how many of `count` are left at a time; float noise must not leave one less
    return (count * (1 - time) + 1e-9).floor().long()


def _metric_rate(
    path: Metric, p_PV: torch.Tensor, index_P: torch.Tensor, step: Step
) -> torch.Tensor:
    """(P, V): expected rates from codes to all others, times the time of the pass.

    One clean value at a time; those of probability 0 cost nothing, and top_p makes many.
    """
    begin, end = path.sharpness(torch.tensor([step.now, step.then], dtype=torch.float64)).tolist()
    rate = torch.zeros_like(p_PV)
    rows = max(1, CHUNK // p_PV.shape[1])
    for where, clean in zip(*(x.split(rows) for x in p_PV.nonzero().unbind(1)), strict=True):
        distance = path.distance(clean)
        closer = (distance.gather(1, index_P[where, None]) - distance).clamp(min=0)
        other = distance.isinf()  # codebooks, whose 0 times inf is no number
        sharp = (-begin * distance).masked_fill(other, -torch.inf).softmax(-1)
        pull = sharp * closer.masked_fill(other, 0.0) * p_PV[where, clean][:, None]
        rate.index_add_(0, where, pull)
    return (end - begin) * rate


SAMPLERS: dict[str, type[Sampler]] = {
    "euler": Sampler,
    "tau": Tau,
    "remask": Remask,
    "maskgit": MaskGIT,
    "entropy": Entropy,
    "threshold": Threshold,
    "raster": Given,
    "diagonal": Given,
}
