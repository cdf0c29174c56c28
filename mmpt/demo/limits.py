"""What a visitor may send, and how much of it: the demo reads no file that is larger.

Whatever is refused is refused in a sentence. Media are shrunk as they come in: what is kept for a
conversation is little, however large the file was.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from mmpt.config import UserError, from_dict
from mmpt.media import open_film, open_picture
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.processor import FPS
from mmpt.results import Settings

SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3")
FILMS = (".mp4", ".webm", ".mkv", ".mov", ".avi")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TEXTS = (".txt", ".md")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one visitor unless said otherwise. Bytes, seconds, pixels, characters."""

    upload: int = 16 << 20  # bytes of a file
    files: int = 4  # of a message
    characters: int = 4000
    pixels: int = 25_000_000  # of a picture; a phone's has 12 million
    frames: int = 128 << 20  # bytes of a clip's decoded frames
    sound: float = 30.0  # seconds
    clip: float = 4.0  # seconds that are kept
    side: int = 256  # pixels that pictures are shrunk to
    turns: int = 40  # of a conversation; older ones are forgotten
    kept: int = 32 << 20  # bytes of its media
    visitors: int = 64  # whose conversations are kept
    requests: int = 600  # a minute, that change something, of one address
    queue: int = 48  # requests that wait, of all visitors
    answers: int = 16  # at once, of all visitors
    folder: int = 1 << 30  # bytes of all files that were uploaded and not yet removed
    body: int = 1 << 20  # bytes of a request that is no upload
    # the largest settings
    max_ids: int = 512
    max_seconds: float = 20.0
    frames_made: int = 33
    pixels_made: int = 256  # of a side
    num_passes: int = 64
    context: int = 2048


# two at once would take twice the memory
_reading = Lock()


def read_files(paths: Sequence[Path], limits: Limits) -> list[Part]:
    """The parts that files hold. Raises UserError in one line for what is too much, or broken."""
    if len(paths) > limits.files:
        raise UserError(f"{len(paths)} files at once; at most {limits.files}")
    with _reading:
        return [read_file(path, limits) for path in paths]


def read_file(path: Path, limits: Limits) -> Part:
    """One part; a message names the file, and never where it is."""
    suffix = path.suffix.lower()
    try:
        size = path.stat().st_size
        if size > limits.upload:
            raise UserError(f"it has {size >> 20} MiB; at most {limits.upload >> 20}")
        if suffix in TEXTS:
            return check_text(Text.load(path).text, limits)
        if suffix in SOUNDS:
            return Audio.load(path, max_seconds=limits.sound)
        if suffix in (*PICTURES, *FILMS):
            return _read_frames(path, limits)
        raise UserError("it is no picture, sound, clip or text; use PNG, JPEG, WAV, MP4 or TXT")
    except OSError:
        raise UserError(f"{path.name}: it is gone; add it again") from None
    except UserError as error:
        raise UserError(f"{path.name}: {str(error).replace(str(path), 'it')}") from None


def check_text(text: str, limits: Limits) -> Text:
    """A text that is not too long."""
    if len(text) > limits.characters:
        raise UserError(f"{len(text):,} characters; at most {limits.characters:,}")
    return Text(text)


def check_settings(values: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Settings of an answer that takes no more than it may. Raises UserError for others."""
    chosen = from_dict(Settings, values, where="settings")
    most = {
        "max_ids": limits.max_ids,
        "max_seconds": limits.max_seconds,
        "frames": limits.frames_made,
        "height": limits.pixels_made,
        "width": limits.pixels_made,
        "num_passes": limits.num_passes,
        "corrections": 4,
    }
    for name, bound in most.items():
        if getattr(chosen, name) > bound:
            raise UserError(f"{name} = {getattr(chosen, name)}; the demo makes at most {bound}")
    # a conversation may be long: what is seen of it is not
    context = min(chosen.context or limits.context, limits.context)
    known = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
    return known | {"context": context}


def read_seed(text: str | None) -> int:
    """A whole number; another one each time where nothing is written."""
    said = (text or "").strip()
    if not said:
        return secrets.randbelow(1_000_000)
    if not (said.isascii() and said.isdigit() and len(said) <= 18):
        raise UserError(f"seed = {said[:40]!r}; write a whole number from 0 on, or nothing")
    return int(said)


def _read_frames(path: Path, limits: Limits) -> Image | Video:
    suffix = path.suffix.lower()
    if suffix in FILMS:
        with open_film(path) as film:
            sizes = [(stream.width, stream.height) for stream in film.streams.video]
        width, height = sizes[0] if sizes else (1, 1)
    else:
        with open_picture(path) as picture:
            width, height = picture.size
    if width * height > limits.pixels:
        raise UserError(f"it has {width} x {height} pixels; at most {limits.pixels:,}")
    most = limits.frames // max(1, 3 * width * height)
    if not most:
        raise UserError(f"a clip of {width} x {height} pixels is too large; shrink it")
    if suffix not in (*FILMS, ".gif", ".webp", ".png"):
        return shrink(Image.load(path), limits)
    clip = Video.load(path, max_frames=most)
    if suffix not in FILMS and len(clip.frames) == 1:
        return shrink(Image(clip.frames[0]), limits)
    return shrink(clip, limits)


def shrink(part: Image | Video, limits: Limits) -> Image | Video:
    """The same with sides of at most `limits.side` pixels, and no more frames than are used."""
    if isinstance(part, Image):
        return Image(_fit(part.pixels, limits))
    count = min(len(part.frames) / part.fps, limits.clip) * FPS
    times = np.arange(max(1, round(count))) * part.fps / FPS
    frames = part.frames[times.astype(int).clip(max=len(part.frames) - 1)]
    return Video(np.stack([_fit(frame, limits) for frame in frames]), FPS)


def _fit(pixels: np.ndarray, limits: Limits) -> np.ndarray:
    import PIL.Image

    if max(pixels.shape[:2]) <= limits.side:
        return pixels
    picture = PIL.Image.fromarray(pixels)
    picture.thumbnail((limits.side, limits.side))
    return np.asarray(picture)
