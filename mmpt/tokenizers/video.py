"""Video codec: the image codec inflated in time; one latent for every four frames after the first.

Strictly causal, with a memory of fixed size: the last input of each convolution over latents. The
loop is closed: the encoder holds the decoder, sees what it knows and shows, and codes what is new.
The first frame is the image codec's own path, so an image is a one-frame video.

Legend: B batch, T frames (1 + 4n), c features of the image codec, h w codes, Q codebooks.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from mmpt import hub
from mmpt.config import UserError, from_dict, to_dict, write_atomic
from mmpt.tokenizers.base import FORMAT_VERSION, Codec, load_codec, tensors_of, through
from mmpt.tokenizers.image import FACTOR, ImageCodec, check_pixels
from mmpt.tokenizers.quantize import Quantized
from mmpt.tokenizers.temporal import GROUP as GROUP  # part of this file's interface
from mmpt.tokenizers.temporal import Known, Memory, Temporal
from mmpt.tokenizers.temporal import VideoCodecConfig as VideoCodecConfig
from mmpt.vocab import Modality

OWN_IMAGE = "image"  # folder of the copy of an image codec that has no place of its own


class VideoCodec(Codec):
    """pixels: float (B, T, 3, H, W) in [-1, 1], T = 1 + 4n -> codes int64 (B, 1 + n, h, w, Q).

    A tail of fewer than four frames is filled by repeating its last one.
    """

    kind = "video"
    modality = Modality.VIDEO
    config_class = VideoCodecConfig
    config: VideoCodecConfig

    def __init__(self, config: VideoCodecConfig, image: ImageCodec) -> None:
        if not config.image:
            names = {"image": image.name or OWN_IMAGE, "image_fingerprint": image.fingerprint}
            config = replace(config, **names)
        super().__init__(config)
        self.image = image.requires_grad_(False).eval()
        self.temporal = Temporal(config, image)

    @property
    def codebook_size(self) -> int:
        return self.image.codebook_size

    @property
    def num_codebooks(self) -> int:
        return self.image.num_codebooks

    @property
    def factor(self) -> int:
        """Pixels a side that one code stands for."""
        return self.image.factor

    @property
    def rate(self) -> str:
        return f"{self.image.rate} and {GROUP} frames (the first frame alone)"

    def defining_config(self) -> dict[str, Any]:
        """Without the image codec's name."""
        return {k: v for k, v in to_dict(self.config).items() if k != "image"}

    def defining_tensors(self) -> dict[str, Tensor]:
        """All of it: the encoder sees what is shown, so that the decoder has a part in codes."""
        return tensors_of(self, ("image", "temporal"))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Quantized]:
        """Training pass: the frames but the first rebuilt, (B, T - 1, 3, H, W), and what was coded.

        Latents are (B, 1 + n, D, h, w); the first frame has no part in the loss.
        """
        with torch.no_grad():
            first = self.image.quantize(self.image.encoder(pixels[:, 0]))
            picture = self.image.decoder(self.image.from_latents(first.latents)).clamp(-1, 1)
        known, memory, kernels = self.begin(first.latents, picture), {}, self.kernels()
        coded, frames = [first], []
        for index in range(1, pixels.shape[1], GROUP):
            coded.append(self.quantize(pixels[:, index : index + GROUP], known, memory))
            frames.append(self.show(coded[-1].latents, known, kernels))
        return torch.cat(frames, dim=1), _in_time(coded)

    def begin(self, latents: Tensor, picture: Tensor) -> Known:
        """What is known after the first frame: its latents (B, D, h, w), picture (B, 3, H, W)."""
        memory: Memory = {}
        context = self.temporal.context(latents, None, memory)
        self.temporal.details(picture, context, memory)
        return Known(memory, context, self.look(picture))

    def quantize(self, frames: Tensor, known: Known, memory: Memory) -> Quantized:
        """Four frames (B, 4, 3, H, W) -> latents (B, D, h, w) and codes (B, h, w, Q).

        The latents that the image codec has for their mean, changed by what was learnt.
        """
        seen = torch.cat([frames, frames.mean(dim=1, keepdim=True)], dim=1)
        features = self.look(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
        still = self.image.to_latents(features[:, GROUP])
        raw = still + self.temporal.latents(features, known, memory)
        out = self.image.quantizer(rearrange(raw, "b d h w -> b h w d"))
        out.latents = rearrange(out.latents, "b h w d -> b d h w")
        return out

    def show(self, latents: Tensor, known: Known, kernels: dict[str, Tensor]) -> Tensor:
        """Latents (B, D, h, w) -> four frames (B, 4, 3, H, W), not clipped; then they are known."""
        known.context = self.temporal.context(latents, known.shown, known.memory)
        inputs = self.image.from_latents(latents) + self.temporal.to_input(known.context)
        picture = functional_call(self.image.decoder, kernels, (inputs,))
        frames = self.temporal.frames(picture, known.context, known.memory)
        known.shown = self.look(frames[:, -1].clamp(-1, 1))
        return frames

    @torch.no_grad()
    def look(self, pictures: Tensor) -> Tensor:
        """Pictures (n, 3, H, W) -> image features (n, c, h, w); no gradient goes back."""
        return self.image.encoder(pictures.float())

    def kernels(self) -> dict[str, Tensor]:
        """The kernels of the image decoder that later pictures are drawn with, where changed."""
        adapt = self.temporal.adapt
        return {} if adapt is None else adapt(self.image.decoder)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes (B, 1 + n, h, w, Q): pushing each clip through a stream."""
        check_pixels(pixels, 5, factor=self.factor)
        return torch.stack([through(self.stream(), clip) for clip in pixels])

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels (B, 1 + 4n, 3, H, W) in [-1, 1]: pushing each clip's codes through a stream."""
        codes = self.check_codes(codes, 5)
        return torch.stack([self.decode_stream().push(clip) for clip in codes])

    def stream(self) -> "VideoStream":
        """Frames in, codes out; memory does not grow with length."""
        return VideoStream(self)

    def decode_stream(self) -> "VideoDecodeStream":
        """Codes in, frames out; memory does not grow with length."""
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
    """push(pixels (n, 3, H, W)) -> codes (t, h, w, Q). Units: the first frame; then four frames."""

    def __init__(self, codec: VideoCodec) -> None:
        self.codec = codec
        self.memory: Memory = {}
        self.decoder = VideoDecodeStream(codec)  # so that it knows what is shown
        self._waiting: list[Tensor] = []
        self._size: tuple[int, int] | None = None

    @torch.inference_mode()
    def push(self, pixels: Tensor) -> Tensor:
        """Codes of the units that are complete."""
        codec, factor = self.codec, self.codec.factor
        if len(pixels):
            check_pixels(pixels, 4, factor=factor)
            size = (pixels.shape[-2], pixels.shape[-1])
            if self._size not in (None, size):
                raise UserError(
                    f"frames change their size from {self._size} to {size} (height, width); "
                    "begin a new stream"
                )
            self._size = size
        codes = []
        for frame in pixels.to(codec.device, torch.float32):
            self._waiting.append(frame)
            if self.decoder.known is None or len(self._waiting) == GROUP:
                codes.append(self._unit())
        height, width = (side // factor for side in self._size or (0, 0))
        shape = (0, height, width, codec.num_codebooks)
        return torch.cat([torch.zeros(shape, dtype=torch.int64, device=codec.device), *codes])

    def flush(self) -> Tensor:
        """Codes of the tail, filled by repeating its last frame."""
        if not self._waiting:
            return self.push(torch.zeros((0, 3, *(self._size or (0, 0)))))
        missing = GROUP - len(self._waiting)
        return self.push(self._waiting[-1][None].expand(missing, -1, -1, -1))

    def _unit(self) -> Tensor:
        codec, frames, known = self.codec, torch.stack(self._waiting), self.decoder.known
        self._waiting = []
        with torch.autocast(codec.device.type, enabled=False):
            if known is None:
                codes = codec.image.encode_unit(frames)
            else:
                codes = codec.quantize(frames[None], known, self.memory).codes
        self.decoder.push(codes)
        return codes


class VideoDecodeStream:
    """push(codes (t, h, w, Q)) -> pixels (frames, 3, H, W), one latent at a time."""

    def __init__(self, codec: VideoCodec) -> None:
        self.codec = codec
        self.known: Known | None = None
        self._kernels: dict[str, Tensor] = {}

    @torch.inference_mode()
    def push(self, codes: Tensor) -> Tensor:
        """The frames of every latent handed in: one for the first, four for each other."""
        codec = self.codec
        if len(codes):
            codes = codec.check_codes(codes, 4)
        height, width = (codec.factor * side for side in codes.shape[1:3])
        frames = [torch.zeros((0, 3, height, width), device=codec.device)]
        for unit in codes[:, None]:
            frames.append(self._unit(unit))
        return torch.cat(frames)

    def flush(self) -> None:
        """Nothing waits."""

    def _unit(self, codes: Tensor) -> Tensor:
        codec = self.codec
        with torch.autocast(codec.device.type, enabled=False):
            latents = codec.image.lookup(codes)
            if self.known is None:
                picture = codec.image.decode_unit(codes)
                self.known, self._kernels = codec.begin(latents, picture), codec.kernels()
                return picture
            if latents.shape[2:] != self.known.context.shape[2:]:
                raise UserError(
                    f"codes change their size from {tuple(self.known.context.shape[2:])} to "
                    f"{tuple(latents.shape[2:])} (height, width); begin a new stream"
                )
            return codec.show(latents, self.known, self._kernels)[0].clamp(-1, 1)


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


def _in_time(coded: list[Quantized]) -> Quantized:
    """The latents and codes of a clip; the mean of what the quantiser asks of later frames."""
    parts = {
        name: torch.stack([later.parts[name] for later in coded[1:]]).mean()
        for name in coded[-1].parts
    }
    return Quantized(
        torch.stack([one.latents for one in coded], dim=1),
        torch.stack([one.codes for one in coded], dim=1),
        torch.stack([later.loss for later in coded[1:]]).mean(),
        parts,
    )


def pad_to_factor(pixels: Tensor, factor: int = FACTOR) -> Tensor:
    """Repeat the right and lower edge of (n, 3, H, W) until `factor` divides both sides."""
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % factor, 0, -height % factor), mode="replicate")
