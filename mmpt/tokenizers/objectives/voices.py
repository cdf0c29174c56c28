"""Other voices out of the ones there are: log-mel frames varied as speakers and rooms vary them.

A codec that hears few voices learns those; moving the mel axis stands for shorter and longer vocal
tracts (Jaitly and Hinton 2013), stretching time for pace, colour and noise for throats and rooms.

Legend: T mel frames (100 a second), 80 bands.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmpt.tokenizers.vocoder import NUM_MEL, SILENCE, mel_centres

TRACT = 0.15  # frequencies are multiplied by up to exp of this, or divided
PACE = (0.85, 1.18)
LOUDNESS = (-0.5, 0.35)  # in half nats, as mel frames are scaled
COLOUR, NUM_KNOTS = 0.25, 5  # how much louder some bands are than others, in a smooth curve
NOISE = (-3.0, -0.5)  # a floor of noise, on the same scale


def vary(mel: Tensor, generator: np.random.Generator) -> Tensor:
    """Another speaker, pace, loudness and room for scaled log-mel frames (T, 80)."""
    if generator.random() < 0.8:
        mel = warp(mel, math.exp(generator.uniform(-TRACT, TRACT)))
    length = max(1, round(len(mel) / generator.uniform(*PACE)))
    mel = F.interpolate(mel.T[None], size=length, mode="linear")[0].T
    knots = generator.normal(0, COLOUR, NUM_KNOTS)
    colour = np.interp(np.linspace(0, NUM_KNOTS - 1, NUM_MEL), np.arange(NUM_KNOTS), knots)
    mel = mel + torch.from_numpy(colour.astype(np.float32)) + generator.uniform(*LOUDNESS)
    if generator.random() < 0.5:
        grain = torch.from_numpy(generator.normal(0, 0.3, mel.shape).astype(np.float32))
        # magnitudes add up; the scale halves logarithms
        mel = torch.logaddexp(2 * mel, 2 * generator.uniform(*NOISE) + grain) / 2
    return mel.clamp(min=SILENCE)


def warp(mel: Tensor, ratio: float) -> Tensor:
    """Multiply all frequencies of frames (T, 80) by 1 / ratio: above 1, a longer vocal tract."""
    below, share = _sources(round(ratio, 3))
    return torch.lerp(mel[:, below], mel[:, below + 1], share)


@lru_cache(maxsize=512)
@torch.inference_mode(False)
def _sources(ratio: float) -> tuple[Tensor, Tensor]:
    """For each band, the band below its source and how far the source is above that."""
    centres = mel_centres().double().numpy()
    place = np.interp(centres * ratio, centres, np.arange(NUM_MEL))
    below = np.minimum(np.floor(place), NUM_MEL - 2)
    return torch.from_numpy(below).long(), torch.from_numpy(place - below).float()
