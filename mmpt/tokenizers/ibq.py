"""Index back-propagation quantisation (IBQ, arXiv 2412.02692) in memory that does not grow with
batch x codebook.

The forward value is the code of the largest similarity; the gradient is the one of the soft
assignment, onehot = hard + p - sg(p), p = softmax(z E'), so every code learns in every step. With
g the gradient of q and soft = p E, the backward pass needs p only tile by tile:
d logits = p * (g E' - g.soft), d z = d logits E, d E = hard' g + (d logits)' z.

Legend: N vectors, D latent width, K codebook size, C codes of one tile, R rows of one tile.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmpt.tokenizers.codebooks import most_similar
from mmpt.tokenizers.quantize import Quantized, Quantizer

TILE = 2**22  # similarities that are held at once: 16 MiB
ENTROPY_VECTORS = 256  # of a batch, that the entropy term is computed on
TEMPERATURE = 0.01  # of the entropy term


class IBQ(Quantizer):
    """The code of the largest dot product among learned vectors, all of which get a gradient.

    The loss is |q - z|^2 + |sg(q) - z|^2 + .25 |q - sg(z)|^2 (eq. 6, where the first q carries the
    soft gradient) plus `entropy_weight` times E[H(p)] - H(E[p]), p = softmax(z E' / .01), on at
    most 256 vectors of the batch, drawn from the global generator.
    """

    straight_through = False

    def __init__(self, codebook_size: int, width: int, *, entropy_weight: float = 0.05) -> None:
        super().__init__()
        self.codebook_size, self.width = codebook_size, width
        self.entropy_weight = entropy_weight
        self.codebook = nn.Parameter(torch.randn(codebook_size, width) / math.sqrt(width))

    def snap(self, bounded: Tensor) -> Quantized:
        """The most similar code."""
        flat = bounded.reshape(-1, self.width)
        codes = most_similar(flat.detach(), self.codebook.detach())
        shaped = codes.reshape(*bounded.shape[:-1], 1)
        if not self.learns:
            return Quantized(self.lookup(shaped), shaped, bounded.new_zeros(()))
        soft = index_backpropagation(flat, self.codebook, codes)
        hard = self.codebook[codes]
        parts = {
            "double": (soft - flat).square().mean(),
            "commitment": (hard.detach() - flat).square().mean(),
            "codebook": (hard - flat.detach()).square().mean(),
        }
        loss = parts["double"] + parts["commitment"] + 0.25 * parts["codebook"]
        if self.entropy_weight:
            sure, spread = entropies(_sample(flat), self.codebook)
            loss = loss + self.entropy_weight * (sure - spread)
            parts |= {"sure": sure, "spread": spread}
        return Quantized(soft.reshape(bounded.shape), shaped, loss, parts)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codebook vectors (..., D)."""
        return F.embedding(codes[..., 0], self.codebook)


def _sample(points: Tensor) -> Tensor:
    if len(points) <= ENTROPY_VECTORS:
        return points
    return points[torch.randperm(len(points), device=points.device)[:ENTROPY_VECTORS]]


def index_backpropagation(points: Tensor, codebook: Tensor, codes: Tensor) -> Tensor:
    """codebook[codes] (N, D) with the gradient of (hard + p - sg(p)) codebook, both arguments.

    points: (N, D); codebook: (K, D); codes: int64 (N,); p = softmax(points codebook').
    """
    return _IndexBackpropagation.apply(points, codebook, codes)  # type: ignore[return-value]


class _IndexBackpropagation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points_ND: Tensor, codebook_KD: Tensor, codes_N: Tensor) -> Tensor:
        top_N = torch.full_like(points_ND[:, 0], -torch.inf)
        total_N = torch.zeros_like(top_N)
        soft_ND = torch.zeros_like(points_ND)
        for tile_CD in _tiles(codebook_KD, len(points_ND)):  # softmax online, 1805.02867
            logits_NC = points_ND @ tile_CD.T
            before_N, top_N = top_N, torch.maximum(top_N, logits_NC.amax(-1))
            shrink_N = torch.exp(before_N - top_N)
            weights_NC = logits_NC.sub_(top_N[:, None]).exp_()
            total_N = total_N * shrink_N + weights_NC.sum(-1)
            soft_ND = torch.addmm(soft_ND * shrink_N[:, None], weights_NC, tile_CD)
        ctx.save_for_backward(
            points_ND, codebook_KD, codes_N, top_N + total_N.log(), soft_ND / total_N[:, None]
        )
        return codebook_KD[codes_N]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        points_ND, codebook_KD, codes_N, normaliser_N, soft_ND = ctx.saved_tensors
        [grad_ND] = gradients
        grad_points_ND = torch.zeros_like(points_ND)
        grad_codebook_KD = None
        if ctx.needs_input_grad[1]:
            grad_codebook_KD = torch.zeros_like(codebook_KD).index_add_(0, codes_N, grad_ND)
        mean_N = (grad_ND * soft_ND).sum(-1)
        first = 0
        with torch.autocast(points_ND.device.type, enabled=False):
            for tile_CD in _tiles(codebook_KD, len(points_ND)):
                chance_NC = (points_ND @ tile_CD.T).sub_(normaliser_N[:, None]).exp_()
                chance_NC *= (grad_ND @ tile_CD.T).sub_(mean_N[:, None])  # now d logits
                grad_points_ND.addmm_(chance_NC, tile_CD)
                if grad_codebook_KD is not None:
                    grad_codebook_KD[first : first + len(tile_CD)].addmm_(chance_NC.T, points_ND)
                first += len(tile_CD)
        return grad_points_ND, grad_codebook_KD, None


def _tiles(codebook_KD: Tensor, num_points: int) -> tuple[Tensor, ...]:
    return codebook_KD.split(max(TILE // max(num_points, 1), 1))


def entropies(points: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """E[H(p)] and H(E[p]) in nats, p = softmax(points codebook' / .01), of points (N, D).

    A few points at a time, computed anew in the backward pass: memory does not grow with N x K.
    """
    sure, share_K = points.new_zeros(()), torch.zeros_like(codebook[:, 0])
    for part in points.split(max(TILE // len(codebook), 1)):
        out = checkpoint(_row_entropies, part, codebook, use_reentrant=False)
        sure, share_K = sure + out[0], share_K + out[1]  # type: ignore[index] # a pair
    share_K = share_K / len(points)
    # a share of zero has no entropy, but the slope of x log x there is infinite
    return sure / len(points), -(share_K * share_K.clamp(min=1e-12).log()).sum()


def _row_entropies(points_RD: Tensor, codebook_KD: Tensor) -> tuple[Tensor, Tensor]:
    logs_RK = (points_RD @ codebook_KD.T / TEMPERATURE).log_softmax(-1)
    chances_RK = logs_RK.exp()
    return -(chances_RK * logs_RK).sum(), chances_RK.sum(0)
