"""Is the training well? Codebooks that collapse and losses that are not finite end it, and say so.

Legend: Q codebooks, K codes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmpt.config import UserError
from mmpt.tokenizers.processes import Processes
from mmpt.tokenizers.quantize import Quantized, Quantizer

RARE = 0.01  # of an equal share: a code with less is not in use, or strays would keep it alive


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When a training is stopped. Usage is measured over windows, the first after the warm-up."""

    window: int = 200  # steps
    min_usage: float = 0.02  # share of the codebook; 0 never stops
    max_bad_steps: int = 10  # steps in a row that are not finite

    def __post_init__(self) -> None:
        if self.window < 1 or self.max_bad_steps < 1 or not 0 <= self.min_usage < 1:
            raise UserError(
                f"health: window = {self.window}, max_bad_steps = {self.max_bad_steps}, "
                f"min_usage = {self.min_usage}; needs 1 or more, 1 or more, and a share below 1"
            )


class Unhealthy(UserError):
    """Why a training should not go on: what was measured, and what to change."""


class CodebookHealth(nn.Module):
    """How often each code was used, in this step and over the window.

    It listens to a codec's quantisers, so that it sees what any objective really used; the worst
    codebook counts. What it holds is part of a checkpoint.
    """

    counts: Tensor
    steps: Tensor
    usage: Tensor
    perplexity: Tensor

    def __init__(self, codec: nn.Module, config: HealthConfig, *, first_step: int) -> None:
        super().__init__()
        self.config, self.first_step = config, first_step
        self._quantizers = _outermost(codec)  # a list: they are not a part of this module
        sizes = [q.codebook_size for q in self._quantizers for _ in range(q.num_codebooks)]
        self._sizes, self._now = sizes, [torch.zeros(size, dtype=torch.int64) for size in sizes]
        self.register_buffer("counts", torch.zeros(sum(sizes), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("usage", torch.tensor(math.nan))
        self.register_buffer("perplexity", torch.tensor(math.nan))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count the codes of every quantiser that has a codebook while the block runs."""
        self._now = [self.counts.new_zeros(size) for size in self._sizes]
        handles, first = [], 0
        for quantizer in self._quantizers:
            handles.append(quantizer.register_forward_hook(self._hear_from(first)))
            first += quantizer.num_codebooks
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def update(self, processes: Processes, step: int) -> dict[str, float | int | None]:
        """Close a step; what to log. Raises Unhealthy when a window shows a collapse."""
        now = processes.sum(torch.cat(self._now))
        row: dict[str, Any] = {"used": int((now > 0).sum())}
        if step >= self.first_step and now.any():
            self.counts += now
            self.steps += 1
            if int(self.steps) == self.config.window:
                self._judge(step)
        for name in ("usage", "perplexity"):
            value = float(getattr(self, name))
            row[name] = None if math.isnan(value) else round(value, 4)
        return row

    def _hear_from(self, first: int) -> Any:
        def hear(quantizer: Quantizer, inputs: object, out: Quantized) -> None:
            if quantizer.ready:
                size = quantizer.codebook_size
                for index, codes in enumerate(out.codes.unbind(-1)):
                    legal = codes[(codes >= 0) & (codes < size)]  # latents may not be finite
                    self._now[first + index] += torch.bincount(legal, minlength=size)

        return hear

    def _judge(self, step: int) -> None:
        seen = [counts for counts in self.counts.split(self._sizes) if counts.any()]
        worst = min(measure(counts) for counts in seen)
        self.usage.fill_(worst.usage)
        self.perplexity.fill_(worst.perplexity)
        self.counts.zero_()
        self.steps.zero_()
        if worst.usage < self.config.min_usage:
            raise Unhealthy(
                f"the codebook has collapsed: in the {self.config.window} steps up to step "
                f"{step + 1} only {worst.used} of {worst.size} codes were in use (perplexity "
                f"{worst.perplexity:.1f}), below health.min_usage = {self.config.min_usage:g}; "
                "lower lr, raise loss.quantizer, or take a smaller codebook or another quantizer; "
                "health.min_usage = 0 would go on"
            )


@dataclass(frozen=True, order=True)
class Usage:
    """How much of a codebook is used: as a share of the codes that could have been."""

    usage: float
    perplexity: float
    used: int
    size: int


def measure(counts: Tensor) -> Usage:
    """The usage in counts of codes int64 (K,), at least one of them above 0.

    A code is in use with at least a hundredth of an equal share. No more codes than vectors could
    have been used, so fewer vectors than codes make no collapse. The perplexity is exp(entropy).
    """
    total, size = int(counts.sum()), len(counts)
    share = counts.double() / total
    used = int((counts >= max(1.0, RARE * total / size)).sum())
    perplexity = float(torch.special.entr(share).sum().exp())
    return Usage(used / min(size, total), perplexity, used, size)


class BadSteps(nn.Module):
    """Counts steps whose loss or gradient was not finite."""

    total: Tensor
    in_a_row: Tensor

    def __init__(self, config: HealthConfig) -> None:
        super().__init__()
        self.limit = config.max_bad_steps
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))
        self.register_buffer("in_a_row", torch.zeros((), dtype=torch.int64))

    def update(self, step: int, lr: float, *, good: bool) -> int:
        """Count a step; how many were bad so far. Raises Unhealthy when too many follow."""
        self.total += not good
        self.in_a_row.copy_(torch.zeros_like(self.in_a_row) if good else self.in_a_row + 1)
        if int(self.in_a_row) >= self.limit:
            raise Unhealthy(
                f"the loss was not finite in {self.limit} steps in a row, up to step {step + 1}; "
                f"lower lr (now {lr:.2g}) or set precision = 'fp32'"
            )
        return int(self.total)


def _outermost(module: nn.Module) -> list[Quantizer]:
    """The quantisers in a module, without those that are inside of another one."""
    if isinstance(module, Quantizer):
        return [module]
    return [quantizer for child in module.children() for quantizer in _outermost(child)]
