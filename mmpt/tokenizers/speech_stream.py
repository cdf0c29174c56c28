"""Streams of the speech codec: samples in, codes out; codes in, samples out; constant memory.

The unit is a block with the context before it; what `encode` and `decode` do is what these do.

Legend: N samples, T mel frames (100 a second), n positions, Q codebooks.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpt.config import UserError
from mmpt.tokenizers.vocoder import HOP, NUM_MEL, SILENCE, WINDOW, GriffinLim, Vocoder, log_mel

if TYPE_CHECKING:
    from mmpt.tokenizers.speech import SpeechCodec

FRAMES_PER_CODE = 8
SAMPLES_PER_CODE = HOP * FRAMES_PER_CODE


class SpeechStream:
    """push(samples (any,)) -> codes (n, Q). Units: one block of samples, and what is before it."""

    def __init__(self, codec: "SpeechCodec") -> None:
        self.codec = codec
        # a window more than the context, so that its first mel frames are exact
        self._history = codec.config.context * SAMPLES_PER_CODE + WINDOW
        self._past = torch.zeros(self._history, device=codec.device)
        self._waiting = torch.zeros(0, device=codec.device)
        self._unheard = codec.config.context * FRAMES_PER_CODE  # frames of context not begun

    @torch.inference_mode()
    def push(self, samples: Tensor) -> Tensor:
        """Codes of the blocks that are complete. Raises UserError for what is no wave."""
        samples = _check_samples(samples).to(self.codec.device, torch.float32).clamp(-1, 1)
        joined = torch.cat([self._waiting, samples])
        units, self._waiting = _split(joined, self.codec.block_samples)
        return torch.cat([self._empty(), *(self._unit(unit) for unit in units)])

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """Codes of the tail, padded with silence; one position for every 1,280 samples begun."""
        if not len(self._waiting):
            return self._empty()
        wanted = math.ceil(len(self._waiting) / SAMPLES_PER_CODE)
        tail = F.pad(self._waiting, (0, self.codec.block_samples - len(self._waiting)))
        self._waiting = self._waiting[:0]
        return self._unit(tail)[:wanted]

    def _unit(self, block: Tensor) -> Tensor:
        codec = self.codec
        seen = torch.cat([self._past, block])
        self._past = seen[-self._history :].clone()
        with torch.autocast(codec.device.type, enabled=False):
            mel = log_mel(seen[None])[:, WINDOW // HOP :]
            # before the first sample there is no frame, not a silent one
            mel[:, : self._unheard] = 0
            self._unheard = max(0, self._unheard - codec.config.block * FRAMES_PER_CODE)
            return codec.quantizer(codec.encode_windows(mel)).codes[0]

    def _empty(self) -> Tensor:
        shape = (0, self.codec.num_codebooks)
        return torch.zeros(shape, dtype=torch.int64, device=self.codec.device)


class SpeechDecodeStream:
    """push(codes (n, Q)) -> samples. Units: one block of codes with the context before it."""

    delay = WINDOW - HOP  # samples that a vocoder keeps back: 30 ms

    def __init__(self, codec: "SpeechCodec") -> None:
        self.codec = codec
        shape = (0, codec.num_codebooks)
        self._waiting = torch.zeros(shape, dtype=torch.int64, device=codec.device)
        width = codec.quantizer.width
        self._past = torch.zeros(1, codec.config.context, width, device=codec.device)
        self._vocoder = _vocoder(codec)
        self._late = self.delay  # samples still to drop: they fall before the first code
        self._owed = 0  # samples that the codes so far stand for and that are not out yet

    @torch.inference_mode()
    def push(self, codes: Tensor) -> Tensor:
        """Samples of the blocks that are complete, 30 ms late."""
        if len(codes):
            codes = self.codec.check_codes(codes, 2)
        joined = torch.cat([self._waiting, codes.to(self._waiting)])
        units, self._waiting = _split(joined, self.codec.config.block)
        wave = [self._unit(unit, len(unit)) for unit in units]
        return torch.cat([torch.zeros(0, device=self.codec.device), *wave])

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The samples that are left: 1,280 for each position in all."""
        count, block, wave = len(self._waiting), self.codec.config.block, []
        owed = self._owed + count * SAMPLES_PER_CODE
        if count:
            last = self._waiting[-1:].expand(block - count, -1)
            tail = torch.cat([self._waiting, last])
            self._waiting = self._waiting[:0]
            wave.append(self._unit(tail, count))
        silence = torch.full((1, block * FRAMES_PER_CODE, NUM_MEL), SILENCE)
        silence = silence.to(self.codec.device)
        while owed > sum(map(len, wave)):
            wave.append(self._vocode(silence))
        self._owed = 0
        return torch.cat([torch.zeros(0, device=self.codec.device), *wave])[:owed]

    def _unit(self, codes: Tensor, count: int) -> Tensor:
        codec = self.codec
        with torch.autocast(codec.device.type, enabled=False):
            window = torch.cat([self._past, codec.quantizer.lookup(codes)[None]], dim=1)
            self._past = window[:, window.shape[1] - codec.config.context :].clone()
            mel = codec.decode_windows(window)
        mel[:, count * FRAMES_PER_CODE :] = SILENCE
        self._owed += count * SAMPLES_PER_CODE
        return self._vocode(mel)

    def _vocode(self, mel: Tensor) -> Tensor:
        with torch.autocast(self.codec.device.type, enabled=False):
            wave = self._vocoder.push(mel)
        dropped = min(self._late, len(wave))
        self._late -= dropped
        self._owed -= len(wave) - dropped
        return wave[dropped:]


def _vocoder(codec: "SpeechCodec") -> Vocoder:
    if codec.config.vocoder == "istft":
        return codec.wave_head.stream()
    return GriffinLim(codec.config.block * FRAMES_PER_CODE, codec.device)


def _split(joined: Tensor, size: int) -> tuple[Iterator[Tensor], Tensor]:
    """Whole units of `size`, and a copy of what is left, so that nothing else is kept alive."""
    whole = len(joined) // size * size
    return iter(joined[:whole].split(size) if whole else ()), joined[whole:].clone()


def _check_samples(samples: Tensor) -> Tensor:
    if samples.ndim != 1 or not samples.is_floating_point():
        raise UserError(
            f"samples must be float (num_samples,) in [-1, 1]; got {samples.dtype} of shape "
            f"{tuple(samples.shape)}"
        )
    if not torch.isfinite(samples).all():
        raise UserError("the wave holds samples that are no finite numbers; repair or drop it")
    return samples
