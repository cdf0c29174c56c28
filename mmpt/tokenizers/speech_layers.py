"""The layers of the speech codec: a transformer over one short window, which sees all of it.

Legend: B windows, n places, D width.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn


def transformer(width: int, num_heads: int, num_layers: int) -> nn.Sequential:
    """(B, n, D) -> same."""
    return nn.Sequential(*[Attention(width, num_heads) for _ in range(num_layers)])


def zero_linear(width_in: int, width_out: int) -> nn.Linear:
    """A linear layer that begins as zero, so that what it is added to begins alone."""
    layer = nn.Linear(width_in, width_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def zero_conv(width_in: int, width_out: int, size: int) -> nn.Conv1d:
    """A convolution of the same length that begins as zero."""
    layer = nn.Conv1d(width_in, width_out, size, padding=size // 2)
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Pre-norm transformer layer with rotary positions, over one window."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> same; everything in the window sees everything."""
        qkv = rearrange(self.qkv(self.norm1(x)), "b n (p h d) -> p b h n d", p=3, h=self.num_heads)
        q, k, v = _rotate(qkv[0]), _rotate(qkv[1]), qkv[2]
        # windows are short: the fused attention of PyTorch takes five times as long, backwards
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        mixed = weights.to(v.dtype) @ v
        x = x + self.out(rearrange(mixed, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


def _rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    place = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    speed = 1000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = place[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
