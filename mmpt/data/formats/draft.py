"""A document that is being put together out of somebody else's format, and what it loses meanwhile.

A part that cannot be used does not stop its document: the reason is kept in `lost`. All that stands
in `parts` has been decoded once, so that what is written can be read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image

from mmpt.config import UserError
from mmpt.data import importers
from mmpt.data.shards import Order
from mmpt.media import picture_bytes
from mmpt.parts import Audio, Image, Video, check_unicode
from mmpt.sound import sound_bytes

Medium = Literal["image", "video", "audio"]

MAX_DOCUMENT_BYTES = 1 << 28  # who reads a document holds all of it
WEBP_QUALITY, WEBP_SIDE = 92, 16_383
# first bytes -> suffix of what is kept as it is
PICTURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"GIF8": "gif"}
SOUNDS = {b"RIFF": "wav", b"fLaC": "flac", b"OggS": "ogg", b"ID3": "mp3", b"\xff": "mp3"}
FILMS = {b"RIFF": "webp", b"GIF8": "gif", b"\x1a\x45\xdf\xa3": "webm"}  # others: mp4


@dataclass(frozen=True)
class LeftOut:
    """A document, or a stretch of a file, that could not be used: where, and why."""

    path: str
    place: int  # row, line or byte, as the format counts
    key: str
    why: str


@dataclass
class Draft:
    """One document; `base` says what it is about (a URL, a path) and decides its split."""

    path: str
    place: int
    base: str
    order: Order = "fixed"
    parts: list[dict[str, Any]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    num_bytes: int = 0

    def text(self, text: str, *, joint: str = "\n\n", **fields: Any) -> None:
        """Add text; it joins a text before it unless it has fields (such as times) of its own."""
        text = text.lstrip("\r\n").rstrip()  # the first line may be indented code
        if not text.strip():
            return
        try:
            check_unicode(text)
        except UserError as error:
            self.lost.append(f"bad text: {error}")
            return
        self._grow(len(text.encode()))
        last = self.parts[-1] if self.parts else {}
        if not fields and last.keys() == {"type", "text"}:
            last["text"] += joint + text
        else:
            self.parts.append({"type": "text", "text": text, **fields})

    def add(
        self, kind: Medium, name: str, fetch: Callable[[], bytes | np.ndarray], **fields: Any
    ) -> None:
        """Add a medium: a file, or pixels uint8 (height, width, 3).

        When it cannot be fetched or decoded, the document goes on without it.
        """
        try:
            data = fetch()
            try:
                pixels = isinstance(data, np.ndarray)
                part = pixels_part(data) if pixels else PARTS[kind](data)
            except UserError as error:
                raise UserError(f"bad {kind}: {name}: {error}") from None
        except UserError as error:
            self.lost.append(str(error))
            return
        self.add_part(part | fields)

    def add_part(self, part: dict[str, Any]) -> None:
        """Add a medium that is a part already."""
        self._grow(len(part["data"]))
        self.parts.append(part)

    def _grow(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self.num_bytes > MAX_DOCUMENT_BYTES:
            limit = MAX_DOCUMENT_BYTES >> 20
            raise UserError(f"too large: {self.base} has more than {limit} MiB; cut it")


Item = Draft | LeftOut
Importer = Callable[[Path, Path | None], Iterator[Item]]


def picture_part(data: bytes) -> dict[str, Any]:
    """PNG, JPEG, WebP and GIF as they are, other pictures as WebP."""
    pixels = Image.load(data).pixels
    suffix = _suffix(data, PICTURES)
    if suffix is None:
        return pixels_part(pixels)
    return {"type": "image", "suffix": suffix, "data": data}


def pixels_part(pixels: np.ndarray) -> dict[str, Any]:
    """A WebP picture of uint8 (height, width, 3)."""
    if max(pixels.shape) > WEBP_SIDE:
        return {"type": "image", "suffix": "png", "data": picture_bytes(pixels)}
    data = importers.encode_webp(PIL.Image.fromarray(pixels), quality=WEBP_QUALITY)
    return {"type": "image", "suffix": "webp", "data": data}


def sound_part(data: bytes) -> dict[str, Any]:
    """WAV, FLAC, Ogg and MP3 as they are, other sounds as FLAC."""
    sound = Audio.load(data)
    suffix = _suffix(data, SOUNDS)
    if suffix is None:
        return wave_part(sound.wave, sound.sample_rate)
    return {"type": "audio", "suffix": suffix, "data": data}


def wave_part(wave: np.ndarray, sample_rate: int) -> dict[str, Any]:
    """A FLAC sound of float32 (num_samples,), 16 bits."""
    return {"type": "audio", "suffix": "flac", "data": sound_bytes(wave, sample_rate, ".flac")}


def film_part(data: bytes) -> dict[str, Any]:
    """A film as it is; all of it is decoded, because one that is too long is found only so."""
    Video.load(data)
    suffix = "avi" if data[8:11] == b"AVI" else _suffix(data, FILMS) or "mp4"
    return {"type": "video", "suffix": suffix, "data": data}


PARTS = {"image": picture_part, "video": film_part, "audio": sound_part}


def _suffix(data: bytes, kinds: dict[bytes, str]) -> str | None:
    return next((suffix for magic, suffix in kinds.items() if data.startswith(magic)), None)
