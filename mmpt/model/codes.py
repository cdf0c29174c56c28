"""Codes that decode alike begin alike: embeddings of codes from the latents of their codec.

A codebook has geometry (two FSQ codes may differ by one step of one dimension), and ids forget it.
With few training ids, giving it back at initialisation saves much of the training; later training
is free to move the rows.

Legend: K codes, L latent width, F features, D model width.
"""

import torch
from torch import Tensor

from mmpt.model.collectives import fill, whole
from mmpt.model.transformer import Decoder
from mmpt.vocab import CodeRange

SHARE = 0.8  # of an embedding's length that comes from the latents; the rest tells codes apart
NUM_WAVES = 64  # random Fourier features: near codes are alike, far ones are not (Rahimi 2007)
BANDWIDTH = 1.2


@torch.no_grad()
def initialise_codes(
    model: Decoder, code_range: CodeRange, latents: Tensor, generator: torch.Generator
) -> None:
    """Overwrite a range's rows of the embedding; their scale stays.

    latents: float (K, L), what the codec's decoder reads for each code.
    """
    rows = slice(code_range.start, code_range.stop)
    embedding = whole(model.embedding).clone()
    before = embedding[rows]
    scale = before.std()
    latents_KL = _standardise(latents.float())
    spread = BANDWIDTH * latents_KL.shape[1] ** -0.5
    waves_LF = torch.randn(latents_KL.shape[1], NUM_WAVES, generator=generator) * spread
    phase_KF = latents_KL @ waves_LF
    features_KF = _standardise(torch.cat([latents_KL, phase_KF.cos(), phase_KF.sin()], dim=1))
    project_FD = torch.randn(features_KF.shape[1], before.shape[1], generator=generator)
    made_KD = features_KF @ project_FD
    made_KD = (made_KD / made_KD.std() * scale.cpu()).to(before)
    embedding[rows] = SHARE * made_KD + (1 - SHARE**2) ** 0.5 * before
    fill(model.embedding, embedding)


def _standardise(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
