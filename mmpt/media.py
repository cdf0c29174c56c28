"""Files <-> arrays: pictures, films and sounds in whatever format people have them.

Reading accepts palettes, alpha, 16 bits, rotation tags, many channels and any usual rate; it bounds
what a file can make us allocate before it decodes, and turns every way that a file can be bad into
one line (`UserError`).

Shapes: pixels uint8 (height, width, 3) sRGB; frames uint8 (num_frames, height, width, 3); wave
float32 (num_samples,) mono in [-1, 1].
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
from typing import TYPE_CHECKING

import numpy as np

from mmpt.config import UserError

if TYPE_CHECKING:
    import PIL.Image

log = logging.getLogger(__name__)

MAX_PIXELS = 1 << 26  # of one picture: 64 megapixels
MAX_VIDEO_BYTES = 1 << 30  # of all decoded frames
MAX_SECONDS = 3600  # of one sound
MAX_SAMPLES = MAX_SECONDS * 48_000
SAMPLE_RATES = (1000, 384_000)
MAX_FPS = 1000.0
BLOCK = 1 << 18  # samples of each channel that are read at once

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


class NoPictureError(UserError):
    """The data is no picture of any format that Pillow knows."""


def read_text(source: Source) -> str:
    """A UTF-8 text, with or without a byte order mark."""
    try:
        return _as_file(source).read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{_name(source)} is not UTF-8 at byte {error.start}") from None


def read_picture(source: Source) -> np.ndarray:
    """Pixels of any still picture that Pillow reads, upright, alpha composited on white."""
    with _picture(source) as picture:
        return _to_rgb(picture)


def read_animation(source: Source, *, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """Frames and fps of what Pillow reads; a still is one frame. Raises NoPictureError.

    A frame that is held longer than the shortest one is repeated, so that time runs evenly.
    """
    frames: list[np.ndarray] = []
    milliseconds: list[float] = []
    with _picture(source) as picture:
        import PIL.ImageSequence

        for page in PIL.ImageSequence.Iterator(picture):
            width, height = page.size
            _check_size(width, height, _name(source))
            _check_video_bytes(len(frames) + 1, height, width, _name(source))
            frames.append(_to_rgb(page))
            _check_same_size(frames, _name(source))
            milliseconds.append(max(0.0, page.info.get("duration") or 0) or 40.0)
            if len(frames) == max_frames:
                break
    shortest = min(milliseconds)
    repeats = [round(time / shortest) for time in milliseconds]
    if sum(repeats) * frames[0].nbytes > MAX_VIDEO_BYTES:
        repeats = [1] * len(frames)
    fps = min(1000 * sum(repeats) / sum(milliseconds), MAX_FPS)
    return np.repeat(np.stack(frames), repeats, axis=0)[:max_frames], fps


def read_video(source: Source, *, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """Frames and fps of an animated picture, or of any film that PyAV decodes."""
    try:
        return read_animation(source, max_frames=max_frames)
    except NoPictureError:
        return _read_film(source, max_frames)


def read_sound(source: Source) -> tuple[np.ndarray, int]:
    """Wave and sample rate of what libsndfile reads (WAV, FLAC, Ogg, MP3); channels averaged."""
    import soundfile

    name = _name(source)
    try:
        with soundfile.SoundFile(_ClampedFile(_as_file(source).getvalue())) as sound:
            check_sample_rate(sound.samplerate, name)
            limit = min(MAX_SECONDS * sound.samplerate, MAX_SAMPLES)
            blocks, count = [], 0
            # in blocks: the length in a header may be wrong, and channels may be many
            while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1, dtype=np.float32))
                count += len(block)
                if count > limit:
                    raise UserError(f"{name} is longer than {limit // sound.samplerate} s; cut it")
            rate = sound.samplerate
    except (soundfile.LibsndfileError, RuntimeError) as error:
        reason = getattr(error, "error_string", str(error))
        raise UserError(f"{name} is no sound that can be read: {reason}") from None
    if not count:
        raise UserError(f"{name} holds no samples")
    wave = np.concatenate(blocks)
    check_finite(wave, name)
    return np.clip(wave, -1.0, 1.0), rate


def check_sample_rate(rate: float, name: str) -> None:
    """Refuse a rate that is no sound's."""
    low, high = SAMPLE_RATES
    if not low <= rate <= high:
        raise UserError(f"{name} has {rate} samples a second; needs {low:,} to {high:,}")


def check_finite(wave: np.ndarray, name: str) -> None:
    """Refuse NaN and infinite samples."""
    if not np.isfinite(wave).all():
        raise UserError(f"{name} holds NaN or infinite samples; repair the file")


def picture_bytes(pixels: np.ndarray, suffix: str = ".png") -> bytes:
    """A picture file of the format that the suffix names."""
    import PIL.Image

    kind = {"": "png", "jpg": "jpeg", "tif": "tiff"}.get(suffix.lstrip("."), suffix.lstrip("."))
    buffer = io.BytesIO()
    try:
        PIL.Image.fromarray(pixels).save(buffer, kind)
    except (KeyError, OSError, ValueError) as error:
        reason = "unknown format" if isinstance(error, KeyError) else error
        raise UserError(
            f"cannot write a picture as {suffix}: {reason}; use .png, .jpg or .webp"
        ) from None
    return buffer.getvalue()


def video_bytes(frames: np.ndarray, fps: float, suffix: str = ".mp4") -> bytes:
    """A film as MP4 (H.264), or an animated .webp (without loss) or .gif.

    Animations hold equal frames as one long frame; `read_animation` repeats it.
    """
    if suffix in ANIMATIONS:
        return _animation_bytes(frames, fps, suffix.lstrip("."))
    if suffix in ("", ".mp4"):
        return _film_bytes(frames, fps)
    raise UserError(f"cannot write a clip as {suffix}; use .mp4, .webp or .gif")


def sound_bytes(wave: np.ndarray, sample_rate: int, suffix: str = ".wav") -> bytes:
    """A sound file of the format that the suffix names; WAV has 16 bits."""
    import soundfile

    kind, buffer = suffix.lstrip(".") or "wav", io.BytesIO()
    try:
        soundfile.write(buffer, wave, sample_rate, format=kind.upper())
    except (soundfile.LibsndfileError, ValueError, TypeError) as error:
        reason = getattr(error, "error_string", str(error)).rstrip(".")
        raise UserError(f"cannot write a sound as {suffix}: {reason}; use .wav or .flac") from None
    return buffer.getvalue()


def _name(source: Source) -> str:
    return "the data" if isinstance(source, bytes) else str(source)


def _as_file(source: Source) -> io.BytesIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        return io.BytesIO(Path(source).read_bytes())
    except (OSError, ValueError) as error:  # a path may not hold a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {source}: {reason}") from None


class _ClampedFile(io.BytesIO):
    """libsndfile seeks before the start of a broken file, which soundfile would print."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return super().seek(0)


@contextmanager
def _picture(source: Source) -> "Iterator[PIL.Image.Image]":
    """Open with Pillow; what goes wrong in there or inside the `with` is the file's fault."""
    import PIL.Image

    name, file = _name(source), _as_file(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
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


def _read_film(source: Source, max_frames: int | None) -> tuple[np.ndarray, float]:
    import av
    from av.error import FFmpegError

    name, frames = _name(source), []
    # a limit on pixels is set before the first frame is decoded
    limits = {"max_pixels": str(MAX_PIXELS)}
    options = {"format_whitelist": FILMS, **limits}
    try:
        with av.open(_as_file(source), options=options, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise UserError(f"{name} has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UserError(f"{name} is coded in a way that FFmpeg does not know")
            stream.codec_context.options = limits
            fps = float(stream.average_rate or stream.guessed_rate or 25)
            for picture in _decoded(container, stream, name):
                _check_video_bytes(len(frames) + 1, picture.height, picture.width, name)
                # the angle by which players turn the frame, as phones record it
                turned = np.rot90(picture.to_ndarray(format="rgb24"), picture.rotation // 90)
                frames.append(np.ascontiguousarray(turned))
                _check_same_size(frames, name)
                if len(frames) == max_frames:
                    break
    except UserError:
        raise
    except (FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} is no picture or film that can be read: {reason}") from None
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


def _animation_bytes(frames: np.ndarray, fps: float, kind: str) -> bytes:
    import PIL.Image

    first, *rest = [PIL.Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "webp" else {}
    first.save(
        buffer, kind, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0,
        **options,
    )  # fmt: skip
    return buffer.getvalue()


def _film_bytes(frames: np.ndarray, fps: float) -> bytes:
    import av
    from av.error import FFmpegError

    _, height, width, _ = frames.shape
    # yuv420p halves both sides: an odd one is repeated at its edge
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), "edge")
    rate = max(Fraction(fps).limit_denominator(1000), Fraction(1, 1000))
    buffer = io.BytesIO()
    try:
        with av.open(buffer, "w", format="mp4") as container:
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
