"""Rotary positions (RoPE, arXiv 2104.09864): queries and keys turn with where they stand.

Legend: B batch, T ids, H heads, W head width.
"""

import math
from dataclasses import dataclass

import torch

from mmpt.model.config import ModelConfig, RopeScaling


@dataclass(frozen=True)
class Rotary:
    """cos and sin (B, T, 1, W / 2) of each position's angles, computed once per pass."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def at(cls, position: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> "Rotary":
        """Angles position * base^(-2i / W), in float32 or better."""
        dtype = torch.promote_types(dtype, torch.float32)
        width = config.width_per_head
        half = torch.arange(0, width, 2, device=position.device, dtype=dtype)
        rate = config.rope_base ** (-half / width)
        if config.rope_scaling is not None:
            rate = _scaled(rate, config.rope_scaling)
        angle = position[:, :, None, None].to(dtype) * rate
        return cls(angle.cos(), angle.sin())

    def turn(self, x_BTHW: torch.Tensor) -> torch.Tensor:
        """Rotate the two halves of each head against each other (RoPE, eq. 34)."""
        a, b = x_BTHW.chunk(2, dim=-1)
        return torch.cat((a * self.cos - b * self.sin, a * self.sin + b * self.cos), dim=-1)


def _scaled(rate: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    # waves that fit often enough into the original context stay, those that hardly do are stretched
    turns = scaling.original_max_position_embeddings * rate / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * rate + (1 - kept) * rate / scaling.factor
