"""What a step computes: floating-point operations by medium, and the most that a device can do."""

import time
from collections.abc import Sequence
from functools import cache

import torch

from mmpt.model.transformer import Decoder
from mmpt.stream import Rows
from mmpt.vocab import Modality

PEAK_SECONDS = 0.2  # that the peak is measured for


def count_ids(rows: Sequence[Rows]) -> torch.Tensor:
    """float64 (2, 4): ids by modality without pads, and the keys that they see together."""
    total = torch.zeros(2, len(Modality), dtype=torch.float64)
    for each in rows:
        inside = each.document >= 0
        modality = each.modality[inside]
        total[0] += torch.bincount(modality, minlength=len(Modality))
        total[1].index_add_(0, modality, each.position[inside].double() + 1)
    return total


class Flops:
    """Operations of a model's training steps: three forward passes for ids that weights learn from.

    Where noisy ids alone are learned from, clean ones are read, once.
    """

    def __init__(self, model: Decoder) -> None:
        self._frozen = model.frozen_clean
        self._clean, self._noisy = torch.zeros(2, 2, len(Modality), dtype=torch.float64)
        for modality in Modality:
            self._clean[:, modality] = _line(model, modality, noisy=False)
            if int(model.groups[1, modality]) < len(model.config.groups):
                self._noisy[:, modality] = _line(model, modality, noisy=True)

    def of_step(self, read: torch.Tensor, noisy: torch.Tensor) -> dict[str, int]:
        """By medium, from `count_ids` of a step and how many noisy ids, float64 (4), stood beside.

        A noisy id counts as seeing as many keys as the clean ids of its medium.
        """
        ids, keys = read
        passes = 1 if self._frozen else 3
        clean = passes * (self._clean[0] * ids + self._clean[1] * keys)
        mean = keys / ids.clamp(min=1)
        total = clean + 3 * noisy * (self._noisy[0] + self._noisy[1] * mean)
        return {m.name.lower(): int(total[m]) for m in Modality if total[m]}


@cache
def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of some; measured once."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in "ab")
    best, began = float("inf"), time.monotonic()
    while best == float("inf") or time.monotonic() - began < PEAK_SECONDS:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _line(model: Decoder, modality: Modality, *, noisy: bool) -> torch.Tensor:
    """Of one id and forward pass: operations without any key, and per key."""
    base = model.flops_per_token(modality, noisy=noisy)
    return torch.tensor(
        [base, model.flops_per_token(modality, context=1, noisy=noisy) - base], dtype=torch.float64
    )
