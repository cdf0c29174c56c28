"""Image codec: an encoder, a quantiser at an eighth or a sixteenth of each side, a decoder.

The encoder sees little (the small one about 40 x 40 pixels a code), so that equal patches get equal
codes, which a language model can predict; the wider decoder sees more and repairs the seams.

What a code depends on is bounded, so big pictures go in tiles of one size, each with a margin that
covers all that its codes can see: no seams, and memory that does not grow with the picture.

Legend: B batch, H W pixels, h w codes, Q codebooks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from mmpt.config import UserError, to_dict
from mmpt.tokenizers.backbones import (
    HEAD,
    Backbone,
    ConvDecoder,
    ConvEncoder,
    TransformerDecoder,
    TransformerEncoder,
)
from mmpt.tokenizers.backbones import Block as Block  # the video codec is built of the same
from mmpt.tokenizers.backbones import ChannelNorm as ChannelNorm
from mmpt.tokenizers.base import Codec, tensors_of
from mmpt.tokenizers.quantize import Quantized, QuantizerConfig, build_quantizer
from mmpt.vocab import NUM_SIZES, Modality

FACTOR = 8  # pixels a side that one code of the default codec stands for
TILE = 512  # pixels a side; a bigger picture goes in tiles


def _default_quantizer() -> QuantizerConfig:
    return QuantizerConfig(kind="fsq", levels=(8, 8, 8))


@dataclass(frozen=True, kw_only=True)
class ImageCodecConfig:
    """factor: pixels a side of one code; widths in channels; blocks at the codes' scale.

    radius: codes that one attention block of a transformer sees on each side.
    """

    quantizer: QuantizerConfig = field(default_factory=_default_quantizer)
    backbone: Literal["conv", "transformer"] = "conv"
    factor: Literal[8, 16] = 8
    encoder_width: int = 160
    encoder_blocks: int = 1
    decoder_width: int = 224
    decoder_blocks: int = 3
    radius: int = 4

    def __post_init__(self) -> None:
        if self.factor not in (8, 16):
            raise UserError(f"factor = {self.factor}; choose one of 8, 16")
        unit = HEAD if self.backbone == "transformer" else 2
        for name in ("encoder_width", "decoder_width"):
            width = getattr(self, name)
            if width < unit or width % unit:
                raise UserError(f"{name} = {width}; a {self.backbone} needs a multiple of {unit}")
        for name in ("encoder_blocks", "decoder_blocks", "radius"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; use 1 or more")


class ImageCodec(Codec):
    """pixels: float (B, 3, H, W) in [-1, 1], sides multiples of `factor` -> codes (B, h, w, Q)."""

    kind = "image"
    modality = Modality.IMAGE
    config_class = ImageCodecConfig
    config: ImageCodecConfig

    def __init__(self, config: ImageCodecConfig) -> None:
        super().__init__(config)
        self.quantizer = build_quantizer(config.quantizer)
        self.encoder = _encoder(config)
        self.to_latents = nn.Conv2d(config.encoder_width, self.quantizer.width, 1)
        self.from_latents = nn.Conv2d(self.quantizer.width, config.decoder_width, 3, padding=1)
        self.decoder = _decoder(config)

    @classmethod
    def upgrade(cls, config: dict[str, Any], version: int) -> dict[str, Any]:
        """Format 1 knew finite scalar quantisation only, with its levels at the top."""
        if version < 2 and "levels" in config:
            quantizer = {"kind": "fsq", "levels": config["levels"]}
            config = {k: v for k, v in config.items() if k != "levels"} | {"quantizer": quantizer}
        return config

    @property
    def factor(self) -> int:
        """Pixels a side that one code stands for."""
        return self.config.factor

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def num_codebooks(self) -> int:
        return self.quantizer.num_codebooks

    @property
    def rate(self) -> str:
        count = f"{self.num_codebooks} codes" if self.num_codebooks > 1 else "1 code"
        return f"{count} per {self.factor} x {self.factor} pixels"

    @property
    def bits_per_code(self) -> float:
        """log2 of the codebook."""
        return math.log2(self.codebook_size)

    @property
    def bits_per_pixel(self) -> float:
        """Of all codebooks together."""
        return self.num_codebooks * self.bits_per_code / self.factor**2

    def code_latents(self) -> Tensor:
        if self.num_codebooks > 1:
            return super().code_latents()
        return self.quantizer.lookup(torch.arange(self.codebook_size, device=self.device)[:, None])

    def defining_config(self) -> dict[str, Any]:
        """Without the decoder, and without options of quantisers that are at their default.

        So a quantiser that learns a new option leaves the fingerprints of older codecs alone.
        """
        config, plain = to_dict(self.config), to_dict(QuantizerConfig())
        chosen = {k: v for k, v in config["quantizer"].items() if v != plain[k]}
        unused = {"decoder_width", "decoder_blocks"}
        if self.config.backbone == "conv":
            unused.add("radius")
        defining = {k: v for k, v in config.items() if k not in unused}
        return defining | {"quantizer": {"kind": self.config.quantizer.kind, **chosen}}

    def defining_tensors(self) -> dict[str, Tensor]:
        return tensors_of(self, ("encoder", "to_latents", "quantizer"))

    def quantize(self, features: Tensor) -> Quantized:
        """features (B, C, h, w) -> latents (B, D, h, w) and codes (B, h, w, Q)."""
        out = self.quantizer(rearrange(self.to_latents(features), "b d h w -> b h w d"))
        out.latents = rearrange(out.latents, "b h w d -> b d h w")
        return out

    def lookup(self, codes: Tensor) -> Tensor:
        """The latents (B, D, h, w) of codes (B, h, w, Q)."""
        return rearrange(self.quantizer.lookup(codes), "b h w d -> b d h w")

    def forward(self, pixels: Tensor) -> tuple[Tensor, Quantized]:
        """Training pass: reconstruction (B, 3, H, W) and what was quantised."""
        quantized = self.quantize(self.encoder(pixels))
        return self.decoder(self.from_latents(quantized.latents)), quantized

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes (B, h, w, Q); every picture is one unit, computed alone."""
        check_pixels(pixels, 4, factor=self.factor)
        return torch.cat([self.encode_unit(picture[None]) for picture in pixels])

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels float (B, 3, H, W) in [-1, 1]; accepts every legal code."""
        codes = self.check_codes(codes, 4)
        return torch.cat([self.decode_unit(unit[None]) for unit in codes])

    def encode_unit(self, pixels: Tensor) -> Tensor:
        """One picture (1, 3, H, W) -> codes (1, h, w, Q): the only path to image codes."""
        f = self.factor
        height, width = pixels.shape[-2] // f, pixels.shape[-1] // f
        shape = (1, height, width, self.num_codebooks)
        codes = torch.empty(shape, dtype=torch.int64, device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            for y, x in self._tiles(height, width, self.encoder.reach):
                part = pixels[..., y.start * f : y.stop * f, x.start * f : x.stop * f]
                features = self.encoder(part.to(self.device, torch.float32))
                made = self.quantize(features).codes
                codes[:, y.kept(), x.kept()] = made[:, y.kept_of_own(), x.kept_of_own()]
        return codes

    def decode_unit(self, codes: Tensor) -> Tensor:
        """Codes (1, h, w, Q) -> one picture (1, 3, H, W)."""
        f, (height, width) = self.factor, codes.shape[1:3]
        pixels = torch.empty((1, 3, height * f, width * f), device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            # the first convolution over the latents reaches one further
            for y, x in self._tiles(height, width, self.decoder.reach + 1):
                latents = self.lookup(codes[:, y.start : y.stop, x.start : x.stop])
                made = self.decoder(self.from_latents(latents)).clamp(-1, 1)
                pixels[..., y.kept(f), x.kept(f)] = made[..., y.kept_of_own(f), x.kept_of_own(f)]
        return pixels

    def stream(self) -> "ImageStream":
        """Pictures in, one picture's codes out at a time."""
        return ImageStream(self)

    def _tiles(self, height: int, width: int, reach: int) -> Iterator[tuple["Tile", "Tile"]]:
        size = max(TILE // self.factor, 4 * reach)  # at least half of a tile is kept
        for y in tiles(height, size, reach):
            for x in tiles(width, size, reach):
                yield y, x


class ImageStream:
    """push(pixels (n, 3, H, W)) -> codes (n, h, w, Q); pictures are independent units."""

    def __init__(self, codec: ImageCodec) -> None:
        self.codec = codec

    def push(self, pixels: Tensor) -> Tensor:
        """Codes of the pictures handed in."""
        if not len(pixels):
            height, width = (side // self.codec.factor for side in pixels.shape[-2:])
            return torch.zeros((0, height, width, self.codec.num_codebooks), dtype=torch.int64)
        return self.codec.encode(pixels)

    def flush(self) -> Tensor:
        """Nothing waits between pictures: codes (0, 0, 0, Q)."""
        return torch.zeros((0, 0, 0, self.codec.num_codebooks), dtype=torch.int64)


@dataclass(frozen=True)
class Tile:
    """Codes `start` to `stop` of one axis are computed; those from `first` to `last` are kept."""

    start: int
    stop: int
    first: int
    last: int

    def kept(self, scale: int = 1) -> slice:
        """What is kept, counted along the picture."""
        return slice(self.first * scale, self.last * scale)

    def kept_of_own(self, scale: int = 1) -> slice:
        """What is kept, counted along the tile."""
        return slice((self.first - self.start) * scale, (self.last - self.start) * scale)


def tiles(length: int, size: int, margin: int) -> list[Tile]:
    """Cover `length` codes by tiles of `size`; `margin` or more around what is kept of each.

    All have one shape: the last is moved back to end with the picture.
    """
    if length <= size:
        return [Tile(0, length, 0, length)]
    starts = [*range(0, length - size, size - 2 * margin), length - size]
    # neighbours meet in the middle of what they share
    cuts = [(b + a + size) // 2 for a, b in pairwise(starts)]
    firsts, lasts = [0, *cuts], [*cuts, length]
    return [Tile(s, s + size, a, b) for s, a, b in zip(starts, firsts, lasts, strict=True)]


def check_pixels(pixels: Tensor, num_dims: int, *, factor: int = FACTOR) -> None:
    """Refuse pixels of a wrong shape, range or size."""
    height, width = pixels.shape[-2:] if pixels.ndim >= 2 else (0, 0)
    if pixels.ndim != num_dims or pixels.shape[-3] != 3 or pixels.numel() == 0:
        raise UserError(
            f"pixels need {num_dims} dimensions (..., 3, height, width), got {tuple(pixels.shape)}"
        )
    if height % factor or width % factor:
        raise UserError(f"sides {height} x {width} are no multiples of {factor}; pad them")
    if max(height, width) > factor * NUM_SIZES:
        raise UserError(f"sides {height} x {width}: at most {factor * NUM_SIZES} pixels; shrink it")
    if not torch.isfinite(pixels).all() or pixels.abs().max() > 1 + 1e-4:
        raise UserError("pixels must be finite and in [-1, 1]")


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 (n, height, width, 3) -> float (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def from_pixels(pixels: Tensor) -> np.ndarray:
    """float (n, 3, height, width) in [-1, 1] -> uint8 (n, height, width, 3)."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return values.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _encoder(config: ImageCodecConfig) -> Backbone:
    size = (config.encoder_width, config.encoder_blocks, config.factor)
    if config.backbone == "transformer":
        return TransformerEncoder(*size, config.radius)
    return ConvEncoder(*size)


def _decoder(config: ImageCodecConfig) -> Backbone:
    size = (config.decoder_width, config.decoder_blocks, config.factor)
    if config.backbone == "transformer":
        return TransformerDecoder(*size, config.radius)
    return ConvDecoder(*size)
