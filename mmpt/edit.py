"""Editing: a part of which a region is made anew while the rest is held fixed.

A region of pixels, frames or samples becomes one of codes: a code is made anew where any of what it
stands for is. Held codes are shown clean to every pass, so the new ones fit them on both sides.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from einops import repeat
from torch.nn import functional as F

from mmpt.config import UserError
from mmpt.parts import Audio, Image, Part, Video
from mmpt.processor import Processor
from mmpt.stream import Segment
from mmpt.tokenizers.video import GROUP
from mmpt.vocab import Modality

GREY = 128  # what a picture is extended by, until it is made


@dataclass(frozen=True, eq=False)
class Edit:
    """A part, and which of it is made anew.

    redo: bool, (height, width) of an image, (num_frames, height, width) of a video, (num_samples,)
    of a sound.
    """

    part: Image | Video | Audio
    redo: np.ndarray
    keeps_size: bool = False  # refuses to be shrunk to what a model reads

    def __post_init__(self) -> None:
        shape = _shape(self.part)
        if self.redo.dtype != bool or self.redo.shape != shape:
            raise UserError(
                f"redo is {self.redo.dtype} {self.redo.shape}; this {type(self.part).__name__} "
                f"needs bool {shape}"
            )
        if not self.redo.any():
            raise UserError("redo is False everywhere: nothing is to be made anew")

    @classmethod
    def box(cls, part: Image | Video, *, top: int, left: int, height: int, width: int) -> "Edit":
        """A rectangle of pixels, in all frames (inpainting)."""
        redo = np.zeros(_shape(part), dtype=bool)
        rows, columns = redo.shape[-2:]
        if min(top, left) < 0 or min(height, width) < 1 or top >= rows or left >= columns:
            raise UserError(
                f"the box {top}, {left}, {height}, {width} (top, left, height, width) lies outside "
                f"of {rows} x {columns} pixels"
            )
        redo[..., top : top + height, left : left + width] = True
        return cls(part, redo)

    @classmethod
    def stretch(cls, part: Video | Audio, *, start: float, stop: float) -> "Edit":
        """A stretch of time, in seconds (infilling)."""
        redo = np.zeros(_shape(part), dtype=bool)
        rate = part.fps if isinstance(part, Video) else part.sample_rate
        seconds = len(redo) / rate
        if not 0 <= start < min(stop, seconds):
            raise UserError(f"{start} to {stop} s is no stretch of {seconds:.2f} s")
        redo[round(start * rate) : max(round(start * rate) + 1, round(stop * rate))] = True
        return cls(part, redo)

    @classmethod
    def extend(
        cls, part: Image, *, top: int = 0, bottom: int = 0, left: int = 0, right: int = 0
    ) -> "Edit":
        """A larger picture around this one, by so many pixels on each side (outpainting)."""
        if min(top, bottom, left, right) < 0:
            raise UserError(f"sides {top}, {bottom}, {left}, {right}: use 0 or more pixels")
        sides = ((top, bottom), (left, right))
        pixels = np.pad(part.pixels, (*sides, (0, 0)), constant_values=GREY)
        redo = np.pad(np.zeros(part.pixels.shape[:2], dtype=bool), sides, constant_values=True)
        return cls(Image(pixels), redo, keeps_size=True)

    def encode(self, processor: Processor) -> tuple[Segment, np.ndarray]:
        """The codes of the part, and which are made anew: bool, of their shape."""
        if self.keeps_size and max(self.redo.shape) > processor.max_side:
            height, width = self.redo.shape
            raise UserError(
                f"the extended picture has {height} x {width} pixels, this model reads at most "
                f"{processor.max_side} a side; shrink the picture first"
            )
        [segment] = processor.encode_parts([self.part])
        books = processor.media[segment.modality].num_codebooks
        grid = (*segment.codes.shape[:-1], segment.codes.shape[-1] // books)
        redo = torch.from_numpy(self.redo).float()
        if isinstance(self.part, Video):
            frames = [redo[:1], *redo[1:].split(GROUP)]
            redo = torch.stack([each.amax(0) for each in frames])
        if isinstance(self.part, Audio):
            redo = _pool_sound(redo, grid[0], self.part, processor)
        else:
            redo = F.adaptive_max_pool2d(redo[None], grid[-2:])[0]
        return segment, repeat((redo > 0).numpy(), "... n -> ... (n q)", q=books)


def parse_edit(part: Part, redo: str) -> Edit:
    """What `redo` says of a part: TOP,LEFT,HEIGHT,WIDTH in pixels, or START,STOP in seconds."""
    try:
        numbers = [float(number) for number in redo.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 4 and isinstance(part, Image | Video):
        names = ("top", "left", "height", "width")
        return Edit.box(part, **{n: int(x) for n, x in zip(names, numbers, strict=True)})
    if len(numbers) == 2 and isinstance(part, Video | Audio):
        return Edit.stretch(part, start=numbers[0], stop=numbers[1])
    raise UserError(
        f"{redo!r} names no region of {type(part).__name__}; use TOP,LEFT,HEIGHT,WIDTH in pixels "
        "of a picture, START,STOP in seconds of a sound, either of a video"
    )


def _shape(part: Image | Video | Audio) -> tuple[int, ...]:
    if isinstance(part, Image):
        return part.pixels.shape[:2]
    return part.frames.shape[:3] if isinstance(part, Video) else part.wave.shape


def _pool_sound(
    redo: torch.Tensor, num_frames: int, part: Audio, processor: Processor
) -> torch.Tensor:
    """float (num_frames,): whether a sample of each code frame, whose last is padded, is chosen."""
    codec: Any = processor.media[Modality.SPEECH]
    samples = Fraction(codec.samples_per_code * part.sample_rate, codec.sample_rate)
    length = max(len(redo), round(num_frames * samples))
    return F.adaptive_max_pool1d(F.pad(redo, (0, length - len(redo)))[None], num_frames)[0]
