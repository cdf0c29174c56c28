"""Parts of what people have at hand, and parts as JSON that holds all of their content.

Arrays, pictures of Pillow, waves with their rate and files become typed parts; a str is text. In
JSON an array is its bytes, packed: what is read back is equal to the last bit.
"""

import base64
import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmpt.config import UserError
from mmpt.media import MAX_VIDEO_BYTES
from mmpt.parts import Audio, Image, Part, Text, Video, load_part
from mmpt.processor import FPS


def part_of(given: Any) -> Part:
    """The part that a value stands for; UserError names what is taken.

    str: text. pathlib.Path: a file. uint8 (height, width, 3) or a Pillow picture: an image; uint8
    (num_frames, height, width, 3): a video. (samples, rate) or (rate, samples): a sound, float in
    [-1, 1] or int16, (num_samples,) or (num_samples, channels).
    """
    if isinstance(given, Text | Image | Video | Audio):
        return given
    if isinstance(given, str):
        return Text(given)
    if isinstance(given, Path):
        return load_part(given)
    if isinstance(given, np.ndarray) and given.ndim in (3, 4):
        return Image(given) if given.ndim == 3 else Video(given, FPS)
    if isinstance(given, tuple) and len(given) == 2:
        rate, wave = given if isinstance(given[1], np.ndarray) else given[::-1]
        if isinstance(wave, np.ndarray) and isinstance(rate, int | np.integer):
            return Audio(_mono(wave), int(rate))
    if type(given).__module__.startswith("PIL."):
        return Image(_pixels(given))
    what = f"an array {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__
    raise UserError(
        f"{what} is no part; give a str, a Path, a picture, frames, (samples, rate), Text, Image, "
        "Video or Audio"
    )


def part_to_json(part: Part) -> dict[str, Any]:
    """Plain values that hold the whole part."""
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, Image):
        return {"type": "image", "pixels": _pack(part.pixels)}
    if isinstance(part, Video):
        return {"type": "video", "frames": _pack(part.frames), "fps": part.fps}
    return {"type": "audio", "wave": _pack(part.wave), "sample_rate": part.sample_rate}


def part_from_json(data: Mapping[str, Any]) -> Part:
    """The inverse of `part_to_json`. Raises UserError, KeyError or TypeError for anything else."""
    kind = data["type"]
    if kind == "text":
        if not isinstance(data["text"], str):
            raise UserError("a text part holds no text")
        return Text(data["text"])
    if kind == "image":
        return Image(_unpack(data["pixels"], "uint8"))
    if kind == "video":
        return Video(_unpack(data["frames"], "uint8"), data["fps"])
    if kind == "audio":
        return Audio(_unpack(data["wave"], "float32"), data["sample_rate"])
    raise UserError(f"no part of type {kind!r}; use text, image, video or audio")


def redo_to_json(redo: np.ndarray) -> dict[str, Any]:
    """A mask, bool (...)."""
    return _pack(redo)


def redo_from_json(data: Mapping[str, Any]) -> np.ndarray:
    """The inverse of `redo_to_json`."""
    return _unpack(data, "bool")


def _pack(array: np.ndarray) -> dict[str, Any]:
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    data = base64.b64encode(zlib.compress(little.tobytes())).decode("ascii")
    return {"shape": list(array.shape), "zlib": data}


def _unpack(data: Mapping[str, Any], kind: str) -> np.ndarray:
    shape, dtype = data["shape"], np.dtype(kind).newbyteorder("<")
    size = dtype.itemsize
    for side in shape:
        if type(side) is not int or side < 1:
            raise UserError(f"an array of shape {shape}; use whole sides of at least 1")
        size *= side
    if size > MAX_VIDEO_BYTES:
        raise UserError(f"an array of {size:,} bytes; at most {MAX_VIDEO_BYTES:,}")
    try:
        # no further than the shape says, whatever is packed in there
        raw = zlib.decompressobj().decompress(base64.b64decode(data["zlib"], validate=True), size)
        return np.frombuffer(raw, dtype).reshape(shape).astype(kind)
    except (ValueError, zlib.error) as error:
        raise UserError(f"the bytes of an array {shape} are broken: {error}") from None


def _mono(wave: np.ndarray) -> np.ndarray:
    if wave.dtype == np.int16:
        wave = wave / 32_768
    wave = wave.mean(axis=1) if wave.ndim == 2 else wave
    if not np.issubdtype(wave.dtype, np.floating):
        raise UserError(f"a wave of {wave.dtype}; use float in [-1, 1], or int16")
    return wave.astype(np.float32).clip(-1, 1)


def _pixels(picture: Any) -> np.ndarray:
    import PIL.ImageOps

    buffer = io.BytesIO()
    # as a file, which handles palettes, alpha and depth in one way
    PIL.ImageOps.exif_transpose(picture).save(buffer, "tiff")
    return Image.load(buffer.getvalue()).pixels
