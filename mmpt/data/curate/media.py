"""Numbers about pictures and sounds."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mmpt.parts import Audio, Image, Video

VOICE_RATE = 16_000  # Hz, of the voice detector
FULL_SCALE = 0.999


def annotate_pictures(parts: Sequence[Image | Video]) -> dict[str, Any]:
    """The columns of at least one picture: the worst of each measure."""
    frames = [
        part.pixels if isinstance(part, Image) else part.frames[len(part.frames) // 2]
        for part in parts
    ]
    sides = [sorted(pixels.shape[:2]) for pixels in frames]
    return {
        "picture_side": min(short for short, _ in sides),
        "picture_aspect": max(long / short for short, long in sides),
        "picture_blur": min(map(blur, frames)),
        "picture_hashes": [perceptual_hash(pixels) for pixels in frames],
    }


def blur(pixels: np.ndarray) -> float:
    """Variance of the Laplacian of grey levels (0 to 255); pixels uint8 (height, width, 3)."""
    grey = np.pad(_grey(pixels), 1, mode="edge").astype(np.float32)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).var(dtype=np.float64))


def perceptual_hash(pixels: np.ndarray) -> int:
    """64 bits that change little when a picture is scaled or compressed again (pHash)."""
    import imagehash
    from PIL.Image import fromarray

    bits = imagehash.phash(fromarray(_grey(pixels))).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def annotate_sounds(parts: Sequence[Audio], text_chars: int) -> dict[str, Any]:
    """The columns of at least one sound, beside `text_chars` characters of text."""
    seconds = sum(part.seconds for part in parts)
    clipped = sum(int((np.abs(part.wave) >= FULL_SCALE).sum()) for part in parts)
    return {
        "sound_seconds": seconds,
        "voice": sum(map(voiced_seconds, parts)) / seconds,
        "clipped": clipped / sum(len(part.wave) for part in parts),
        "chars_per_second": text_chars / seconds if text_chars else None,
    }


def voiced_seconds(sound: Audio) -> float:
    """Seconds in which someone speaks, by the model inside silero-vad."""
    import torch
    from silero_vad import get_speech_timestamps

    from mmpt.process import one_thread

    with torch.inference_mode(), one_thread():
        wave = torch.from_numpy(sound.resample(VOICE_RATE).wave)
        runs = get_speech_timestamps(wave, _voice_detector(), sampling_rate=VOICE_RATE)
    return min(sound.seconds, sum(run["end"] - run["start"] for run in runs) / VOICE_RATE)


@lru_cache(maxsize=1)
def _voice_detector() -> Any:
    from silero_vad import load_silero_vad

    return load_silero_vad()


def _grey(pixels: np.ndarray) -> np.ndarray:
    from PIL.Image import fromarray

    return np.asarray(fromarray(pixels).convert("L"))
