"""Reconstruction losses and distances that need no downloaded weights.

Legend: B batch, H W pixels, T mel frames.
"""

import torch
from torch import Tensor


def pixel_loss(made: Tensor, real: Tensor, *, gradient_weight: float = 0.5) -> Tensor:
    """Mean squared error plus the absolute error of the image gradients (keeps edges sharp).

    made, real: float (B, 3, H, W) in [-1, 1].
    """
    error = made.float() - real.float()
    across = error.diff(dim=-1).abs().mean()
    down = error.diff(dim=-2).abs().mean()
    return error.square().mean() + gradient_weight * 0.1 * (across + down)


def mel_loss(made: Tensor, real: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error of log-mel frames and of their change in time, where mask is 1.

    made, real: float (B, T, 80) in nats; mask: float (B, T).
    """
    error = (made.float() - real.float()) * mask[..., None]
    count = mask.sum().clamp(min=1) * made.shape[-1]
    return (error.abs().sum() + 0.5 * error.diff(dim=1).abs().sum()) / count


def psnr(squared_error: Tensor | float) -> float:
    """Peak signal-to-noise ratio in dB of a pooled mean squared error on pixels in [-1, 1]."""
    # the peak is 2
    return float(10 * torch.log10(4 / torch.as_tensor(squared_error, dtype=torch.float64)))
