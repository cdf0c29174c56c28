"""Backbones of image codecs: convolutional and transformer, both at an eighth or a sixteenth.

Nothing in them knows where in the picture it stands: norms act on one position, convolutions and
attention see a bounded neighbourhood. So any height and width that are multiples of the factor
work, equal patches in equal surroundings get equal features wherever they are, and a tile with a
margin of `reach` codes gives what the whole picture gives.

Legend: B batch, H W pixels, h w codes, C channels, a heads, p position in a window, s its source.
"""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 4  # pixels a side that the first projection of the convolutional backbone takes
HEAD = 32  # channels of one attention head
FAR = -1e4  # logit of what is out of reach; finite, for padded positions reach nothing at all


class ChannelNorm(nn.Module):
    """RMS norm over the channels of one position, of (B, C, h, w)."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in fp32."""
        mean = x.float().square().mean(dim=1, keepdim=True)
        return (x.float() * torch.rsqrt(mean + 1e-6) * self.scale).to(x.dtype)


class Block(nn.Module):
    """Pre-norm residual block: two convolutions of `size` x `size`, SiLU between."""

    def __init__(self, width: int, *, size: int = 3) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.first = nn.Conv2d(width, width, size, padding=size // 2)
        self.second = nn.Conv2d(width, width, size, padding=size // 2)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type] # built with a bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> same."""
        return x + self.second(F.silu(self.first(self.norm(x))))


class Backbone(nn.Module):
    """reach: how many codes away, on each side, an output can still depend on."""

    reach: int


class ConvEncoder(Backbone):
    """pixels (B, 3, H, W) -> features (B, width, h, w); few blocks see little, on purpose."""

    def __init__(self, width: int, num_blocks: int, factor: int) -> None:
        super().__init__()
        half = width // 2
        self.stem = nn.Conv2d(3 * PATCH**2, half, 1)
        self.fine = Block(half)
        self.middle = nn.Identity()
        if factor == 4 * PATCH:
            self.middle = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * half, half, 1))
            self.middle.append(Block(half))
        self.down = nn.Conv2d(4 * half, width, 1)
        wide = [Block(width) for _ in range(num_blocks)]
        self.coarse = nn.Sequential(Block(width, size=1), *wide, Block(width, size=1))
        self.norm = ChannelNorm(width)
        # a block reaches two places at its own scale
        pixels = 2 * PATCH + (4 * PATCH if factor == 4 * PATCH else 0)
        self.reach = math.ceil(pixels / factor) + 2 * num_blocks

    def forward(self, pixels: Tensor) -> Tensor:
        """Features before the quantiser's projection."""
        x = self.middle(self.fine(self.stem(F.pixel_unshuffle(pixels, PATCH))))
        return self.norm(self.coarse(self.down(F.pixel_unshuffle(x, 2))))


class ConvDecoder(Backbone):
    """features (B, width, h, w) -> pixels (B, 3, H, W), not clipped."""

    def __init__(self, width: int, num_blocks: int, factor: int) -> None:
        super().__init__()
        half = width // 2
        self.coarse = nn.Sequential(*[Block(width) for _ in range(num_blocks)])
        self.up = nn.Conv2d(width, 4 * half, 1)
        self.middle = nn.Identity()
        if factor == 4 * PATCH:
            self.middle = nn.Sequential(Block(half), nn.Conv2d(half, 4 * half, 1))
            self.middle.append(nn.PixelShuffle(2))
        self.fine = nn.Sequential(Block(half), Block(half))
        self.norm = ChannelNorm(half)
        self.head = nn.Conv2d(half, 3 * PATCH**2, 3, padding=1)
        pixels = 5 * PATCH + (4 * PATCH if factor == 4 * PATCH else 0)
        self.reach = math.ceil(pixels / factor) + 2 * num_blocks

    def forward(self, x: Tensor) -> Tensor:
        """Pixels, about in [-1, 1]."""
        x = self.fine(self.middle(F.pixel_shuffle(self.up(self.coarse(x)), 2)))
        return F.pixel_shuffle(self.head(self.norm(x)), PATCH)


class TransformerEncoder(Backbone):
    """pixels (B, 3, H, W) -> features (B, width, h, w): one token a code."""

    def __init__(self, width: int, num_blocks: int, factor: int, radius: int) -> None:
        super().__init__()
        self.factor = factor
        self.stem = nn.Conv2d(3 * factor**2, width, 1)
        self.blocks = nn.Sequential(*_attention_blocks(width, num_blocks, radius))
        self.norm = ChannelNorm(width)
        self.reach = num_blocks * radius

    def forward(self, pixels: Tensor) -> Tensor:
        """Features before the quantiser's projection."""
        x = self.stem(F.pixel_unshuffle(pixels, self.factor))
        return self.norm(_on_grid(self.blocks, x))


class TransformerDecoder(Backbone):
    """features (B, width, h, w) -> pixels (B, 3, H, W), not clipped."""

    def __init__(self, width: int, num_blocks: int, factor: int, radius: int) -> None:
        super().__init__()
        self.factor = factor
        self.blocks = nn.Sequential(*_attention_blocks(width, num_blocks, radius))
        self.norm = ChannelNorm(width)
        # 3 x 3: neighbours paint both sides of a patch's edge
        self.head = nn.Conv2d(width, 3 * factor**2, 3, padding=1)
        self.reach = num_blocks * radius + 1

    def forward(self, x: Tensor) -> Tensor:
        """Pixels, about in [-1, 1]."""
        return F.pixel_shuffle(self.head(self.norm(_on_grid(self.blocks, x))), self.factor)


class NeighbourAttention(nn.Module):
    """Each position attends to those at most `radius` away on each side (arXiv 2204.07143).

    A learned bias for each offset and head says where; outside the picture there is nothing. The
    work grows with the number of positions: queries go in windows, with their surroundings as keys.
    """

    _offset: Tensor
    _near: Tensor

    def __init__(self, width: int, radius: int) -> None:
        super().__init__()
        self.radius, self.window = radius, 2 * radius
        self.num_heads = width // HEAD
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        span = 2 * radius + 1
        self.bias = nn.Parameter(torch.zeros(self.num_heads, span**2))
        away = torch.arange(self.window + 2 * radius)[None] - torch.arange(self.window)[:, None]
        down = rearrange(away, "py sy -> py 1 sy 1")  # offset of a source + radius, by row
        across = rearrange(away, "px sx -> 1 px 1 sx")
        near = (down >= 0) & (down < span) & (across >= 0) & (across < span)
        offset = (down * span + across).clamp(0, span**2 - 1)
        flat = "py px sy sx -> (py px) (sy sx)"
        self.register_buffer("_offset", rearrange(offset, flat), persistent=False)
        self.register_buffer("_near", rearrange(near, flat), persistent=False)

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """(B, h, w, C) -> same; the other two are what timm's block hands on, and not used."""
        height, width = x.shape[1:3]
        r, size = self.radius, self.window
        below, right = -height % size, -width % size
        q, kv = self.qkv(x).split((x.shape[-1], 2 * x.shape[-1]), dim=-1)
        q = F.pad(q, (0, 0, 0, right, 0, below))
        h, w = q.shape[1] // size, q.shape[2] // size
        q = rearrange(q, "b (h y) (w x) (a d) -> (b h w) a (y x) d", y=size, x=size, d=HEAD)
        k, v = rearrange(
            self._surroundings(F.pad(kv, (0, 0, r, right + r, r, below + r))),
            "b h w (two a d) y x -> two (b h w) a (y x) d",
            two=2,
            d=HEAD,
        )
        made = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(x, below, right))
        made = rearrange(made, "(b h w) a (y x) d -> b (h y) (w x) (a d)", h=h, w=w, y=size)
        return self.project(made[:, :height, :width])

    def _surroundings(self, x: Tensor) -> Tensor:
        size = self.window + 2 * self.radius
        return x.unfold(1, size, self.window).unfold(2, size, self.window)

    def _mask(self, x: Tensor, below: int, right: int) -> Tensor:
        """Logits to add, (B h w, a, p, s)."""
        r = self.radius
        inside = F.pad(x.new_ones(1, *x.shape[1:3]), (r, right + r, r, below + r))
        inside = rearrange(self._surroundings(inside), "1 h w y x -> (h w) 1 1 (y x)")
        bias = self.bias.to(x.dtype)[:, self._offset].masked_fill(~self._near, FAR)
        return repeat(bias + (1 - inside) * FAR, "n a p s -> (b n) a p s", b=x.shape[0])


def _attention_blocks(width: int, num_blocks: int, radius: int) -> list[nn.Module]:
    """timm's pre-norm blocks, whose norms and MLPs take a grid as well as a sequence."""
    from timm.models.vision_transformer import Block as TimmBlock  # seconds to import

    blocks: list[nn.Module] = []
    for _ in range(num_blocks):
        block = TimmBlock(width, width // HEAD)
        block.attn = NeighbourAttention(width, radius)
        blocks.append(block)
    return blocks


def _on_grid(blocks: nn.Module, x: Tensor) -> Tensor:
    return rearrange(blocks(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
