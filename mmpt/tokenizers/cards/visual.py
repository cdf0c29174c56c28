"""Report cards of pictures and clips: pooled PSNR and SSIM, beside k-means of patches and cubes.

Legend: T frames, H W pixels, t h w codes, Q codebooks.
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mmpt.config import UserError
from mmpt.parts import Image, Part, Video
from mmpt.progress import Bar
from mmpt.tokenizers.base import Codec
from mmpt.tokenizers.cards.baseline import CubeKMeans
from mmpt.tokenizers.cards.system import Block, System, Tally
from mmpt.tokenizers.image import ImageCodec, to_pixels
from mmpt.tokenizers.quantize import Quantized, Quantizer
from mmpt.tokenizers.video import GROUP, VideoCodec, pad_to_factor
from mmpt.vocab import Modality

log = logging.getLogger(__name__)

SMALLEST = 16  # pixels a side: SSIM looks at windows of 11


@dataclass(frozen=True)
class Clip:
    """pixels: float (T, 3, H, W) in [-1, 1], padded to whole codes; frames, height, width: without.

    A picture is a clip of one frame that takes no time.
    """

    pixels: Tensor
    frames: int
    height: int
    width: int
    seconds: float

    def crop(self, pixels: Tensor) -> Tensor:
        """Take the padding away from (T, 3, H, W)."""
        return pixels[: self.frames, :, : self.height, : self.width].contiguous()


def measure_visual(
    codec: Codec, heldout: Sequence[list[Part]], train: Sequence[list[Part]]
) -> dict[str, Block]:
    """The blocks of an image or video codec, by name; "" is the codec.

    Speeds are pictures a second, or multiples of real time.
    """
    factor = codec.factor
    find = _pictures if codec.modality == Modality.IMAGE else _clips
    real, seen = find(heldout, factor), find(train, factor)
    if codec.modality == Modality.IMAGE:
        amount, shared = len(real), {"pictures": len(real)}
    else:
        amount = sum(clip.seconds for clip in real)
        shared = {"clips": len(real), "seconds": amount}
    systems = {"": _codec(codec), "baseline": _baseline(codec, seen)}
    if isinstance(codec, ImageCodec | VideoCodec):
        systems["ceiling"] = _ceiling(codec)
    blocks = {name: _measure(system, real, amount) | shared for name, system in systems.items()}
    unknown = dict.fromkeys(blocks["baseline"]) | {"system": "not known for this codec"}
    return blocks | {"ceiling": blocks.get("ceiling", unknown)}


def _measure(system: System, clips: Sequence[Clip], amount: float) -> Block:
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    tally, pixels = Tally(system), 0
    # pixels span 2; the squared errors of all pixels are pooled before the logarithm
    psnr, ssim = PeakSignalNoiseRatio(2.0), StructuralSimilarityIndexMeasure(data_range=2.0)
    for clip in Bar(clips, desc=system.name):
        made, real = clip.crop(tally.keep(clip.pixels)), clip.crop(clip.pixels)
        psnr.update(made, real)
        ssim.update(made, real)
        pixels += clip.pixels[:, 0].numel()
    block: Block = {
        "system": system.name,
        "bits_per_pixel": tally.bits / pixels if system.sizes else None,
        "psnr": float(cast(Tensor, psnr.compute())),
        "ssim": float(cast(Tensor, ssim.compute())),
    }
    return block | tally.metrics(amount)


def _codec(codec: Codec) -> System:
    sizes = (codec.codebook_size,) * codec.num_codebooks
    if codec.modality == Modality.IMAGE:
        return System(name=codec.name, encode=codec.encode, decode=codec.decode, sizes=sizes)
    return System(
        name=codec.name,
        encode=lambda pixels: codec.encode(pixels[None])[0],
        decode=lambda codes: codec.decode(codes[None])[0],
        sizes=sizes,
    )


def _baseline(codec: Codec, clips: Sequence[Clip]) -> System:
    factor = codec.factor
    cubes = CubeKMeans(factor=factor, group=GROUP)
    cubes.fit([clip.pixels for clip in clips], codec.codebook_size, codec.num_codebooks)
    patch, moving = f"{factor} x {factor}", codec.modality == Modality.VIDEO
    return System(
        name=f"k-means of {patch} patches" + (f" and {GROUP} x {patch} cubes" if moving else ""),
        encode=cubes.encode,
        decode=cubes.decode,
        sizes=cubes.sizes,
        bits=cubes.bits,
    )


def _ceiling(codec: ImageCodec | VideoCodec) -> System:
    """The same encoder and decoder with what the quantiser would have snapped, unsnapped.

    The decoder never saw such latents, but codes are a grid in the space where they lie.
    """
    bare = copy.deepcopy(codec)
    image = bare.image if isinstance(bare, VideoCodec) else bare
    image.quantizer = _Unquantised(image.quantizer)  # type: ignore[assignment] # stands in for one

    def rebuild(pixels: Tensor) -> Tensor:
        frames = [image(pixels[:1])[0]]
        if len(pixels) > 1:
            frames.append(bare(pixels[None])[0][0])
        return torch.cat(frames).clamp(-1, 1)

    return System(
        name=f"{codec.name} without quantiser", encode=lambda pixels: pixels, decode=rebuild
    )


class _Unquantised(nn.Module):
    """Stands in for a quantiser, and hands on what that would have snapped to its codebook."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, latents: Tensor) -> Quantized:
        """Latents (..., D), bounded only."""
        out = self.quantizer(latents)
        out.latents = self.quantizer.bound(latents.float())
        return out


def _pictures(documents: Sequence[list[Part]], factor: int) -> list[Clip]:
    found = [part for parts in documents for part in parts if isinstance(part, Image)]
    return _clips_of([(part.pixels[None], 0.0) for part in found], factor, 1, "pictures")


def _clips(documents: Sequence[list[Part]], factor: int) -> list[Clip]:
    found = [part for parts in documents for part in parts if isinstance(part, Video)]
    clips = [(part.frames, len(part.frames) / part.fps) for part in found]
    return _clips_of(clips, factor, GROUP, "clips")


def _clips_of(found: Sequence[tuple], factor: int, group: int, what: str) -> list[Clip]:
    clips = []
    for frames, seconds in found:
        count, height, width = frames.shape[:3]
        if min(height, width) < SMALLEST:
            continue
        pixels = pad_to_factor(to_pixels(frames), factor)
        # a tail of fewer frames than a code stands for repeats its last one
        late = pixels[-1:].expand(-(count - 1) % group, -1, -1, -1)
        clips.append(Clip(torch.cat([pixels, late]), count, height, width, seconds))
    if not clips:
        raise UserError(
            f"the shards hold no {what} of at least {SMALLEST} x {SMALLEST} pixels; name others"
        )
    if len(clips) < len(found):
        log.warning("%d %s below %d pixels were left out", len(found) - len(clips), what, SMALLEST)
    return clips
