"""What a video codec learns: clips, and still pictures that are set in motion.

Small sets of clips are soon known by heart, and pictures are many: each moves, turns, grows and
bends along smooth random paths, with its edge repeated around it. Clips are played from anywhere,
at other speeds and backwards.

Legend: T frames, K control points a side.
"""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from mmpt.config import UserError
from mmpt.parts import Image, Part, Video
from mmpt.tokenizers.base import load_codec
from mmpt.tokenizers.image import ImageCodec, to_pixels
from mmpt.tokenizers.objectives.base import (
    PICTURE,
    Objective,
    augment,
    build_adversary,
    usable,
)
from mmpt.tokenizers.objectives.pictures import PictureLoss
from mmpt.tokenizers.recipe import CodecRecipe
from mmpt.tokenizers.video import GROUP, VideoCodec

MAX_FRAMES = 1 + 4 * GROUP  # of one training clip
SPEEDS = (0.5, 1.0, 1.0, 1.5, 2.0)  # at which clips are played


class VideoObjective(Objective):
    """Reconstruct clips; the image codec inside stays as it is.

    The recipe's share `moved` of them are still pictures in motion, if the shards hold any.
    """

    def __init__(self, recipe: CodecRecipe, documents: list[list[Part]]) -> None:
        image = load_codec(recipe.base)
        if not isinstance(image, ImageCodec):
            raise UserError(f"base = {recipe.base!r} must name an image codec")
        self.codec: VideoCodec = VideoCodec(recipe.video, image)
        self.adversary = build_adversary(recipe)
        self.rebuilding = PictureLoss(recipe.loss, self.adversary)
        self.quantizer_weight = recipe.loss.quantizer
        clips = [p.frames for parts in documents for p in parts if isinstance(p, Video)]
        need = f"clips of {1 + GROUP} or more frames of 64 x 64 pixels"
        clips = [clip if len(clip) > GROUP else clip[:0] for clip in clips]
        self.clips = usable(clips, PICTURE, need)
        shortest = min(len(clip) for clip in self.clips)
        self.num_frames = min(MAX_FRAMES, 1 + (shortest - 1) // GROUP * GROUP)
        pictures = [p.pixels for parts in documents for p in parts if isinstance(p, Image)]
        self.pictures = [picture for picture in pictures if picture.shape == PICTURE]
        self.moved = recipe.moved if self.pictures else 0.0

    def batch(self, generator: np.random.Generator, size: int) -> dict[str, Tensor]:
        return {"pixels": torch.stack([self._draw(generator) for _ in range(size)])}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        made, quantized = self.codec(batch["pixels"])
        real = batch["pixels"][:, 1:]
        loss, terms = self.rebuilding(made.flatten(0, 1), real.flatten(0, 1), step)
        terms |= {name: float(value) for name, value in quantized.parts.items()}
        return loss + self.quantizer_weight * quantized.loss, terms

    def trained(self) -> torch.nn.Module:
        return self.codec.temporal

    def _draw(self, generator: np.random.Generator) -> Tensor:
        if generator.random() < self.moved:
            picture = self.pictures[generator.integers(len(self.pictures))]
            return move(picture, self.num_frames, generator)
        clip = play(self.clips[generator.integers(len(self.clips))], self.num_frames, generator)
        return to_pixels(np.ascontiguousarray(augment(clip, generator)))


def play(clip: np.ndarray, num_frames: int, generator: np.random.Generator) -> np.ndarray:
    """Some `num_frames` of the frames (T, h, w, 3), in half of the cases as they follow.

    Else from a random place at a random speed, turning round at the ends.
    """
    last = len(clip) - 1
    if generator.random() < 0.5:
        places = generator.integers(len(clip) - num_frames + 1) + np.arange(num_frames)
    else:
        way = generator.uniform(0, 2 * last) + generator.choice(SPEEDS) * np.arange(num_frames)
        places = last - np.abs(np.round(way).astype(int) % (2 * last) - last)
    return clip[places[::-1] if generator.random() < 0.5 else places]


def move(picture: np.ndarray, num_frames: int, generator: np.random.Generator) -> Tensor:
    """Set uint8 (h, w, 3) in motion: float (num_frames, 3, h, w) in [-1, 1]."""
    pixels = to_pixels(picture[None]).expand(num_frames, -1, -1, -1)
    if generator.random() < 0.5:
        pixels = pixels.flip(-1)
    strength = 0.1 + 0.9 * generator.random() ** 2  # most motion is small
    grid = F.affine_grid(
        torch.from_numpy(_poses(num_frames, strength, generator)).float(),
        list(pixels.shape),
        align_corners=False,
    )
    if generator.random() < 0.6:
        grid = grid + _bends(num_frames, strength, picture.shape, generator)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _poses(num_frames: int, strength: float, generator: np.random.Generator) -> np.ndarray:
    """Affine maps (T, 2, 3) from places in the frame to places in the picture, both in [-1, 1]."""

    def path(chance: float, most: float) -> np.ndarray:
        size = strength * most * generator.random() if generator.random() < chance else 0.0
        return size * _waves((), num_frames, generator)

    across, down, turn, zoom = path(0.6, 0.3), path(0.6, 0.3), path(0.5, 0.5), path(0.4, 0.3)
    squash, shear = path(0.4, 0.25), path(0.3, 0.3)
    down = down - (np.abs(path(1.0, 0.4)) if generator.random() < 0.25 else 0.0)  # it bounces
    angle = turn + 0.1 * generator.normal()
    scale = generator.uniform(0.85, 1.25) / (1 + zoom)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    rows = [[cos * (1 + squash), shear - sin, across], [sin, cos * (1 - squash), down]]
    return rearrange(np.array(rows), "row column t -> t row column")


def _bends(
    num_frames: int, strength: float, shape: tuple[int, ...], generator: np.random.Generator
) -> Tensor:
    """A smooth field of displacements (T, h, w, 2) between a few control points that swing."""
    count = int(generator.integers(3, 6))
    amount = strength * generator.uniform(0.03, 0.15)
    field = np.zeros((2, count, count, num_frames))
    for weight in (1.0, 0.5):
        swing = _waves((2, 1, 1), num_frames, generator)
        field += weight * amount * generator.normal(size=(2, count, count, 1)) * swing
    points = torch.from_numpy(rearrange(field, "d y x t -> t d y x")).float()
    dense = F.interpolate(points, size=shape[:2], mode="bicubic", align_corners=True)
    return rearrange(dense, "t d y x -> t y x d")


def _waves(shape: tuple[int, ...], num_frames: int, generator: np.random.Generator) -> np.ndarray:
    """Sines of random period (6 to 50 frames) and phase, (*shape, T)."""
    period = np.exp(generator.uniform(np.log(6), np.log(50), shape))[..., None]
    phase = generator.uniform(0, 2 * np.pi, shape)[..., None]
    return np.sin(2 * np.pi * np.arange(num_frames) / period + phase)
