"""What a video codec learns: clips."""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mmpt.config import UserError
from mmpt.parts import Part, Video
from mmpt.tokenizers.base import load_codec
from mmpt.tokenizers.image import ImageCodec, to_pixels
from mmpt.tokenizers.losses import pixel_loss
from mmpt.tokenizers.objectives.base import PICTURE, Objective, augment, usable
from mmpt.tokenizers.recipe import CodecRecipe
from mmpt.tokenizers.video import GROUP, VideoCodec

MAX_FRAMES = 1 + 4 * GROUP  # of one training clip


class VideoObjective(Objective):
    """Reconstruct clips; the image codec inside stays as it is."""

    def __init__(self, recipe: CodecRecipe, documents: list[list[Part]]) -> None:
        image = load_codec(recipe.base)
        if not isinstance(image, ImageCodec):
            raise UserError(f"base = {recipe.base!r} must name an image codec")
        self.codec: VideoCodec = VideoCodec(recipe.video, image)
        clips = [p.frames for parts in documents for p in parts if isinstance(p, Video)]
        need = f"clips of {1 + GROUP} or more frames of 64 x 64 pixels"
        clips = [clip if len(clip) > GROUP else clip[:0] for clip in clips]
        self.clips = usable(clips, PICTURE, need)

    def batch(self, generator: np.random.Generator, size: int) -> dict[str, Tensor]:
        shortest = min(len(clip) for clip in self.clips)
        num_frames = min(MAX_FRAMES, 1 + (shortest - 1) // GROUP * GROUP)
        clips = []
        for i in generator.integers(len(self.clips), size=size):
            clip = self.clips[i]
            first = generator.integers(len(clip) - num_frames + 1)
            clip = clip[first : first + num_frames]
            clips.append(augment(clip[::-1] if generator.random() < 0.5 else clip, generator))
        pixels = to_pixels(rearrange(np.stack(clips), "b t h w c -> (b t) h w c"))
        return {"pixels": rearrange(pixels, "(b t) c h w -> b t c h w", b=size)}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        made, codes = self.codec(batch["pixels"])
        real = batch["pixels"][:, 1:]
        return pixel_loss(made.flatten(0, 1), real.flatten(0, 1)), {"used": codes.unique().numel()}

    def trained(self) -> torch.nn.Module:
        return self.codec.temporal
