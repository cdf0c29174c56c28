"""Files <-> waves: sounds in whatever format libsndfile knows.

Shape: wave float32 (num_samples,), mono in [-1, 1].
"""

import io

import numpy as np

from mmpt.config import UserError
from mmpt.media import Source, bytes_of, name_of
from mmpt.metadata import add_chunk

MAX_SECONDS = 3600  # of one sound
MAX_SAMPLES = MAX_SECONDS * 48_000
SAMPLE_RATES = (1000, 384_000)
BLOCK = 1 << 18  # samples of each channel that are read at once


def read_sound(source: Source, *, max_seconds: float = MAX_SECONDS) -> tuple[np.ndarray, int]:
    """Wave and sample rate of what libsndfile reads (WAV, FLAC, Ogg, MP3); channels averaged.

    No more is read than `max_seconds`: a longer sound is refused, whatever its header says.
    """
    import soundfile

    name = name_of(source)
    try:
        with soundfile.SoundFile(_ClampedFile(bytes_of(source))) as sound:
            check_sample_rate(sound.samplerate, name)
            limit = min(int(min(max_seconds, MAX_SECONDS) * sound.samplerate), MAX_SAMPLES)
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


def sound_bytes(
    wave: np.ndarray, sample_rate: int, suffix: str = ".wav", *, note: str = ""
) -> bytes:
    """A sound file of the format that the suffix names; WAV and FLAC have 16 bits.

    What was read from 16 bits is written as it was: libsndfile itself would scale by 32,767.
    `note`: see `metadata`; only WAV has room for it.
    """
    import soundfile

    kind, buffer = suffix.lstrip(".") or "wav", io.BytesIO()
    if kind in ("wav", "flac"):
        wave = np.clip(np.rint(wave * 32_768), -32_768, 32_767).astype(np.int16)
    try:
        soundfile.write(buffer, wave, sample_rate, format=kind.upper())
    except (soundfile.LibsndfileError, ValueError, TypeError) as error:
        reason = getattr(error, "error_string", str(error)).rstrip(".")
        raise UserError(f"cannot write a sound as {suffix}: {reason}; use .wav or .flac") from None
    return add_chunk(buffer.getvalue(), note) if kind == "wav" else buffer.getvalue()


def check_sample_rate(rate: float, name: str) -> None:
    """Refuse a rate that is no sound's."""
    low, high = SAMPLE_RATES
    if not low <= rate <= high:
        raise UserError(f"{name} has {rate} samples a second; needs {low:,} to {high:,}")


def check_finite(wave: np.ndarray, name: str) -> None:
    """Refuse NaN and infinite samples."""
    if not np.isfinite(wave).all():
        raise UserError(f"{name} holds NaN or infinite samples; repair the file")


class _ClampedFile(io.BytesIO):
    """libsndfile seeks before the start of a broken file, which soundfile would print."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except ValueError:
            return super().seek(0)
