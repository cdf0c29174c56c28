"""Vocoders: log-mel frames -> waves, block by block, 30 ms late; and `log_mel`, the way there.

Griffin-Lim has no weights and finds phases by iteration; `WaveHead` is a small network that was
trained to know them. `log_mel` never looks ahead, so that everything streams.

Legend: B batch, N samples, T mel frames (100 a second), F frequencies, D width.
"""

import math
from functools import lru_cache
from typing import Protocol

import torch
import torchaudio
from einops import rearrange
from torch import Tensor, nn
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


class Vocoder(Protocol):
    """A stream of frames into samples: 160 a frame, the first 480 of them before the first frame.

    The window of a frame ends with the frame's last sample, and four windows overlap there.
    """

    def push(self, mel: Tensor) -> Tensor:
        """Scaled log-mel (1, frames, 80), of the same number each time -> (160 frames,)."""
        ...


class GriffinLim:
    """Mel frames -> wave: fast Griffin-Lim (Perraudin 2013) over a block and the end of the last.

    Phases of the frames already spoken are kept, and the first 10 ms of a block are cross-faded
    with what the last block foresaw. Output is 30 ms late: before that, windows do not overlap
    enough.
    """

    FADE = HOP
    DELAY = WINDOW - HOP
    OPEN = 4  # frames of the last block whose phases still adapt to this one
    PAST = 8  # frames of the last block that those overlap with, and one to spare

    def __init__(self, block_frames: int, device: torch.device, *, num_steps: int = 32) -> None:
        self.num_steps = num_steps
        self.window = torch.hann_window(WINDOW, device=device)
        generator = torch.Generator().manual_seed(0)
        angles = torch.rand(FFT // 2 + 1, block_frames, generator=generator) * 2 * math.pi
        self._random = torch.polar(torch.ones_like(angles), angles).to(device)
        # the end of the last block: (513, 8)
        self._phase = self._random[:, : self.PAST].clone()
        self._magnitude = torch.full_like(self._phase, 1e-6, dtype=torch.float32)
        self._foreseen = torch.zeros(self.FADE, device=device)

    def push(self, mel: Tensor) -> Tensor:
        """Scaled log-mel (1, frames, 80), of 8 frames or more -> samples (160 frames,)."""
        now, closed = mel_magnitude(mel)[0], self.PAST - self.OPEN
        magnitude = torch.cat([self._magnitude, now], dim=1)
        phase, kept = torch.cat([self._phase, self._random], dim=1), self._phase[:, :closed]
        last = torch.zeros_like(magnitude, dtype=torch.complex64)
        wave = self._invert(magnitude * phase)
        for _ in range(self.num_steps):
            rebuilt = self._transform(wave)
            ahead = rebuilt + 0.99 * (rebuilt - last)
            last = rebuilt
            phase = ahead / ahead.abs().clamp(min=1e-12)
            phase[:, :closed] = kept  # what was spoken stays; the seam may adapt
            wave = self._invert(magnitude * phase)
        self._magnitude = magnitude[:, -self.PAST :].clone()
        self._phase = phase[:, -self.PAST :].clone()
        return self._cut(wave, now.shape[1] * HOP)

    def _cut(self, wave: Tensor, count: int) -> Tensor:
        begin = self.PAST * HOP - self.DELAY
        samples = wave[begin : begin + count + self.FADE]
        ramp = torch.linspace(0, 1, self.FADE, device=wave.device)
        head = samples[: self.FADE] * ramp + self._foreseen * (1 - ramp)
        self._foreseen = samples[count:].clone()
        return torch.cat([head, samples[self.FADE : count]]).clamp(-1, 1)

    # frame i covers 640 samples; in `wave` it ends at sample 160 (i + 1)
    def _invert(self, spectrum: Tensor) -> Tensor:
        pad = (FFT - WINDOW) // 2
        frames = torch.fft.irfft(spectrum, n=FFT, dim=0)[pad : pad + WINDOW]
        wave = overlap_add(frames.T * self.window)
        weight = overlap_weight(spectrum.shape[1], wave.device)
        return (wave / weight.clamp(min=1e-3))[WINDOW - HOP :]

    def _transform(self, wave: Tensor) -> Tensor:
        frames = F.pad(wave, (WINDOW - HOP, 0)).unfold(0, WINDOW, HOP) * self.window
        pad = (FFT - WINDOW) // 2
        return torch.fft.rfft(F.pad(frames, (pad, pad)), dim=1).T


class WaveHead(nn.Module):
    """Mel frames -> wave by a causal network that ends in an inverse STFT (Vocos, 2306.00814).

    Five layers at the frame rate, in the manner of ConvNeXt, see 31 frames; magnitudes start from
    those that the mel frames imply, so that what is left to learn are mostly phases.
    """

    def __init__(self, width: int, *, num_layers: int = 4) -> None:
        super().__init__()
        self.enter = CausalConv(NUM_MEL, width, 7)
        self.layers = nn.ModuleList([_WaveLayer(width) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(width)
        self.to_bins = nn.Linear(width, 2 * (WINDOW // 2 + 1))
        # one bin is 25 Hz wide: at first, magnitudes follow the mel band that they lie in
        self.from_mel = nn.Linear(NUM_MEL, WINDOW // 2 + 1)
        with torch.no_grad():
            bands = _mel_filters()[torch.arange(WINDOW // 2 + 1) * FFT // WINDOW]
            share = bands / bands.sum(1, keepdim=True).clamp(min=1e-8)
            self.from_mel.weight.copy_(2 * share)
            self.from_mel.bias.fill_(-5.0)
            self.to_bins.weight.mul_(0.1)

    def forward(self, mel: Tensor) -> Tensor:
        """Scaled log-mel (B, T, 80) of whole sounds -> wave (B, 160 (T + 3)), 30 ms late."""
        spectrum, _ = self.spectrum(mel, None)
        return overlap_add(self.windows(spectrum)) / overlap_weight(mel.shape[1], mel.device).clamp(
            min=1e-3
        )

    def spectrum(self, mel: Tensor, past: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Scaled log-mel (B, T, 80) -> spectrum (B, T, F) and what the next frames need of it."""
        x, kept = mel.transpose(1, 2), []
        for index, layer in enumerate([self.enter, *self.layers]):
            x, state = layer(x, None if past is None else past[index])
            kept.append(state)
        bins = self.to_bins(self.norm(x.transpose(1, 2))).float()
        change, phase = bins.chunk(2, dim=-1)
        # magnitudes of 640 points are those of a frame of `log_mel`
        magnitude = (self.from_mel(mel).float() + change).clamp(max=6).exp()
        return torch.polar(magnitude, phase), kept

    def windows(self, spectrum: Tensor) -> Tensor:
        """Spectrum (B, T, F) -> windowed samples (B, T, 640)."""
        window = torch.hann_window(WINDOW, device=spectrum.device)
        return torch.fft.irfft(spectrum, n=WINDOW) * window

    def stream(self) -> "WaveStream":
        """Mel frames in, samples out."""
        return WaveStream(self)


class WaveStream:
    """push(scaled log-mel (1, frames, 80)) -> samples (160 frames,), 30 ms late."""

    def __init__(self, head: WaveHead) -> None:
        self.head = head
        self._past: list[Tensor] | None = None
        device = next(head.parameters()).device
        self._foreseen = torch.zeros(WINDOW - HOP, device=device)
        self._weight = torch.zeros(WINDOW - HOP, device=device)

    def push(self, mel: Tensor) -> Tensor:
        """The samples that no later frame changes."""
        spectrum, self._past = self.head.spectrum(mel, self._past)
        wave = overlap_add(self.head.windows(spectrum))[0]
        weight = overlap_weight(mel.shape[1], mel.device)
        tail = WINDOW - HOP
        wave[:tail] += self._foreseen
        weight[:tail] += self._weight
        done = mel.shape[1] * HOP
        self._foreseen, self._weight = wave[done:].clone(), weight[done:].clone()
        return (wave[:done] / weight[:done].clamp(min=1e-3)).clamp(-1, 1)


class CausalConv(nn.Module):
    """A convolution over frames that sees no later one; carries its past from push to push."""

    def __init__(self, width_in: int, width_out: int, size: int, *, groups: int = 1) -> None:
        super().__init__()
        self.past = size - 1
        self.conv = nn.Conv1d(width_in, width_out, size, groups=groups)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, D, T) and the frames before -> (B, D, T) and the frames that come before the next."""
        if past is None:
            past = x.new_zeros(*x.shape[:-1], self.past)
        seen = torch.cat([past, x], dim=-1)
        return self.conv(seen), seen[..., seen.shape[-1] - self.past :].clone()


class _WaveLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = CausalConv(width, width, 7, groups=width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        mixed, kept = self.mix(x, past)
        return x + rearrange(self.mlp(rearrange(mixed, "b d t -> b t d")), "b t d -> b d t"), kept


@lru_cache
@torch.inference_mode(False)  # they outlive the call, and training may follow
def _mel_filters() -> Tensor:
    return torchaudio.functional.melscale_fbanks(
        FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, NUM_MEL, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )


def mel_centres() -> Tensor:
    """The frequency in Hz in the middle of each band, (80,)."""
    bins = torch.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1)
    filters = _mel_filters()
    return (bins[:, None] * filters).sum(0) / filters.sum(0)


@lru_cache
@torch.inference_mode(False)
def _mel_inverse() -> Tensor:
    return torch.linalg.pinv(_mel_filters().T)


def overlap_add(frames: Tensor) -> Tensor:
    """Windows (..., T, 640), 160 samples apart -> their sum (..., 160 (T + 3))."""
    num_pieces = WINDOW // HOP
    pieces = rearrange(frames, "... t (p h) -> p ... t h", p=num_pieces)
    shifted = [F.pad(p, (0, 0, i, num_pieces - 1 - i)) for i, p in enumerate(pieces)]
    return torch.stack(shifted).sum(0).flatten(-2)


def overlap_weight(num_frames: int, device: torch.device) -> Tensor:
    """What overlapping windows, squared, add up to: (160 (T + 3),)."""
    squared = torch.hann_window(WINDOW, device=device) ** 2
    return overlap_add(squared.expand(num_frames, -1))
