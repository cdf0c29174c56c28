"""Files <-> arrays: pictures and films in whatever format people have them (`sound.py`: sounds).

Reading accepts palettes, alpha, 16 bits and rotation tags; it bounds what a file can make us
allocate before it decodes, and turns every way that a file can be bad into one line (`UserError`).

Shapes: pixels uint8 (height, width, 3) sRGB; frames uint8 (num_frames, height, width, 3).
"""

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmpt.config import UserError
from mmpt.metadata import add_film_note, picture_options

if TYPE_CHECKING:
    import PIL.Image

log = logging.getLogger(__name__)

MAX_PIXELS = 1 << 26  # of one picture: 64 megapixels
MAX_VIDEO_BYTES = 1 << 30  # of all decoded frames
MAX_FPS = 1000.0

# what FFmpeg may take a film for: playlists, which name other files, are not among them
FILMS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,ivf,m4v,h264,hevc"
ANIMATIONS = (".webp", ".gif")

# Pillow's decoders raise all of these for broken files
BROKEN = (
    OSError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    RuntimeError,
    LookupError,
    ArithmeticError,
    ValueError,
    TypeError,
)

Source = str | Path | bytes


def name_of(source: Source) -> str:
    """What to call a source in a message."""
    return "the data" if isinstance(source, bytes) else str(source)


def bytes_of(source: Source) -> bytes:
    """The content of a source."""
    if isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except (OSError, ValueError) as error:  # a path may not hold a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {source}: {reason}") from None


class NoPictureError(UserError):
    """The data is no picture of any format that Pillow knows."""


def read_text(source: Source) -> str:
    """A UTF-8 text, with or without a byte order mark."""
    try:
        return bytes_of(source).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name_of(source)} is not UTF-8 at byte {error.start}") from None


def read_picture(source: Source) -> np.ndarray:
    """Pixels of any still picture that Pillow reads, upright, alpha composited on white."""
    with open_picture(source) as picture:
        return _to_rgb(picture)


def read_animation(
    source: Source, *, max_frames: int | None = None, fps: float | None = None
) -> tuple[np.ndarray, float]:
    """Frames and fps of what Pillow reads; a still is one frame. Raises NoPictureError.

    A frame that is held longer than others is repeated, so that time runs evenly: at `fps` where
    it is known, else as the shortest frame has it.
    """
    frames: list[np.ndarray] = []
    milliseconds: list[float] = []
    with open_picture(source) as picture:
        import PIL.ImageSequence

        for page in PIL.ImageSequence.Iterator(picture):
            width, height = page.size
            _check_size(width, height, name_of(source))
            _check_video_bytes(len(frames) + 1, height, width, name_of(source))
            frames.append(_to_rgb(page))
            _check_same_size(frames, name_of(source))
            unknown = 1000 / fps if fps else 40.0
            milliseconds.append(max(0.0, page.info.get("duration") or 0) or unknown)
            if len(frames) == max_frames:
                break
    unit = 1000 / fps if fps else min(milliseconds)
    repeats = [max(1, round(time / unit)) for time in milliseconds]
    if sum(repeats) * frames[0].nbytes > MAX_VIDEO_BYTES:
        repeats = [1] * len(frames)
    fps = fps or min(1000 * sum(repeats) / sum(milliseconds), MAX_FPS)
    return np.repeat(np.stack(frames), repeats, axis=0)[:max_frames], fps


def read_video(
    source: Source, *, max_frames: int | None = None, fps: float | None = None
) -> tuple[np.ndarray, float]:
    """Frames and fps of an animated picture, or of any film that PyAV decodes."""
    try:
        return read_animation(source, max_frames=max_frames, fps=fps)
    except NoPictureError:
        frames, own = _read_film(source, max_frames)
        return frames, fps or own


def picture_bytes(pixels: np.ndarray, suffix: str = ".png", *, note: str = "") -> bytes:
    """A picture file of the format that the suffix names; `note`: see `metadata`."""
    import PIL.Image

    kind = {"": "png", "jpg": "jpeg", "tif": "tiff"}.get(suffix.lstrip("."), suffix.lstrip("."))
    buffer, options = io.BytesIO(), picture_options(kind, note)
    try:
        PIL.Image.fromarray(pixels).save(buffer, kind, **options)
    except (KeyError, OSError, ValueError) as error:
        reason = "unknown format" if isinstance(error, KeyError) else error
        raise UserError(
            f"cannot write a picture as {suffix}: {reason}; use .png, .jpg or .webp"
        ) from None
    return buffer.getvalue()


def video_bytes(frames: np.ndarray, fps: float, suffix: str = ".mp4", *, note: str = "") -> bytes:
    """A film as MP4 (H.264), or an animated .webp (without loss) or .gif, or pages in a .tiff.

    Animations hold equal frames as one long frame, which `read_animation` repeats; a clip without
    any motion becomes a still. Only pages keep every frame, but they do not hold the rate.
    `note`: see `metadata`.
    """
    if suffix == ".tiff" or suffix in ANIMATIONS:
        return _animation_bytes(frames, fps, suffix.lstrip("."), note)
    if suffix in ("", ".mp4"):
        return _film_bytes(frames, fps, note)
    raise UserError(f"cannot write a clip as {suffix}; use .mp4, .webp or .gif")


@contextmanager
def open_picture(source: Source) -> "Iterator[PIL.Image.Image]":
    """Open with Pillow; what goes wrong in there or inside the `with` is the file's fault."""
    import PIL.Image

    name, file = name_of(source), io.BytesIO(bytes_of(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, which we refuse, and of strange metadata
            picture = PIL.Image.open(file)
            _check_size(*picture.size, name)
            yield picture
    except UserError:
        raise
    except PIL.UnidentifiedImageError:
        raise NoPictureError(f"{name} is no picture of a known format") from None
    except PIL.Image.DecompressionBombError:
        raise UserError(f"{name} has more than {MAX_PIXELS:,} pixels; shrink it") from None
    except BROKEN as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{name} is a broken picture: {reason or type(error).__name__}") from None


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,}; shrink it")


def _check_video_bytes(num_frames: int, height: int, width: int, name: str) -> None:
    if num_frames * height * width * 3 > MAX_VIDEO_BYTES:
        raise UserError(
            f"{name} needs more than {MAX_VIDEO_BYTES >> 20} MiB of frames; cut or shrink it"
        )


def _check_same_size(frames: Sequence[np.ndarray], name: str) -> None:
    if frames[-1].shape != frames[0].shape:
        raise UserError(f"{name} changes its size at frame {len(frames)}; re-encode it")


def _to_rgb(picture: "PIL.Image.Image") -> np.ndarray:
    import PIL.Image
    import PIL.ImageOps

    picture.load()
    picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = PIL.Image.fromarray(_to_8_bits(np.asarray(picture), picture.mode))
    if picture.mode in ("RGBA", "LA", "PA", "P", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture)
    return np.array(picture.convert("RGB"))


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    values = np.nan_to_num(values.astype(np.float64))
    top = values.max()
    if mode.startswith("I;16") or top > 255:
        scale = 1 / 257  # keep the high byte
    else:
        scale = 255.0 if mode == "F" and top <= 1 else 1.0
    return np.clip(values * scale, 0, 255).astype(np.uint8)


@contextmanager
def open_film(source: Source) -> Iterator[Any]:
    """Open with PyAV; what goes wrong in there or inside the `with` is the file's fault."""
    import av
    from av.error import FFmpegError

    options, file = {"format_whitelist": FILMS, **_limits()}, io.BytesIO(bytes_of(source))
    try:
        with av.open(file, options=options, metadata_errors="ignore") as container:
            yield container
    except UserError:
        raise
    except (FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{name_of(source)} is no picture or film that can be read: {reason}"
        ) from None


def _limits() -> dict[str, str]:
    # on pixels, set before the first frame is decoded
    return {"max_pixels": str(MAX_PIXELS)}


def _read_film(source: Source, max_frames: int | None) -> tuple[np.ndarray, float]:
    name, frames = name_of(source), []
    with open_film(source) as container:
        if not container.streams.video:
            raise UserError(f"{name} has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UserError(f"{name} is coded in a way that FFmpeg does not know")
        stream.codec_context.options = _limits()
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        for picture in _decoded(container, stream, name):
            _check_video_bytes(len(frames) + 1, picture.height, picture.width, name)
            # the angle by which players turn the frame, as phones record it
            turned = np.rot90(picture.to_ndarray(format="rgb24"), picture.rotation // 90)
            frames.append(np.ascontiguousarray(turned))
            _check_same_size(frames, name)
            if len(frames) == max_frames:
                break
    if not frames:
        raise UserError(f"{name} holds no frame that can be decoded")
    return np.stack(frames), min(fps, MAX_FPS)


def _decoded(container, stream, name: str) -> Iterator:
    """Frames up to the place where a cut-off film breaks; what came before is kept."""
    from av.error import FFmpegError

    count = 0
    try:
        for picture in container.decode(stream):
            count += 1
            yield picture
    except FFmpegError as error:
        if count == 0:
            raise
        log.warning("%s breaks after %d frames: %s", name, count, error.strerror)


def _animation_bytes(frames: np.ndarray, fps: float, kind: str, note: str) -> bytes:
    import PIL.Image

    first, *rest = [PIL.Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    options = {"webp": {"lossless": True}, "tiff": {"compression": "tiff_deflate"}}.get(kind, {})
    first.save(
        buffer, kind, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0,
        **options, **picture_options(kind, note),
    )  # fmt: skip
    return buffer.getvalue()


def _film_bytes(frames: np.ndarray, fps: float, note: str) -> bytes:
    import av
    from av.error import FFmpegError

    _, height, width, _ = frames.shape
    # yuv420p halves both sides: an odd one is repeated at its edge
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    rate = max(Fraction(fps).limit_denominator(1000), Fraction(1, 1000))
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as container:
            add_film_note(container.metadata, note)
            stream = container.add_stream("libx264", rate=rate)
            stream.width, stream.height = frames.shape[2], frames.shape[1]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "16"}
            for pixels in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except FFmpegError as error:
        raise UserError(
            f"cannot write a clip of {width} x {height} pixels as MP4: {error.strerror}; "
            "use .webp or shrink it"
        ) from None
    return buffer.getvalue()
