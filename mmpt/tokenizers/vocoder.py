"""The vocoder: waves <-> log-mel frames, without learned weights.

`log_mel` never looks ahead, and Griffin-Lim inverts it block by block, so both stream.

Legend: B batch, N samples, T mel frames (100 a second).
"""

import math
from functools import lru_cache

import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

SAMPLE_RATE = 16_000
HOP = 160
NUM_MEL = 80
FFT = 1024
WINDOW = 640
SILENCE = -2.1  # a log-mel frame of silence, as `log_mel` scales it


def log_mel(wave: Tensor) -> Tensor:
    """Log-mel frames (B, N // 160, 80) of waves (B, N), scaled to about unit variance.

    Frame i ends at sample 160 (i + 1): it never looks ahead.
    """
    window = torch.hann_window(WINDOW, device=wave.device)
    padded = F.pad(wave.float(), ((FFT + WINDOW) // 2 - HOP, (FFT - WINDOW) // 2))
    spectrum = torch.stft(
        padded, FFT, HOP, WINDOW, window=window, center=False, return_complex=True
    )
    mel = _mel_filters().to(wave.device).T @ spectrum.abs()[..., : wave.shape[-1] // HOP]
    return (mel.clamp(min=1e-4).log().transpose(1, 2) + 5) / 2


def mel_magnitude(mel: Tensor) -> Tensor:
    """The linear magnitude (B, 513, T) that best explains scaled log-mel frames (B, T, 80)."""
    linear = (mel.float() * 2 - 5).clamp(-10, 6).exp().transpose(1, 2)
    filters, inverse = _mel_filters().to(mel.device).T, _mel_inverse().to(mel.device)
    guess = inverse @ linear
    guess = guess.clamp(min=1e-6)
    for _ in range(8):  # multiplicative updates keep it non-negative (Lee and Seung 2001)
        guess = guess * (filters.T @ linear) / (filters.T @ (filters @ guess)).clamp(min=1e-8)
    return guess


class GriffinLim:
    """Mel frames -> wave: fast Griffin-Lim (Perraudin 2013) over the last block and this one.

    Phases of the frames already spoken are kept, and the first 10 ms of a block are cross-faded
    with what the last block foresaw. Output is 30 ms late: before that, windows do not overlap
    enough.
    """

    FADE = HOP
    DELAY = WINDOW - HOP

    def __init__(self, block_frames: int, device: torch.device, *, num_steps: int = 32) -> None:
        self.num_steps = num_steps
        self.window = torch.hann_window(WINDOW, device=device)
        self._magnitude: Tensor | None = None  # of the last block (513, frames)
        self._phase: Tensor | None = None
        self._foreseen = torch.zeros(self.FADE, device=device)
        generator = torch.Generator().manual_seed(0)
        angles = torch.rand(FFT // 2 + 1, block_frames, generator=generator) * 2 * math.pi
        self._random = torch.polar(torch.ones_like(angles), angles).to(device)

    def push(self, mel: Tensor) -> Tensor:
        """Scaled log-mel (1, frames, 80) -> samples (160 frames,)."""
        now = mel_magnitude(mel)[0]
        size = now.shape[1]
        if self._magnitude is None or self._phase is None:
            self._magnitude, self._phase = torch.full_like(now, 1e-6), self._random
        magnitude = torch.cat([self._magnitude, now], dim=1)
        phase, kept = torch.cat([self._phase, self._random], dim=1), self._phase
        last = torch.zeros_like(magnitude, dtype=torch.complex64)
        wave = self._invert(magnitude * phase)
        for _ in range(self.num_steps):
            rebuilt = self._transform(wave)
            ahead = rebuilt + 0.99 * (rebuilt - last)
            last = rebuilt
            phase = ahead / ahead.abs().clamp(min=1e-12)
            phase[:, : size - 4] = kept[:, : size - 4]  # what was spoken stays; the seam may adapt
            wave = self._invert(magnitude * phase)
        self._magnitude, self._phase = now, phase[:, size:]
        return self._cut(wave, size)

    def _cut(self, wave: Tensor, size: int) -> Tensor:
        begin = size * HOP - self.DELAY
        samples = wave[begin : begin + size * HOP + self.FADE]
        ramp = torch.linspace(0, 1, self.FADE, device=wave.device)
        head = samples[: self.FADE] * ramp + self._foreseen * (1 - ramp)
        self._foreseen = samples[size * HOP :]
        return torch.cat([head, samples[self.FADE : size * HOP]]).clamp(-1, 1)

    # frame i covers 640 samples; in `wave` it ends at sample 160 (i + 1)
    def _invert(self, spectrum: Tensor) -> Tensor:
        pad = (FFT - WINDOW) // 2
        frames = torch.fft.irfft(spectrum, n=FFT, dim=0)[pad : pad + WINDOW]
        wave = _overlap_add(frames * self.window[:, None])
        weight = _overlap_add((self.window**2)[:, None].expand(-1, spectrum.shape[1]))
        return (wave / weight.clamp(min=1e-3))[WINDOW - HOP :]

    def _transform(self, wave: Tensor) -> Tensor:
        frames = F.pad(wave, (WINDOW - HOP, 0)).unfold(0, WINDOW, HOP) * self.window
        pad = (FFT - WINDOW) // 2
        return torch.fft.rfft(F.pad(frames, (pad, pad)), dim=1).T


@lru_cache
def _mel_filters() -> Tensor:
    return torchaudio.functional.melscale_fbanks(
        FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, NUM_MEL, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )


@lru_cache
def _mel_inverse() -> Tensor:
    return torch.linalg.pinv(_mel_filters().T)


def _overlap_add(frames: Tensor) -> Tensor:
    """Frames (640, n), 160 apart -> their sum (160 (n + 3),)."""
    pieces = frames.reshape(WINDOW // HOP, HOP, -1)
    count = pieces.shape[-1]
    out = frames.new_zeros(HOP, count + WINDOW // HOP - 1)
    for shift, piece in enumerate(pieces):
        out[:, shift : shift + count] += piece
    return out.T.reshape(-1)
