"""Video codec: the image codec for the first frame, then one latent for every four frames.

Strictly causal in time. A state at latent resolution says what the decoder knows so far; the
encoder of the next four frames sees the state and codes what is new, so a still background costs
the same code again and again. The first frame's codes are the image codec's, by construction.

Legend: B batch, T frames (1 + 4n), t latents (1 + n), C state width, h w codes (an eighth).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt import hub
from mmpt.config import UserError, from_dict, to_dict, write_atomic
from mmpt.tokenizers.base import FORMAT_VERSION, Codec, load_codec, tensors_of
from mmpt.tokenizers.image import Block, ChannelNorm, ImageCodec, check_pixels
from mmpt.vocab import Modality

OWN_IMAGE = "image"  # folder of the copy of an image codec that has no place of its own
GROUP = 4  # frames that one latent after the first stands for


@dataclass(frozen=True, kw_only=True)
class VideoCodecConfig:
    """image: name and fingerprint of the image codec inside; width of the temporal state."""

    image: str = ""
    image_fingerprint: str = ""
    width: int = 128
    num_blocks: int = 2


class Temporal(nn.Module):
    """What the video codec adds: code the next four frames given the state, and advance it."""

    def __init__(self, config: VideoCodecConfig, image: ImageCodec) -> None:
        super().__init__()
        width, seen = config.width, image.config.encoder_width
        made, latent = image.config.decoder_width, image.quantizer.width
        self.start = nn.Conv2d(latent, width, 3, padding=1)
        self.see = nn.Conv2d(GROUP * seen, width, 1)
        self.encode = nn.Sequential(*[Block(width) for _ in range(config.num_blocks)])
        self.to_latents = nn.Sequential(ChannelNorm(width), nn.Conv2d(width, latent, 1))
        self.from_latents = nn.Conv2d(latent, width, 3, padding=1)
        self.advance = nn.Sequential(*[Block(width) for _ in range(config.num_blocks + 1)])
        self.norm = ChannelNorm(width)
        self.to_frames = nn.Conv2d(width, GROUP * made, 1)

    def latents(self, features: Tensor, state: Tensor) -> Tensor:
        """Image features (B, 4, c, h, w) and state (B, C, h, w) -> latents before rounding."""
        seen = self.see(rearrange(features, "b g c h w -> b (g c) h w"))
        return self.to_latents(self.encode(seen + state))

    def step(self, latents: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Quantised latents -> the next state, and the decoder's input (B, 4, c, h, w)."""
        state = self.norm(self.advance(state + self.from_latents(latents)))
        return state, rearrange(self.to_frames(state), "b (g c) h w -> b g c h w", g=GROUP)


class VideoCodec(Codec):
    """pixels: float (B, T, 3, H, W) in [-1, 1], T = 1 + 4n -> codes int64 (B, 1 + n, h, w, 1).

    A tail of fewer than four frames is filled by repeating its last one.
    """

    kind = "video"
    modality = Modality.VIDEO
    config_class = VideoCodecConfig
    config: VideoCodecConfig

    def __init__(self, config: VideoCodecConfig, image: ImageCodec) -> None:
        if not config.image:
            config = VideoCodecConfig(
                image=image.name or OWN_IMAGE,
                image_fingerprint=image.fingerprint,
                width=config.width,
                num_blocks=config.num_blocks,
            )
        super().__init__(config)
        self.image = image.requires_grad_(False).eval()
        self.temporal = Temporal(config, image)

    @property
    def codebook_size(self) -> int:
        return self.image.codebook_size

    @property
    def rate(self) -> str:
        return f"1 code per 8 x 8 pixels and {GROUP} frames (the first frame alone)"

    def defining_tensors(self) -> dict[str, Tensor]:
        return self.image.defining_tensors() | tensors_of(self, ("temporal",))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Training pass: all frames but the first rebuilt (B, T - 1, 3, H, W), and codes."""
        batch, num_frames = pixels.shape[:2]
        with torch.no_grad():
            features = self.image.encoder(pixels.flatten(0, 1)).unflatten(0, (batch, num_frames))
            first = self.image.quantize(features[:, 0])
        state, frames, codes = self.temporal.start(first.latents), [], [first.codes]
        for index in range(1, num_frames, GROUP):
            raw = self.temporal.latents(features[:, index : index + GROUP], state)
            quantized = self.image.quantizer(rearrange(raw, "b d h w -> b h w d"))
            state, inputs = self.temporal.step(
                rearrange(quantized.latents, "b h w d -> b d h w"), state
            )
            frames.append(inputs)
            codes.append(quantized.codes)
        inputs = torch.cat(frames, dim=1)
        made = self.image.decoder(inputs.flatten(0, 1)).unflatten(0, (batch, num_frames - 1))
        return made, torch.stack(codes, dim=1)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes (B, 1 + n, h, w, 1): pushing each clip through a stream."""
        check_pixels(pixels, 5)
        return torch.stack([_run(self.stream(), clip) for clip in pixels])

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels (B, 1 + 4n, 3, H, W) in [-1, 1]: pushing each clip's codes through a stream."""
        codes = self.check_codes(codes, 5)
        return torch.stack([self.decode_stream().push(clip) for clip in codes])

    def stream(self) -> "VideoStream":
        """Frames in, codes out; memory does not grow with length."""
        return VideoStream(self)

    def decode_stream(self) -> "VideoDecodeStream":
        """Codes in, frames out."""
        return VideoDecodeStream(self)

    def save(self, folder: str | Path) -> None:
        """Write config.json and the temporal weights.

        The image codec stays in its own folder; where it would not be found, a copy is written.
        """
        import safetensors.torch

        folder = Path(folder)
        tensors = {k: v.half().contiguous().cpu() for k, v in self.temporal.state_dict().items()}
        config = {"format_version": FORMAT_VERSION, "kind": self.kind, **to_dict(self.config)}
        write_atomic(folder / "model.safetensors", safetensors.torch.save(tensors))
        write_atomic(folder / "config.json", json.dumps(config, indent=1) + "\n")
        if self.image.fingerprint not in _image_codecs(folder, self.config.image):
            self.image.save(folder / OWN_IMAGE)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Open what `save` wrote, with the image codec beside it."""
        settings = from_dict(VideoCodecConfig, config, where=f"{folder}/config.json")
        found = _image_codecs(folder, settings.image)
        if settings.image_fingerprint not in found:
            raise UserError(
                f"{folder} extends image codec {settings.image} {settings.image_fingerprint}, "
                f"but there is {', '.join(found) or 'none'}; train the video codec again"
            )
        codec = cls(settings, found[settings.image_fingerprint])
        codec.load_weights(folder)
        return codec.eval()

    def load_weights(self, folder: Path) -> None:
        Codec.load_weights(self.temporal, folder)  # type: ignore[arg-type] # any module will do


class VideoStream:
    """push(pixels (n, 3, H, W)) -> codes (t, h, w, 1). Units: the first frame; then four frames."""

    def __init__(self, codec: VideoCodec) -> None:
        self.codec = codec
        self._waiting: list[Tensor] = []
        self._state: Tensor | None = None
        self._size: tuple[int, int] | None = None

    @torch.inference_mode()
    def push(self, pixels: Tensor) -> Tensor:
        """Codes of the units that are complete."""
        if len(pixels):
            check_pixels(pixels, 4)
            size = (pixels.shape[-2], pixels.shape[-1])
            if self._size not in (None, size):
                raise UserError(f"frames change their size from {self._size} to {size}")
            self._size = size
        codes = []
        for frame in pixels.to(self.codec.device, torch.float32):
            self._waiting.append(frame)
            if self._state is None or len(self._waiting) == GROUP:
                codes.append(self._unit())
        height, width = (side // 8 for side in self._size or (0, 0))
        empty = torch.zeros((0, height, width, 1), dtype=torch.int64, device=self.codec.device)
        return torch.cat([empty, *codes])

    def flush(self) -> Tensor:
        """Codes of the tail, filled by repeating its last frame."""
        if not self._waiting:
            return self.push(torch.zeros((0, 3, *(self._size or (0, 0)))))
        missing = GROUP - len(self._waiting)
        return self.push(self._waiting[-1][None].expand(missing, -1, -1, -1))

    def _unit(self) -> Tensor:
        codec, frames = self.codec, torch.stack(self._waiting)
        self._waiting = []
        if self._state is None:
            codes = codec.image.encode_unit(frames)
            self._state = codec.temporal.start(codec.image.lookup(codes))
            return codes
        with torch.autocast(codec.device.type, enabled=False):
            features = codec.image.encoder(frames)[None]
            raw = codec.temporal.latents(features, self._state)
            codes = codec.image.quantizer(rearrange(raw, "b d h w -> b h w d")).codes
            self._state, _ = codec.temporal.step(codec.image.lookup(codes), self._state)
        return codes


class VideoDecodeStream:
    """push(codes (t, h, w, 1)) -> pixels (frames, 3, H, W), one latent at a time."""

    def __init__(self, codec: VideoCodec) -> None:
        self.codec = codec
        self._state: Tensor | None = None

    @torch.inference_mode()
    def push(self, codes: Tensor) -> Tensor:
        """The frames of every latent handed in: one for the first, four for each other."""
        codec = self.codec
        height, width = (8 * side for side in codes.shape[1:3])
        frames = [torch.zeros((0, 3, height, width), device=codec.device)]
        if len(codes):
            codes = codec.check_codes(codes, 4)
        for unit in codes[:, None]:
            if self._state is None:
                self._state = codec.temporal.start(codec.image.lookup(unit))
                frames.append(codec.image.decode_unit(unit))
                continue
            with torch.autocast(codec.device.type, enabled=False):
                latents = codec.image.lookup(unit)
                self._state, inputs = codec.temporal.step(latents, self._state)
                frames.append(codec.image.decoder(inputs[0]).clamp(-1, 1))
        return torch.cat(frames)

    def flush(self) -> None:
        """Nothing waits."""


def _image_codecs(folder: Path, name: str) -> dict[str, ImageCodec]:
    """The image codecs that the video codec in `folder` may mean, by fingerprint."""
    found, places = {}, [folder / OWN_IMAGE, folder.parent / name]
    if hub.holds("tokenizers"):
        places.append(hub.shipped("tokenizers") / name)
    for place in places:
        codec = load_codec(place) if (place / "config.json").is_file() else None
        if isinstance(codec, ImageCodec):
            found.setdefault(codec.fingerprint, codec)
    return found


def _run(stream: VideoStream, pixels: Tensor) -> Tensor:
    return torch.cat([stream.push(pixels), stream.flush()])


def pad_to_factor(pixels: Tensor, factor: int = 8) -> Tensor:
    """Repeat the right and lower edge of (n, 3, H, W) until `factor` divides both sides."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % factor, 0, -height % factor), mode="replicate")
