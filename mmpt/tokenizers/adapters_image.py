"""Codecs of pictures from `transformers`: Emu3's and Chameleon's; see `adapters`.

Legend: B batch, T frames, H W pixels, t h w codes, K codes of the codebook, D width of a code.
"""

import abc
import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mmpt.config import UserError
from mmpt.tokenizers.adapters import Adapter, AdapterConfig
from mmpt.vocab import NUM_SIZES, Modality


class PictureAdapter(Adapter):
    """pixels: float (B, 3, H, W) in [-1, 1] -> codes int64 (B, h, w, 1)."""

    modality = Modality.IMAGE

    def __init__(self, config: AdapterConfig, model: nn.Module) -> None:
        super().__init__(config, model)
        if config.num_codebooks > 1:
            raise UserError(f"num_codebooks = {config.num_codebooks}; {self.kind} has a single one")

    @property
    def factor(self) -> int:
        """Pixels a side that one code stands for."""
        return 2 ** (len(self.model.config.channel_multiplier) - 1)

    @property
    def rate(self) -> str:
        return f"1 code per {self.factor} x {self.factor} pixels"

    @property
    def bits_per_code(self) -> float:
        """log2 of the codebook."""
        return math.log2(self.codebook_size)

    def codebooks(self) -> list[Tensor]:
        return [self.model.quantize.embedding.weight]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes (B, h, w, 1); every picture is one unit, computed alone."""
        self._check(pixels, 4)
        with torch.autocast(self.device.type, enabled=False):
            codes = [self._encode(self._theirs(picture[None])) for picture in pixels]
        return torch.cat(codes)[..., None]

    @abc.abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor:
        """One picture (1, 3, H, W), scaled as the model wants it -> codes (1, h, w)."""

    def stream(self) -> "PictureStream":
        """Pictures in, one picture's codes out at a time."""
        return PictureStream(self)

    def _theirs(self, pixels: Tensor) -> Tensor:
        scale, mean, std = self._scaling()
        values = (pixels.to(self.device, torch.float32) + 1) * 127.5
        return (values * scale - mean) / std

    def _ours(self, pixels: Tensor) -> Tensor:
        scale, mean, std = self._scaling()
        return ((pixels * std + mean) / scale / 127.5 - 1).clamp(-1, 1)

    def _scaling(self) -> tuple[float, Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, device=self.device).reshape(3, 1, 1)
            for values in (self.config.mean, self.config.std)
        )
        return self.config.rescale, mean, std

    def _check(self, pixels: Tensor, num_dims: int) -> None:
        if pixels.ndim != num_dims or pixels.shape[-3] != 3 or pixels.numel() == 0:
            raise UserError(
                f"pixels need {num_dims} dimensions (..., 3, height, width), "
                f"got {tuple(pixels.shape)}"
            )
        height, width = pixels.shape[-2:]
        if height % self.factor or width % self.factor:
            raise UserError(f"sides {height} x {width} are no multiples of {self.factor}; pad them")
        if max(height, width) > self.factor * NUM_SIZES:
            most = self.factor * NUM_SIZES
            raise UserError(f"sides {height} x {width}: at most {most} pixels; shrink it")
        if not torch.isfinite(pixels).all() or pixels.abs().max() > 1 + 1e-4:
            raise UserError("pixels must be finite and in [-1, 1]")


class Emu3Codec(PictureAdapter):
    """The picture tokenizer of Emu3 (arXiv 2409.18869); it codes frames four by four as well.

    pixels (B, 3, H, W) -> codes (B, h, w, 1), or (B, 4 t, 3, H, W) -> (B, t, h, w, 1). A picture
    is four equal frames, of which decoding shows the first. Frames are no stream: a later group
    depends on all of the clip before it.
    """

    kind = "emu3"
    model_class = "emu3.modeling_emu3:Emu3VQVAE"
    defining = ("encoder", "quant_conv", "quantize")

    @property
    def group(self) -> int:
        """Frames that one latent frame stands for."""
        return int(self.model.config.temporal_downsample_factor)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        if pixels.ndim != 5:
            return super().encode(pixels)
        self._check(pixels, 5)
        if pixels.shape[1] % self.group:
            raise UserError(
                f"{pixels.shape[1]} frames; use a multiple of {self.group}, or repeat the last one"
            )
        with torch.autocast(self.device.type, enabled=False):
            codes = [self._encode_frames(self._theirs(clip[None])) for clip in pixels]
        return torch.cat(codes)[..., None]

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) of codes (B, h, w, 1), or (B, 4 t, 3, H, W) of (B, t, h, w, 1)."""
        codes = self.check_codes(codes, 5 if codes.ndim == 5 else 4)[..., 0]
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self._ours(self.model.decode(unit[None])) for unit in codes])

    def _encode(self, pixels: Tensor) -> Tensor:
        frames = repeat(pixels, "b c h w -> b g c h w", g=self.group)
        return self._encode_frames(frames)[:, 0]

    def _encode_frames(self, frames: Tensor) -> Tensor:
        # as the model's own `encode`, which would crop a clip as if its frames were rows
        features = rearrange(self.model.encoder(frames), "b t c h w -> b c t h w")
        latents = rearrange(self.model.quant_conv(features), "b c t h w -> b t c h w")
        return self.model.quantize(latents)


class ChameleonCodec(PictureAdapter):
    """The picture tokenizer of Chameleon (arXiv 2405.09818), which only encodes.

    `transformers` has no decoder for it, so `decode` is refused.
    """

    kind = "chameleon"
    model_class = "chameleon.modeling_chameleon:ChameleonVQVAE"
    defining = ("encoder", "quant_conv", "quantize")

    def decode(self, codes: Tensor) -> Tensor:
        """Raises UserError: there is no decoder."""
        self.check_codes(codes, 4)
        raise UserError(
            "transformers has no decoder for Chameleon's codes; "
            "use another image tokenizer where pictures are to be made"
        )

    def _encode(self, pixels: Tensor) -> Tensor:
        height, width = (side // self.factor for side in pixels.shape[-2:])
        indices = self.model.encode(pixels).image_tokens
        return rearrange(indices, "(b h w) -> b h w", h=height, w=width)


class PictureStream:
    """push(pixels (n, 3, H, W)) -> codes (n, h, w, 1); pictures are independent units."""

    def __init__(self, codec: PictureAdapter) -> None:
        self.codec = codec

    def push(self, pixels: Tensor) -> Tensor:
        """Codes of the pictures handed in."""
        if len(pixels):
            return self.codec.encode(pixels)
        height, width = (side // self.codec.factor for side in pixels.shape[-2:])
        return torch.zeros((0, height, width, 1), dtype=torch.int64)

    def flush(self) -> Tensor:
        """Nothing waits between pictures: codes (0, 0, 0, 1)."""
        return torch.zeros((0, 0, 0, 1), dtype=torch.int64)
