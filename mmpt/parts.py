"""What a person hands in and gets back: Text, Image, Video, Audio, and Message.

The same types go in and come out. Loading accepts what users have and refuses the rest in one line;
see `media.py` and `sound.py` for the formats. What was generated carries how it was, and PNG, WebP,
MP4 and WAV files keep that; see `provenance.py`.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal, Self

import numpy as np

from mmpt import media, sound
from mmpt.config import UserError, write_atomic
from mmpt.media import Source

Note = Callable[[], str]  # written when it is asked for: it holds all that a request held

MAX_RATIO = 1000  # of two sample rates, reduced, when sound is resampled


def no_note() -> str:
    """Of what was not generated."""
    return ""


@dataclass(frozen=True)
class Text:
    """A piece of text; `<boi>` and its kin are ordinary characters in it."""

    text: str
    provenance: Note = field(default=no_note, repr=False, compare=False, kw_only=True)

    @classmethod
    def load(cls, source: Source) -> Self:
        """Read UTF-8."""
        return cls(media.read_text(source))

    def save(self, path: str | Path) -> None:
        """Write UTF-8."""
        check_unicode(self.text)
        write_atomic(path, self.text)


@dataclass(frozen=True, eq=False)
class Image:
    """pixels: uint8 (height, width, 3), sRGB."""

    pixels: np.ndarray
    provenance: Note = field(default=no_note, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        _check_array(self.pixels, "pixels", np.uint8, (None, None, 3))

    @classmethod
    def load(cls, source: Source) -> Self:
        """Read any still picture that Pillow reads, upright, alpha composited on white."""
        return cls(media.read_picture(source))

    def save(self, path: str | Path) -> None:
        """Write PNG, or the format that the suffix names."""
        write_atomic(path, self.encode(_suffix(path)))

    def encode(self, suffix: str = ".png") -> bytes:
        """What `save` writes."""
        return media.picture_bytes(self.pixels, suffix, note=self.provenance())

    def _repr_png_(self) -> bytes:
        # notebooks show it; how it was made belongs into files
        return media.picture_bytes(self.pixels, ".png", note="")


@dataclass(frozen=True, eq=False)
class Video:
    """frames: uint8 (num_frames, height, width, 3); fps: frames a second."""

    frames: np.ndarray
    fps: float
    provenance: Note = field(default=no_note, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        _check_array(self.frames, "frames", np.uint8, (None, None, None, 3))
        if not 0 < self.fps <= media.MAX_FPS:
            raise UserError(f"fps = {self.fps}; needs a value above 0 and at most 1000")

    @classmethod
    def load(
        cls, source: Source, *, max_frames: int | None = None, fps: float | None = None
    ) -> Self:
        """Read an animated WebP or GIF, or any film that PyAV decodes; a still is one frame.

        fps: where it is known better than the file knows it.
        """
        return cls(*media.read_video(source, max_frames=max_frames, fps=fps))

    def save(self, path: str | Path) -> None:
        """Write MP4 (H.264), or an animated .webp or .gif."""
        write_atomic(path, self.encode(_suffix(path)))

    def encode(self, suffix: str = ".mp4") -> bytes:
        """What `save` writes."""
        return media.video_bytes(self.frames, self.fps, suffix, note=self.provenance())

    def _repr_html_(self) -> str:
        data = media.video_bytes(self.frames, self.fps, ".webp", note="")
        return f'<img src="{_inline("image/webp", data)}">'


@dataclass(frozen=True, eq=False)
class Audio:
    """wave: float32 (num_samples,), mono in [-1, 1]; sample_rate in Hz."""

    wave: np.ndarray
    sample_rate: int
    provenance: Note = field(default=no_note, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        _check_array(self.wave, "wave", np.float32, (None,))
        sound.check_finite(self.wave, "the sound")
        sound.check_sample_rate(self.sample_rate, "the sound")

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.wave) / self.sample_rate

    @classmethod
    def load(cls, source: Source, *, max_seconds: float = sound.MAX_SECONDS) -> Self:
        """Read what libsndfile reads (WAV, FLAC, Ogg, MP3); all channels are averaged.

        max_seconds: a longer sound is refused.
        """
        return cls(*sound.read_sound(source, max_seconds=max_seconds))

    def resample(self, sample_rate: int) -> "Audio":
        """The same sound at another rate (windowed sinc)."""
        if sample_rate == self.sample_rate:
            return self
        import torch
        import torchaudio.functional as F

        before, after = _small_ratio(self.sample_rate, sample_rate)
        wave = F.resample(torch.from_numpy(self.wave), before, after)
        return Audio(wave.clamp(-1, 1).numpy(), sample_rate)

    def save(self, path: str | Path) -> None:
        """Write 16-bit WAV, or the format that the suffix names."""
        write_atomic(path, self.encode(_suffix(path)))

    def encode(self, suffix: str = ".wav") -> bytes:
        """What `save` writes."""
        return sound.sound_bytes(self.wave, self.sample_rate, suffix, note=self.provenance())

    def _repr_html_(self) -> str:
        data = sound.sound_bytes(self.wave, self.sample_rate, ".wav", note="")
        return f'<audio controls src="{_inline("audio/wav", data)}"></audio>'


Part = Text | Image | Video | Audio


@dataclass(frozen=True)
class Message:
    """What one side said: parts in order."""

    role: Literal["user", "assistant"]
    content: tuple[Part, ...]


def load_part(path: str | Path) -> Part:
    """Load a file as the part that its suffix names; an animated picture is a Video."""
    suffix = _suffix(path)
    if suffix in (".txt", ".md"):
        return Text.load(path)
    if suffix in (".wav", ".flac", ".ogg", ".opus", ".mp3"):
        return Audio.load(path)
    if suffix in (".mp4", ".webm", ".mkv", ".mov", ".avi"):
        return Video.load(path)
    if suffix in (".gif", ".webp", ".png"):
        frames, fps = media.read_animation(path)
        return Video(frames, fps) if len(frames) > 1 else Image(frames[0])
    return Image.load(path)


def check_unicode(text: str) -> None:
    """Refuse a text that has no UTF-8: undecodable arguments of a shell come in like that."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds a lone surrogate at character {error.start}") from None


def _small_ratio(before: int, after: int) -> tuple[int, int]:
    """Two rates of about the same ratio, reduced: at most 1,000, or off by less than 0.1%."""
    sound.check_sample_rate(before, "the sound")
    sound.check_sample_rate(after, "the result")
    # an odd rate such as 44,099 Hz would need a filter of gigabytes
    small, big = sorted((before, after))
    ratio = Fraction(small, big).limit_denominator(MAX_RATIO)
    low, high = ratio.as_integer_ratio()
    return (low, high) if before < after else (high, low)


def _inline(kind: str, data: bytes) -> str:
    """The address of data that stands in a page itself."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _suffix(path: str | Path) -> str:
    return Path(path).suffix.lower()


def _check_array(array: np.ndarray, name: str, dtype: type, shape: tuple[int | None, ...]) -> None:
    kind, sides = getattr(array, "dtype", type(array).__name__), tuple(np.shape(array))
    fits = len(sides) == len(shape) and all(
        want is None or have == want for have, want in zip(sides, shape, strict=True)
    )
    if not isinstance(array, np.ndarray) or not fits or kind != dtype or array.size == 0:
        wanted = ", ".join("n" if side is None else str(side) for side in shape)
        raise UserError(
            f"{name} must be a {dtype.__name__} array ({wanted}), not empty; got {kind} {sides}"
        )
