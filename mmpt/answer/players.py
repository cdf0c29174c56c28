"""Codes that become sound or frames as they come; the pieces together are the part, bit for bit."""

from typing import Any

import numpy as np
import torch

from mmpt.answer.rows import Engine
from mmpt.parts import Audio, Video
from mmpt.processor import FPS, unflatten
from mmpt.results import AudioChunk, FramesChunk
from mmpt.tokenizers.image import from_pixels
from mmpt.vocab import Modality


class SoundPlayer:
    """One sound, from one span or several."""

    def __init__(self, engine: Engine) -> None:
        self._codec = engine.codec(Modality.SPEECH)
        self._stream: Any = self._codec.decode_stream()
        self._waves: list[np.ndarray] = []

    def push(self, codes: np.ndarray) -> list[AudioChunk]:
        """Local codes (n Q,) -> what can be heard by now."""
        return self._heard(self._stream.push(unflatten(codes, self._codec.num_codebooks)))

    def flush(self) -> list[AudioChunk]:
        """The rest."""
        return self._heard(self._stream.flush())

    @property
    def part(self) -> Audio:
        """All of it, behind `flush`."""
        return Audio(np.concatenate(self._waves), self._codec.sample_rate)

    def _heard(self, wave: torch.Tensor) -> list[AudioChunk]:
        if not len(wave):
            return []
        self._waves.append(wave.cpu().numpy())
        return [AudioChunk(self._waves[-1], self._codec.sample_rate)]


class FilmPlayer:
    """One clip, by latent frames of h x w ids."""

    def __init__(self, engine: Engine, sides: tuple[int, ...]) -> None:
        self._codec, self._sides = engine.codec(Modality.VIDEO), sides
        self._size, self._shown = int(np.prod(sides)), 0
        self._stream: Any = self._codec.decode_stream()
        self._frames: list[np.ndarray] = []

    def show(self, codes: np.ndarray) -> list[FramesChunk]:
        """Local codes so far, (n,) -> frames of the latents that were not whole before."""
        count = len(codes) // self._size
        if count == self._shown:
            return []
        new = codes[self._shown * self._size : count * self._size]
        self._shown = count
        grid = new.reshape(-1, *self._sides)
        return self._seen(self._stream.push(unflatten(grid, self._codec.num_codebooks)))

    def flush(self) -> list[FramesChunk]:
        """The rest."""
        return self._seen(self._stream.flush())

    @property
    def part(self) -> Video:
        """All of it, behind `flush`."""
        return Video(np.concatenate(self._frames), FPS)

    def _seen(self, pixels: torch.Tensor | None) -> list[FramesChunk]:
        if pixels is None or not len(pixels):
            return []
        self._frames.append(from_pixels(pixels))
        return [FramesChunk(self._frames[-1], FPS)]
