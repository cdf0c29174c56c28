"""Parts as HTML: pictures, animations, players and text that stand in the file itself.

A cell is one part, a list of parts side by side, or None (a dash). Media become data URIs: PNG,
animated WebP and 16-bit WAV with a small spectrogram.
"""

import base64
import io
import itertools
import wave
from collections.abc import Sequence

import numpy as np

from mmpt.page.markup import DASH, escape, number, tag
from mmpt.parts import Audio, Image, Part, Text, Video

Cell = Part | str | Sequence[Part | str] | None

SHOWN = 128  # CSS pixels that a small picture is enlarged to
MAX_LOSSLESS = 160_000  # bytes of an animation; larger ones are coded with losses
INK = (186, 92, 170)  # of spectrograms: the hue of speech, seen on light and on dark
NUM_BANDS, MAX_COLUMNS = 48, 320


def render_cell(cell: Cell, label: str, about: str) -> str:
    """A figure with its label; `about` says in words what its row shows, for alt texts."""
    parts = _as_list(cell)
    alt = f"{label}: {about}" if about and label else label or about
    if not parts:
        content = tag("p", DASH, class_="missing", aria_label="none")
    elif len(parts) == 1:
        content = render_part(parts[0], alt)
    else:
        items = [tag("div", render_part(part, alt), class_=f"item {_kind(part)}") for part in parts]
        content = tag("div", *items, class_="flow")
    caption = tag("figcaption", escape(label)) if label else ""
    return tag("figure", caption, content, class_=f"cell {_cell_class(cell)}")


def render_part(part: Part | str, alt: str) -> str:
    """A part, or plain text, as HTML; `alt` says what it shows, for those who cannot see it."""
    if isinstance(part, Image):
        return _picture(picture_uri(part.pixels), part.pixels.shape[:2], alt or "picture")
    if isinstance(part, Video):
        return _animation(part, alt or "clip")
    if isinstance(part, Audio):
        return _player(part, alt or "sound")
    text = part.text if isinstance(part, Text) else part
    if not text:
        return tag("p", "(empty)", class_="missing")
    long = len(text) > 160  # scrolls, so it must take the focus of the keyboard
    focus = {"tabindex": 0, "role": "group", "aria_label": alt or "text"} if long else {}
    return tag("p", escape(text), class_="said", dir="auto", **focus)


def has_media(row: Sequence[Cell]) -> bool:
    """Whether a row holds more than words."""
    return any(not isinstance(part, str | Text) for cell in row for part in _as_list(cell))


def output_kind(row: Sequence[Cell]) -> str:
    """What the last cell of a row is: the type of its part, or "Sequence"."""
    parts = _as_list(row[-1]) if row else []
    return type(parts[0]).__name__ if len(parts) == 1 else "Sequence"


def row_width(row: Sequence[Cell]) -> int:
    """CSS pixels that the cells of a row would like to have side by side."""
    total, after_picture = 0, False
    for cell in row:
        kind = _cell_class(cell).split()[0]
        words = 150 if after_picture else 0  # otherwise they take a line of their own
        widths = {"picture": SHOWN, "sound": 212, "flow-cell": 460, "words": words, "none": 60}
        total += widths[kind] + 14
        after_picture |= kind == "picture"
    return total


def row_words(row: Sequence[Cell]) -> str:
    """The first words of a row, short: they say what its pictures are about."""
    for cell in row:
        for part in _as_list(cell):
            text = part.text if isinstance(part, Text) else part
            if isinstance(text, str) and text.strip():
                line = " ".join(text.split())
                return line if len(line) <= 80 else f"{line[:77]}..."
    return ""


def picture_uri(pixels: np.ndarray) -> str:
    """uint8 (height, width, 3 or 4) as a PNG data URI."""
    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return _data_uri("image/png", buffer.getvalue())


def animation_uri(video: Video) -> str:
    """An animated WebP that loops: lossless unless that is large."""
    import PIL.Image

    first, *rest = [PIL.Image.fromarray(frame) for frame in video.frames]
    for options in ({"lossless": True, "quality": 60}, {"quality": 90}):
        buffer = io.BytesIO()
        milliseconds = max(round(1000 / video.fps), 1)
        first.save(
            buffer,
            "webp",
            save_all=True,
            append_images=rest,
            duration=milliseconds,
            loop=0,
            **options,
        )
        if buffer.tell() <= MAX_LOSSLESS:
            break
    return _data_uri("image/webp", buffer.getvalue())


def sound_uri(audio: Audio) -> str:
    """A 16-bit WAV data URI."""
    samples = np.round(np.clip(audio.wave, -1, 1) * 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(audio.sample_rate)
        file.writeframes(samples.tobytes())
    return _data_uri("audio/wav", buffer.getvalue())


def spectrogram(audio: Audio) -> np.ndarray:
    """uint8 (bands, columns, 4): loudness as opacity over time, low tones below, 60 dB of range."""
    size = max(audio.sample_rate // 40, 64)  # 25 ms
    hop = max(size * 2 // 5, (len(audio.wave) - size) // MAX_COLUMNS + 1)
    padded = np.pad(audio.wave, (0, max(size - len(audio.wave), 0)))
    starts = np.arange(0, len(padded) - size + 1, hop)
    frames = padded[starts[:, None] + np.arange(size)] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames, n=4 * size)) ** 2  # (columns, bins)
    top = min(audio.sample_rate / 2, 8000)
    mel = np.linspace(1127 * np.log1p(60 / 700), 1127 * np.log1p(top / 700), NUM_BANDS + 1)
    edges = (700 * np.expm1(mel / 1127) / audio.sample_rate * 4 * size).astype(int)
    edges = np.maximum.accumulate(np.clip(edges, 0, power.shape[1] - 1))
    bands = np.stack([power[:, a : max(b, a + 1)].mean(1) for a, b in itertools.pairwise(edges)])
    decibels = 10 * np.log10(bands + 1e-12)
    opacity = (
        np.clip((decibels - decibels.max()) / 60 + 1, 0, 1) if bands.max() > 1e-9 else bands * 0
    )
    image = np.empty((*opacity.shape, 4), np.uint8)
    image[..., :3] = INK
    image[..., 3] = np.round(255 * opacity[::-1] ** 1.3)
    return image


def _as_list(cell: Cell) -> list[Part | str]:
    if cell is None:
        return []
    if isinstance(cell, str | Text | Image | Video | Audio):
        return [cell]
    return list(cell)


def _cell_class(cell: Cell) -> str:
    parts = _as_list(cell)
    if len(parts) != 1:
        return "flow-cell" if parts else "none"
    text = parts[0].text if isinstance(parts[0], Text) else parts[0]
    return "words short" if isinstance(text, str) and len(text) <= 60 else _kind(parts[0])


def _kind(part: Part | str) -> str:
    if isinstance(part, Image | Video):
        return "picture"
    return "sound" if isinstance(part, Audio) else "words"


def _picture(uri: str, shape: tuple[int, ...], alt: str) -> str:
    height, width = shape
    scale = max(round(SHOWN / max(width, height)), 1)
    return tag(
        "img",
        src=uri,
        alt=alt,
        width=width * scale,
        height=height * scale,
        class_="pixels" if scale > 1 else None,
    )


def _animation(video: Video, alt: str) -> str:
    """Stands still for people who asked their system for less motion."""
    moving = _picture(animation_uri(video), video.frames.shape[1:3], f"{alt} (animation)")
    still = tag(
        "source", media="(prefers-reduced-motion: reduce)", srcset=picture_uri(video.frames[0])
    )
    return tag("picture", still, moving)


def _player(audio: Audio, alt: str) -> str:
    picture = tag("img", src=picture_uri(spectrogram(audio)), alt="", class_="spectrogram")
    controls = tag("audio", controls=True, preload="metadata", src=sound_uri(audio), aria_label=alt)
    length = tag("p", f"{number(audio.seconds, 1)} s", class_="length")
    return tag("div", picture, controls, length, class_="player")


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
