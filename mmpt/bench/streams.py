"""`mmpt bench streams`: an hour of sound through the shipped speech codec, a second at a time.

Memory must not grow with the length of a wave: the resident memory of the process at minutes 10 and
60 is compared with that at minute 1.
"""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mmpt.bench.codecs import shipped
from mmpt.bench.harness import Row
from mmpt.config import UserError
from mmpt.tokenizers.speech import SpeechCodec

log = logging.getLogger(__name__)

MINUTES = (1, 10, 60)  # after which memory is read; the first is what the others are compared with
GROWTH = 8.0  # MiB that may be added
STATM = Path("/proc/self/statm")


def streams(device: str) -> list[Row]:
    """Rows of memory and speed. Raises UserError where memory cannot be read."""
    codec = shipped(SpeechCodec)
    if codec is None:
        raise UserError("no speech codec is shipped here; install the whole of mmpt")
    memory, seconds = push(codec.to(device), MINUTES)
    first, *later = (memory[minute] for minute in MINUTES)
    limit = first + GROWTH
    rows = [
        _row(f"{codec.name}, memory at minute {minute}", device, "MiB", mib, limit, limit / mib)
        for minute, mib in zip(MINUTES[1:], later, strict=True)
    ]
    speed = 60 * MINUTES[-1] / seconds
    rows.append(_row(f"{codec.name}, encode and decode", device, "s/s", speed, 1.0, speed))
    return rows


def push(codec: SpeechCodec, minutes: tuple[int, ...]) -> tuple[dict[int, float], float]:
    """Resident memory in MiB after each of `minutes` of noise, and the seconds that all took."""
    encoder, decoder = codec.stream(), codec.decode_stream()
    memory, count, began = {}, 0, time.monotonic()
    for second, wave in enumerate(_noise(codec, 60 * minutes[-1]), start=1):
        count += len(decoder.push(encoder.push(wave)))
        if second in (60 * minute for minute in minutes):
            memory[second // 60] = _resident()
            log.info("minute %d: %.1f MiB", second // 60, memory[second // 60])
    count += len(decoder.push(encoder.flush())) + len(decoder.flush())
    assert count >= 60 * minutes[-1] * codec.sample_rate
    return memory, time.monotonic() - began


def _noise(codec: SpeechCodec, seconds: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(seconds):
        wave = torch.randn(codec.sample_rate, generator=generator) * 0.1
        yield wave.clamp(-1, 1).to(codec.device)


def _resident() -> float:
    try:
        pages = int(STATM.read_text().split()[1])
    except OSError:
        raise UserError("the memory in use is read from /proc, which only Linux has") from None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _row(case: str, device: str, unit: str, ours: float, peer: float, ratio: float) -> Row:
    name = "real time" if unit == "s/s" else f"minute {MINUTES[0]} and {GROWTH:g} MiB"
    return Row(
        case=case,
        device=device,
        dtype="fp32",
        unit=unit,
        ours=ours,
        peer=peer,
        peer_name=name,
        ratio=ratio,
        low=ratio,
        high=ratio,
    )
