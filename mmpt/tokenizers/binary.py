"""Quantisers whose code is the signs of the latents: LFQ on a cube, BSQ on the unit sphere.

Legend: N vectors, D latent width (bits), K = 2^D codes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpt.config import UserError
from mmpt.tokenizers.quantize import Quantized, Quantizer, pass_through

MAX_BITS = 24  # fp32 counts exactly up to 2^24
SHARPNESS = 10.0  # logit of a bit whose latent is at the corner; for the entropy terms


class LFQ(Quantizer):
    """Lookup-free quantisation (arXiv 2310.05737): the sign of each dimension is a bit.

    Bit order: the first dimension is the least significant bit. The loss is the commitment
    .25 |z - sg(q)|^2 plus `entropy_weight` times E[H(p)] - H(E[p]) of p(c) ~ exp(s z.c): sure of
    every vector, undecided over all. Under p bits are independent, so E[H(p)] is a sum of D binary
    entropies, exactly (arXiv 2406.07548, section 3.3), and so is the bound above H(E[p]) that is
    used here: memory N x D, not N x K.
    """

    step = 0.5
    corner: float = 1.0  # a code has +corner or -corner in each dimension
    _basis: Tensor

    def __init__(self, codebook_size: int, *, entropy_weight: float = 0.05) -> None:
        super().__init__()
        self.width = max(codebook_size, 1).bit_length() - 1
        if codebook_size != 1 << self.width or not 1 <= self.width <= MAX_BITS:
            raise UserError(
                f"codebook_size = {codebook_size}: lfq and bsq need a power of 2 from 2 to "
                f"2^{MAX_BITS}"
            )
        self.codebook_size = codebook_size
        self.entropy_weight = entropy_weight
        basis = 2.0 ** torch.arange(self.width)
        self.register_buffer("_basis", basis, persistent=False)

    def snap(self, bounded: Tensor) -> Quantized:
        """Signs; zero counts as negative."""
        bits = (bounded.detach() > 0).float()
        codes = (bits @ self._basis).long()[..., None]
        quantised = bits * (2 * self.corner) - self.corner
        latents = pass_through(quantised, bounded)
        if not self.learns:
            return Quantized(latents, codes, latents.new_zeros(()))
        commitment = self._distance(bounded - quantised)
        sure, spread = self.entropies(bounded)
        loss = 0.25 * commitment + self.entropy_weight * (sure - spread)
        parts = {"commitment": commitment, "sure": sure, "spread": spread}
        return Quantized(latents, codes, loss, parts)

    def lookup(self, codes: Tensor) -> Tensor:
        """Corners (..., D) of the cube."""
        places = torch.arange(self.width, device=codes.device)
        bits = (codes >> places & 1).float()
        return bits * (2 * self.corner) - self.corner

    def entropies(self, bounded: Tensor) -> tuple[Tensor, Tensor]:
        """E[H(p)] and the bound on H(E[p]), in nats, of bounded latents (..., D)."""
        logits = SHARPNESS / self.corner * bounded.reshape(-1, self.width)
        sure = _binary_entropy(logits).sum(-1).mean()
        share = torch.sigmoid(logits).mean(0)
        return sure, _binary_entropy(torch.logit(share, eps=1e-6)).sum()

    def _distance(self, difference: Tensor) -> Tensor:
        return difference.square().mean()


class BSQ(LFQ):
    """Binary spherical quantisation (arXiv 2406.07548): LFQ of unit vectors, corners of length 1.

    Bits, codes and losses as in LFQ; the commitment is the squared distance on the sphere.
    """

    def __init__(self, codebook_size: int, *, entropy_weight: float = 0.05) -> None:
        super().__init__(codebook_size, entropy_weight=entropy_weight)
        self.corner = self.width**-0.5

    def bound(self, latents: Tensor) -> Tensor:
        """To the unit sphere."""
        return F.normalize(super().bound(latents), dim=-1)

    def _distance(self, difference: Tensor) -> Tensor:
        return difference.square().sum(-1).mean()


def _binary_entropy(logits: Tensor) -> Tensor:
    return F.softplus(logits) - logits * torch.sigmoid(logits)
