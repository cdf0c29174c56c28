"""Pictures of what a codec in training rebuilds: originals above, reconstructions below.

They show held-out media if the shards have any, and go through `encode` and `decode`, as a user's
media do. Sound is drawn as log-mel frames, low frequencies below.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from mmpt.config import write_atomic
from mmpt.parts import Audio, Image, Part, Video
from mmpt.tokenizers.base import Codec
from mmpt.tokenizers.image import from_pixels, to_pixels
from mmpt.tokenizers.vocoder import log_mel

COUNT = {"image": 8, "video": 4, "speech": 4}
UNIT = 16  # pixels; sides are cut to multiples of it, which every codec takes
MAX_SIDE = 256  # pixels of a picture
MAX_FRAMES = 9  # of a clip
MAX_SECONDS = 4  # of a sound
LOUDNESS = (-2.5, 3.0)  # scaled log-mel values that are drawn black and white
GAP = 2  # pixels


class Samples:
    """The first media of the held-out documents, or else of those to train on."""

    def __init__(
        self, codec: Codec, heldout: list[list[Part]], documents: list[list[Part]]
    ) -> None:
        self.codec = codec
        self.media = self._choose(heldout) or self._choose(documents)

    def draw(self, path: Path) -> None:
        """Write a PNG of what the codec rebuilds now."""
        pairs = [self._pair(medium) for medium in self.media]
        if self.codec.kind == "image":
            rows = [_join([pair[side] for pair in pairs], axis=1) for side in (0, 1)]
        else:  # strips, below each other
            rows = [strip for pair in pairs for strip in pair]
        file = io.BytesIO()
        Pillow.fromarray(_join(rows, axis=0)).save(file, "png")
        write_atomic(path, file.getvalue())

    def _choose(self, documents: list[list[Part]]) -> list[np.ndarray]:
        """Frames uint8 (t, h, w, 3), or waves (N,)."""
        parts = [part for parts in documents for part in parts]
        if self.codec.kind == "speech":
            rate = self.codec.sample_rate
            sounds = [p for p in parts if isinstance(p, Audio) and len(p.wave)][: COUNT["speech"]]
            return [sound.resample(rate).wave[: MAX_SECONDS * rate] for sound in sounds]
        if self.codec.kind == "video":
            frames = [p.frames[:MAX_FRAMES] for p in parts if isinstance(p, Video)]
        else:
            frames = [p.pixels[None] for p in parts if isinstance(p, Image)]
            frames += [p.frames[:1] for p in parts if isinstance(p, Video)]
        fit = [clip for clip in map(_cut, frames) if clip.size]
        return fit[: COUNT[self.codec.kind]]

    def _pair(self, medium: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The original and what is rebuilt, as pictures uint8 (height, width, 3)."""
        device = self.codec.device
        if self.codec.kind == "speech":
            wave = torch.from_numpy(medium)[None].to(device)
            made = self.codec.decode(self.codec.encode(wave))
            return _mel_picture(wave), _mel_picture(made[:, : wave.shape[1]])
        real = to_pixels(medium).to(device)
        real = real[None] if self.codec.kind == "video" else real
        made = self.codec.decode(self.codec.encode(real)).reshape(-1, *real.shape[-3:])
        rebuilt = from_pixels(made)[: len(medium)]
        return _join(list(medium), axis=1), _join(list(rebuilt), axis=1)


def _cut(clip: np.ndarray) -> np.ndarray:
    height, width = (min(side, MAX_SIDE) // UNIT * UNIT for side in clip.shape[1:3])
    return clip[:, :height, :width]


def _mel_picture(wave: Tensor) -> np.ndarray:
    low, high = LOUDNESS
    mel = (log_mel(wave)[0].cpu() - low) / (high - low)
    grey = (mel.clamp(0, 1) * 255).round().to(torch.uint8).T.flip(0)
    return grey[..., None].expand(-1, -1, 3).numpy()


def _join(pictures: Sequence[np.ndarray], *, axis: int) -> np.ndarray:
    """Pictures uint8 (h, w, 3) in a line along an axis, with gaps, on white."""
    other = 1 - axis
    size = max(picture.shape[other] for picture in pictures)
    padded = []
    for index, picture in enumerate(pictures):
        room = [(0, 0), (0, 0), (0, 0)]
        room[axis] = (GAP if index else 0, 0)
        room[other] = (0, size - picture.shape[other])
        padded.append(np.pad(picture, room, constant_values=255))
    return np.concatenate(padded, axis=axis)
