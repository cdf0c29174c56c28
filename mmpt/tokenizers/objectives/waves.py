"""What a learned vocoder is trained on: crops of waves, and how far spectra at several scales are.

Legend: B batch, N samples.
"""

import numpy as np
import torch
from torch import Tensor

from mmpt.tokenizers.vocoder import HOP, WINDOW, WaveHead, log_mel

CROP = 80 * HOP  # samples: 0.8 s
SCALES = (1024, 512, 256, 128)  # samples a window, four windows overlapping
FLOOR = 1e-3


def crop(wave: np.ndarray, generator: np.random.Generator) -> Tensor:
    """A random piece of `CROP` samples, with silence behind it where the wave is short."""
    start = int(generator.integers(max(1, len(wave) - CROP)))
    piece = wave[start : start + CROP]
    return torch.from_numpy(np.pad(piece, (0, CROP - len(piece))).astype(np.float32))


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def wave_loss(head: WaveHead, wave: Tensor) -> Tensor:
    """Distance of waves (B, N) to what the head makes of their mel frames: spectra and mel.

    Spectral convergence and log magnitudes (Parallel WaveGAN, arXiv 1910.11480, eq. 4 to 6).
    """
    mel = log_mel(wave)
    late = WINDOW - HOP
    made = head(mel)[:, late : late + wave.shape[1]]
    loss = (log_mel(made) - mel).abs().mean()
    for size in SCALES:
        ours, real = _magnitudes(made, size), _magnitudes(wave, size)
        loss = loss + (ours - real).norm() / real.norm().clamp(min=FLOOR) / len(SCALES)
        loss = loss + (ours.log() - real.log()).abs().mean() / len(SCALES)
    return loss


def _magnitudes(wave: Tensor, size: int) -> Tensor:
    window = torch.hann_window(size, device=wave.device)
    spectrum = torch.stft(wave, size, size // 4, window=window, return_complex=True)
    return spectrum.abs().clamp(min=FLOOR)
