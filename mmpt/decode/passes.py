"""How a block is denoised: settings, times, and the loop over passes, for any sampler and model.

Legend: B samples, N codes of a block, V candidates, U uniform numbers of a code and pass.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch

from mmpt.config import UserError
from mmpt.decode.noise import Masked, Metric, Mixture, NoisePath
from mmpt.decode.sampling import Sampling, draw

Look = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Iterator[tuple[slice, torch.Tensor]]]
"""index (B, N), time (B,), live (B,) -> pieces: places of the block, scores (B, places, V)."""
Draws = Callable[[int, torch.Tensor], torch.Tensor]
"""U, live (B,) -> float64 (U, B, N) in [0, 1), which only samples that are live draw."""
BY_ORDER = ("maskgit", "entropy", "threshold", "raster", "diagonal")


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """How to denoise a block. How to draw a code from scores is `Sampling`."""

    num_passes: int = 8  # of a block; samplers by order may need fewer
    sampler: Literal[
        "euler", "tau", "remask", "maskgit", "entropy", "threshold", "raster", "diagonal"
    ] = "euler"
    schedule: Literal["auto", "linear", "cosine"] = "auto"  # auto: cosine for maskgit
    shift: float = 1.0  # above 1 more passes are spent on noise: t / (t + shift (1 - t))
    confidence_temperature: float = 1.0  # of maskgit's Gumbel noise in the first pass; 0 at the end
    threshold: float = 0.9
    entropy_bound: float = 0.1  # nats
    remask: float = 0.1  # share of what may be masked again, of sampler remask
    corrections: int = 0  # of each pass of sampler tau but the first; each is one more pass
    guidance_ramp: bool = False  # guidance grows from 1 at time 0 to that of `Sampling` at time 1
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times outside of which it is off

    def __post_init__(self) -> None:
        low, high = self.guidance_interval
        for name, legal, need in (
            ("num_passes", self.num_passes >= 1, "at least 1 pass"),
            ("shift", 0 < self.shift < math.inf, "more than 0"),
            ("confidence_temperature", 0 <= self.confidence_temperature < math.inf, "at least 0"),
            ("threshold", 0 <= self.threshold <= 1, "0 to 1"),
            ("entropy_bound", 0 <= self.entropy_bound < math.inf, "at least 0"),
            ("remask", 0 <= self.remask <= 1, "0 to 1"),
            ("corrections", self.corrections >= 0, "at least 0"),
            ("guidance_interval", 0 <= low <= high <= 1, "two times, 0 <= low <= high <= 1"),
        ):
            if not legal:
                raise UserError(f"{name} = {getattr(self, name)}; use {need}")
        if self.corrections and self.sampler != "tau":
            raise UserError(f"corrections are of sampler tau, not {self.sampler}; use 0")

    @property
    def times(self) -> list[float]:
        """t_0 = 0 to t_K = 1 of K passes."""
        curve = {"auto": "cosine" if self.sampler == "maskgit" else "linear"}
        name = curve.get(self.schedule, self.schedule)
        times = [k / self.num_passes for k in range(self.num_passes + 1)]
        if name == "cosine":
            times = [1 - math.cos(math.pi * u / 2) for u in times[:-1]] + [1.0]
        return [u / (u + self.shift * (1 - u)) for u in times]

    def guidance_at(self, time: torch.Tensor, guidance: float) -> torch.Tensor:
        """s (B,) of u + s (c - u) at times (B,); where it is 1 the other branch is not needed."""
        low, high = self.guidance_interval
        scale = 1 + (guidance - 1) * (time if self.guidance_ramp else torch.ones_like(time))
        return torch.where((time >= low) & (time <= high), scale, 1.0)

    def fit(self, length: int) -> "Denoising":
        """The same for a row of codes, in no more passes than a sampler by order can use."""
        fewer = self.sampler in BY_ORDER and self.num_passes > length
        return replace(self, num_passes=length) if fewer else self

    def check_block(self, height: int, width: int) -> None:
        """Refuse more passes than a sampler that writes by order has steps for such a block."""
        steps = height + width - 1 if self.sampler == "diagonal" else height * width
        if self.sampler in BY_ORDER and self.num_passes > steps:
            raise UserError(
                f"num_passes = {self.num_passes}, but sampler {self.sampler} writes a block of "
                f"{height} x {width} codes in at most {steps}; use {steps} or fewer"
            )


class Step(NamedTuple):
    """Pass `number` of a block, from one time to another."""

    number: int
    now: float
    then: float
    again: bool = False  # noise goes back from `then` to `now` before


class Moment(NamedTuple):
    """What a pass begins with."""

    step: Step
    index: torch.Tensor  # (B, N)
    free: torch.Tensor  # bool (B, N): codes to write; others are held, or pads
    uniform: torch.Tensor  # (U, B, N)
    width: torch.Tensor  # int64 (B,): codes in a row of the block

    def piece(self, places: slice) -> "Moment":
        """The same of some places."""
        index, free = self.index[:, places], self.free[:, places]
        return Moment(self.step, index, free, self.uniform[..., places], self.width)


class Sampler:
    """By time; this one is euler."""

    paths: tuple[type[NoisePath], ...] = (Mixture, Masked, Metric)

    def __init__(self, denoising: Denoising, path: NoisePath) -> None:
        if not isinstance(path, self.paths):
            names = " or ".join(p.__name__.lower() for p in self.paths)
            raise UserError(
                f"sampler {denoising.sampler} needs a model of noise path {names}, and this one "
                f"has {type(path).__name__.lower()}; use sampler euler"
            )
        self.denoising, self.path = denoising, path
        self.num_draws = 3 if isinstance(path, Metric) else 2  # U
        self.steps = [
            Step(number, now, then, again)
            for number, (now, then) in enumerate(pairwise(denoising.times))
            for again in [False] + [True] * (denoising.corrections if number else 0)
        ]

    def unfinished(self, index: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """bool (B,): which samples need another pass."""
        return free.any(1)

    def settled(self, index: torch.Tensor) -> torch.Tensor:
        """bool (B, N): which codes will not change any more, while passes are left."""
        if isinstance(self.path, Masked):
            return index != self.path.mask
        return torch.zeros_like(index, dtype=torch.bool)

    def time(self, at: Moment) -> torch.Tensor:
        """float32 (B,): how far the samples are, from 0 (noise) to 1 (clean)."""
        return torch.full(at.index.shape[:1], at.step.now, device=at.index.device)

    def prepare(self, at: Moment) -> Moment:
        """What changes before the model looks."""
        return at

    def propose(
        self, scores: torch.Tensor, sampling: Sampling, at: Moment
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From scores (B, n, V) of a piece: guesses (B, n), and how sure they are, float64."""
        guess = draw(sampling.probabilities(scores), at.uniform[0])
        return guess, torch.zeros_like(at.uniform[0])

    def advance(self, guess: torch.Tensor, sure: torch.Tensor, at: Moment) -> torch.Tensor:
        """The codes (B, N) behind the pass; only those that are `free` count."""
        return self.path.jump(at.index, guess, at.step.now, at.step.then, at.uniform[1:])


class Passed(NamedTuple):
    """Codes (B, N) behind a pass, guesses where masked; which of them will not change any more."""

    index: torch.Tensor
    settled: torch.Tensor


def refine(
    sampler: Sampler,
    sampling: Sampling,
    *,
    book: torch.Tensor,
    free: torch.Tensor,
    width: torch.Tensor,
    look: Look,
    draws: Draws,
) -> Iterator[Passed]:
    """Denoise a block from nothing: each pass looks at the codes once, and writes.

    book: int64 (N,), the codebook of each place. free: bool (B, N), the codes to write; what
    comes back elsewhere means nothing. width: int64 (B,), codes in a row of the block.
    """
    index = sampler.path.begin(book.expand_as(free), draws(1, free.any(1))[0])
    for step in sampler.steps:
        live = sampler.unfinished(index, free)
        if not live.any():
            return
        at = Moment(step, index, free, draws(sampler.num_draws, live), width)
        at = sampler.prepare(at)
        pieces = [
            sampler.propose(scores, sampling, at.piece(places))
            for places, scores in look(at.index, sampler.time(at), live)
        ]
        guess, sure = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
        index = torch.where(free, sampler.advance(guess, sure, at), at.index)
        last = step is sampler.steps[-1]
        settled = free & (sampler.settled(index) | last)
        # a masked code is known by what was guessed
        masked = index == len(sampler.path.book_V)
        yield Passed(torch.where(masked, guess, index), settled)
