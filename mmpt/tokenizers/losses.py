"""Reconstruction losses and distances that need no downloaded weights, and their table in a recipe.

Legend: B batch, C channels, H W pixels, T mel frames.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpt.config import UserError

PEAK = 2.0  # pixels are in [-1, 1]
PICTURE_TERMS = ("l1", "l2", "gradient", "ssim", "features", "lpips")
SSIM_WINDOW = 7  # so that a picture of 32 pixels has three scales, one of 64 four
# of the scales, finest first (Wang et al. 2003, section 3.2)
SSIM_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The weight of each term; 0 leaves it out.

    Of pictures: l1, l2, gradient, ssim, features (a frozen random network, drawn from
    features_seed) and lpips_weight (of the network in the file `lpips`). Of every medium:
    discriminator with its penalty lecam, which begins at the share `discriminator_from` of the
    steps (log-mel frames are pictures of one channel), and quantizer, on top of the weights of the
    quantiser's own terms (commitment, entropy).
    """

    l1: float = 0.0
    l2: float = 1.0
    gradient: float = 0.05
    ssim: float = 0.0
    features: float = 0.0
    features_seed: int = 0
    lpips: str = ""  # a safetensors file, see `Lpips`; none: left out
    lpips_weight: float = 1.0
    quantizer: float = 1.0
    discriminator: float = 0.0  # 0.1 beside lpips; without it that drowns the picture, take 0.01
    discriminator_from: float = 0.7
    discriminator_lr: float = 1e-4
    discriminator_width: int = 64
    lecam: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not (math.isfinite(value) and value >= 0):
                raise UserError(f"loss.{field.name} = {value}; use a number of at least 0")
        if self.discriminator_width < 4 or self.discriminator_width % 4:
            raise UserError(
                f"loss.discriminator_width = {self.discriminator_width}; use a multiple of 4"
            )
        if self.discriminator_from > 1:
            raise UserError(
                f"loss.discriminator_from = {self.discriminator_from}; it is a share of the steps, "
                "at most 1"
            )


def gradient_loss(error: Tensor) -> Tensor:
    """How much an error changes between neighbouring pixels: keeps edges sharp.

    error: float (B, C, H, W), what was made less the original.
    """
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def ssim_loss(made: Tensor, real: Tensor) -> Tensor:
    """1 - SSIM, averaged over up to five scales, each half as fine; 0 where both are equal.

    made, real: float (B, C, H, W) in [-1, 1]. As many scales as hold one window of 7 pixels. The
    scales are averaged with the weights of multi-scale SSIM, not multiplied: a product has no
    gradient where one scale is uncorrelated, and an unbounded one nearby. UserError below 7 pixels.
    """
    fits = int(math.log2(max(min(made.shape[-2:]) / SSIM_WINDOW, 0.5))) + 1
    if min(made.shape[-2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM needs sides of {SSIM_WINDOW} pixels, got {tuple(made.shape[-2:])}")
    weights = SSIM_SCALES[:fits]
    made, real, loss = made.float(), real.float(), made.new_zeros((), dtype=torch.float32)
    for index, weight in enumerate(weights):
        if index:
            made, real = F.avg_pool2d(made, 2), F.avg_pool2d(real, 2)
        loss = loss + weight / sum(weights) * (1 - ssim_map(made, real).mean())
    return loss


def ssim_map(made: Tensor, real: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13) at each place where a 7 x 7 window fits.

    made, real: float (B, C, H, W) in [-1, 1] -> (B, C, H - 6, W - 6), at most 1. The window is
    Gaussian with a deviation of 1.5 pixels.
    """
    low, high = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    made, real = made + PEAK / 2, real + PEAK / 2  # it is defined for light, which is not negative
    with torch.autocast(made.device.type, enabled=False):
        moments = torch.stack([made, real, made * made, real * real, made * real])
        mean_made, mean_real, square_made, square_real, product = _blur(moments)
    variances = square_made - mean_made.square() + square_real - mean_real.square()
    covariance = product - mean_made * mean_real
    light = (2 * mean_made * mean_real + low) / (mean_made.square() + mean_real.square() + low)
    return light * (2 * covariance + high) / (variances + high)


def _blur(maps: Tensor) -> Tensor:
    """(..., H, W) -> (..., H - 6, W - 6): the mean over each window.

    As products with banded matrices, which a processor multiplies faster than it convolves.
    """
    height, width = maps.shape[-2:]
    return _band(height, maps).T @ (maps @ _band(width, maps))


def _band(size: int, like: Tensor) -> Tensor:
    """(size, size - 6), whose column i holds the window that begins at place i."""
    places = torch.arange(size, device=like.device, dtype=like.dtype)
    middles = places[: size - SSIM_WINDOW + 1] + SSIM_WINDOW // 2
    distance = (places[:, None] - middles).abs()
    window = torch.exp(-distance.square() / (2 * 1.5**2)) * (distance <= SSIM_WINDOW // 2)
    return window / window.sum(0)


def mel_loss(made: Tensor, real: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error of log-mel frames and of their change in time, where mask is 1.

    made, real: float (B, T, 80) in nats; mask: float (B, T).
    """
    error = (made.float() - real.float()) * mask[..., None]
    count = mask.sum().clamp(min=1) * made.shape[-1]
    return (error.abs().sum() + 0.5 * error.diff(dim=1).abs().sum()) / count


def psnr(squared_error: Tensor | float) -> float:
    """Peak signal-to-noise ratio in dB of a pooled mean squared error on pixels in [-1, 1]."""
    error = torch.as_tensor(squared_error, dtype=torch.float64)
    return float(10 * torch.log10(PEAK**2 / error))
