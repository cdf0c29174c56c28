"""Image codec: a light encoder, finite scalar quantisation at an eighth of each side, a decoder.

The encoder sees little (about 40 x 40 pixels a code), so that equal patches get equal codes, which
a language model can predict; the wider decoder sees more and repairs the seams. All norms act on
one position, so that nothing depends on the size of the picture.

Legend: B batch, H W pixels, h w codes (an eighth).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.config import UserError
from mmpt.tokenizers.base import Codec, tensors_of
from mmpt.tokenizers.quantize import FSQ, Quantized
from mmpt.vocab import NUM_SIZES, Modality

PATCH = 4  # pixels a side that the first projection takes
FACTOR = 8  # pixels a side that one code stands for


@dataclass(frozen=True, kw_only=True)
class ImageCodecConfig:
    """levels: FSQ levels, the codebook is their product; widths in channels, blocks per stage."""

    levels: tuple[int, ...] = (8, 8, 8)
    encoder_width: int = 160
    decoder_width: int = 224
    decoder_blocks: int = 3


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


class Encoder(nn.Module):
    """pixels (B, 3, H, W) -> features (B, width, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3 * PATCH**2, width // 2, 1)
        self.fine = Block(width // 2)
        self.down = nn.Conv2d(4 * (width // 2), width, 1)
        self.coarse = nn.Sequential(Block(width, size=1), Block(width), Block(width, size=1))
        self.norm = ChannelNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features before the quantiser's projection."""
        x = self.fine(self.stem(F.pixel_unshuffle(pixels, PATCH)))
        x = self.down(F.pixel_unshuffle(x, FACTOR // PATCH))
        return self.norm(self.coarse(x))


class Decoder(nn.Module):
    """features (B, width, h, w) -> pixels (B, 3, H, W), not clipped."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.coarse = nn.Sequential(*[Block(width) for _ in range(num_blocks)])
        self.up = nn.Conv2d(width, 4 * (width // 2), 1)
        self.fine = nn.Sequential(Block(width // 2), Block(width // 2))
        self.norm = ChannelNorm(width // 2)
        self.head = nn.Conv2d(width // 2, 3 * PATCH**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels, about in [-1, 1]."""
        x = self.fine(F.pixel_shuffle(self.up(self.coarse(x)), FACTOR // PATCH))
        return F.pixel_shuffle(self.head(self.norm(x)), PATCH)


class ImageCodec(Codec):
    """pixels: float (B, 3, H, W) in [-1, 1], sides multiples of 8 -> codes int64 (B, h, w, 1)."""

    kind = "image"
    modality = Modality.IMAGE
    config_class = ImageCodecConfig
    config: ImageCodecConfig

    def __init__(self, config: ImageCodecConfig) -> None:
        super().__init__(config)
        self.quantizer = FSQ(config.levels)
        self.encoder = Encoder(config.encoder_width)
        self.to_latents = nn.Conv2d(config.encoder_width, self.quantizer.width, 1)
        self.from_latents = nn.Conv2d(self.quantizer.width, config.decoder_width, 3, padding=1)
        self.decoder = Decoder(config.decoder_width, config.decoder_blocks)

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def rate(self) -> str:
        return f"1 code per {FACTOR} x {FACTOR} pixels"

    @property
    def bits_per_code(self) -> float:
        """log2 of the codebook."""
        return math.log2(self.codebook_size)

    def code_latents(self) -> Tensor:
        return self.quantizer.lookup(torch.arange(self.codebook_size, device=self.device)[:, None])

    def defining_tensors(self) -> dict[str, Tensor]:
        return tensors_of(self, ("encoder", "to_latents"))

    def quantize(self, features: Tensor) -> Quantized:
        """features (B, C, h, w) -> latents (B, D, h, w) and codes (B, h, w, 1)."""
        out = self.quantizer(rearrange(self.to_latents(features), "b d h w -> b h w d"))
        out.latents = rearrange(out.latents, "b h w d -> b d h w")
        return out

    def lookup(self, codes: Tensor) -> Tensor:
        """The latents (B, D, h, w) of codes (B, h, w, 1)."""
        return rearrange(self.quantizer.lookup(codes), "b h w d -> b d h w")

    def forward(self, pixels: Tensor) -> tuple[Tensor, Quantized]:
        """Training pass: reconstruction (B, 3, H, W) and what was quantised."""
        quantized = self.quantize(self.encoder(pixels))
        return self.decoder(self.from_latents(quantized.latents)), quantized

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes (B, h, w, 1); every picture is one unit, computed alone."""
        check_pixels(pixels, 4)
        return torch.cat([self.encode_unit(picture[None]) for picture in pixels])

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels float (B, 3, H, W) in [-1, 1]; accepts every legal code."""
        codes = self.check_codes(codes, 4)
        return torch.cat([self.decode_unit(unit[None]) for unit in codes])

    def encode_unit(self, pixels: Tensor) -> Tensor:
        """One picture (1, 3, H, W) -> codes (1, h, w, 1): the only path to image codes."""
        with torch.autocast(self.device.type, enabled=False):
            features = self.encoder(pixels.to(self.device, torch.float32))
            return self.quantize(features).codes

    def decode_unit(self, codes: Tensor) -> Tensor:
        """Codes (1, h, w, 1) -> one picture (1, 3, H, W)."""
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.decoder(self.from_latents(self.lookup(codes)))
            return pixels.clamp(-1, 1)

    def stream(self) -> "ImageStream":
        """Pictures in, one picture's codes out at a time."""
        return ImageStream(self)


class ImageStream:
    """push(pixels (n, 3, H, W)) -> codes (n, h, w, 1); pictures are independent units."""

    def __init__(self, codec: ImageCodec) -> None:
        self.codec = codec

    def push(self, pixels: Tensor) -> Tensor:
        """Codes of the pictures handed in."""
        if not len(pixels):
            height, width = (side // FACTOR for side in pixels.shape[-2:])
            return torch.zeros((0, height, width, 1), dtype=torch.int64)
        return self.codec.encode(pixels)

    def flush(self) -> Tensor:
        """Nothing waits between pictures: codes (0, 0, 0, 1)."""
        return torch.zeros((0, 0, 0, 1), dtype=torch.int64)


def check_pixels(pixels: Tensor, num_dims: int) -> None:
    """Refuse pixels of a wrong shape, range or size."""
    height, width = pixels.shape[-2:] if pixels.ndim >= 2 else (0, 0)
    if pixels.ndim != num_dims or pixels.shape[-3] != 3 or pixels.numel() == 0:
        raise UserError(
            f"pixels need {num_dims} dimensions (..., 3, height, width), got {tuple(pixels.shape)}"
        )
    if height % FACTOR or width % FACTOR:
        raise UserError(f"sides {height} x {width} are no multiples of {FACTOR}; pad them")
    if max(height, width) > FACTOR * NUM_SIZES:
        raise UserError(f"sides {height} x {width}: at most {FACTOR * NUM_SIZES} pixels; shrink it")
    if not torch.isfinite(pixels).all() or pixels.abs().max() > 1 + 1e-4:
        raise UserError("pixels must be finite and in [-1, 1]")


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 (n, height, width, 3) -> float (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def from_pixels(pixels: Tensor) -> np.ndarray:
    """float (n, 3, height, width) in [-1, 1] -> uint8 (n, height, width, 3)."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return values.permute(0, 2, 3, 1).contiguous().cpu().numpy()
