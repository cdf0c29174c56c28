"""Quantisers: latents -> codes and back, behind one protocol, always in fp32.

Legend: N vectors, D latent width, K codebook size.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mmpt.config import UserError


@dataclass
class Quantized:
    """latents: float (..., D), straight-through; codes: int64 (...); loss: a scalar to train on."""

    latents: Tensor
    codes: Tensor
    loss: Tensor


class Quantizer(Protocol):
    """What a codec needs from a quantiser."""

    codebook_size: int
    width: int

    def __call__(self, latents: Tensor) -> Quantized:
        """Quantise (..., width)."""
        ...

    def lookup(self, codes: Tensor) -> Tensor:
        """The quantised latents (..., width) of codes (...)."""
        ...


class FSQ(nn.Module):
    """Finite scalar quantisation (arXiv 2309.15505): round each bounded dimension to its levels.

    No codebook, no loss, no state, so nothing can collapse. levels: at least 2 each.
    """

    _levels: Tensor
    _basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise UserError(f"levels {levels}: give one or more, each at least 2")
        self.levels = levels
        self.width = len(levels)
        self.codebook_size = math.prod(levels)
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.float32), persistent=False)
        basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
        self.register_buffer("_basis", basis, persistent=False)

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, latents: Tensor) -> Quantized:
        """latents: float (..., D), unbounded."""
        half = (self._levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(latents.float() + torch.atanh(offset / half)) * half - offset
        rounded = bounded.round()
        # straight-through: the gradient skips the rounding (eq. 3)
        passed = bounded + (rounded - bounded).detach()
        digits = rounded.detach() + self._levels.div(2, rounding_mode="floor")
        codes = (digits.round().long() * self._basis).sum(-1)
        return Quantized(self._scale(passed), codes, latents.new_zeros((), dtype=torch.float32))

    def lookup(self, codes: Tensor) -> Tensor:
        """Quantised latents (..., D) in [-1, 1] of codes (...)."""
        levels = self._levels.long()
        digits = (codes[..., None] // self._basis) % levels
        return self._scale((digits - levels // 2).float())

    def _scale(self, rounded: Tensor) -> Tensor:
        return rounded / self._levels.div(2, rounding_mode="floor")


class EMAVectorQuantizer(nn.Module):
    """Nearest neighbour on the unit sphere; moving averages learn the codebook (1711.00937, A.1).

    Low-dimensional, l2-normalised codes (arXiv 2110.04627) keep the codebook in use; a code whose
    share falls below a tenth of the uniform one is restarted at a random latent of the batch.
    Until `initialise` is called latents pass through unquantised, so that an encoder can settle.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    initialised: Tensor

    def __init__(self, codebook_size: int, width: int, *, decay: float = 0.99) -> None:
        super().__init__()
        self.codebook_size, self.width, self.decay = codebook_size, width, decay
        self.register_buffer("codebook", torch.randn(codebook_size, width))
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", torch.randn(codebook_size, width))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self.codebook.copy_(nn.functional.normalize(self.codebook, dim=-1))
        self.sums.copy_(self.codebook)

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, latents: Tensor) -> Quantized:
        """latents: float (..., D); the loss is the commitment mean |z - sg(e)|^2."""
        unit = nn.functional.normalize(latents.float(), dim=-1)
        flat = unit.reshape(-1, self.width)
        codes = (flat.detach() @ self.codebook.T).argmax(-1)
        if not self.initialised:
            return Quantized(unit, codes.reshape(latents.shape[:-1]), unit.new_zeros(()))
        nearest = self.codebook[codes].reshape(unit.shape)
        if self.training:
            self._update(flat.detach(), codes)
        loss = (unit - nearest).square().sum(-1).mean()
        return Quantized(unit + (nearest - unit).detach(), codes.reshape(latents.shape[:-1]), loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """Unit vectors (..., D) of codes (...)."""
        return self.codebook[codes]

    @torch.no_grad()
    def initialise(
        self, latents: Tensor, generator: torch.Generator, *, num_steps: int = 20
    ) -> None:
        """Spherical k-means on latents (N, D), N >= K; switches quantisation on."""
        points = nn.functional.normalize(latents.float(), dim=-1)
        centres, counts = kmeans(
            points, self.codebook_size, generator, num_steps=num_steps, spherical=True
        )
        share = counts / counts.sum() * self.codebook_size
        self.codebook.copy_(centres)
        self.counts.copy_(share)
        self.sums.copy_(centres * share[:, None])
        self.initialised.fill_(True)

    def _update(self, points_ND: Tensor, codes_N: Tensor) -> None:
        counts_K = torch.bincount(codes_N, minlength=self.codebook_size).float()
        sums_KD = torch.zeros_like(self.sums).index_add_(0, codes_N, points_ND)
        scale = self.codebook_size / max(len(codes_N), 1)  # 1 = the uniform share
        self.counts.lerp_(counts_K * scale, 1 - self.decay)
        self.sums.lerp_(sums_KD * scale, 1 - self.decay)
        dead = self.counts < 0.1
        if dead.any():
            picks = torch.randint(len(points_ND), (int(dead.sum()),), device=points_ND.device)
            # sums are reset with the counts, or the next average would pull the code back
            self.counts[dead] = 1.0
            self.sums[dead] = points_ND[picks]
        self.codebook.copy_(nn.functional.normalize(self.sums, dim=-1))


@torch.no_grad()
def kmeans(
    points: Tensor,
    num_centres: int,
    generator: torch.Generator,
    *,
    num_steps: int = 25,
    spherical: bool = False,
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: centres (K, D) and how many points each took (K,), of points (N, D).

    Centres that lose all points restart at random points. Raises UserError when N < K.
    """
    if len(points) < num_centres:
        raise UserError(
            f"{len(points)} vectors are too few for {num_centres} centres; give more data"
        )
    centres = points[torch.randperm(len(points), generator=generator)[:num_centres]].clone()
    counts = torch.ones(num_centres)
    for _ in range(num_steps):
        nearest = nearest_centre(points, centres)
        counts = torch.bincount(nearest, minlength=num_centres).float()
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = counts == 0
        anew = torch.randint(len(points), (int(empty.sum()),), generator=generator)
        sums[empty], counts[empty] = points[anew], 1.0
        centres = sums / counts[:, None]
        if spherical:
            centres = nn.functional.normalize(centres, dim=-1)
    return centres, counts


def nearest_centre(points: Tensor, centres: Tensor, *, chunk: int = 16_384) -> Tensor:
    """Index (N,) of the nearest centre in squared distance, of points (N, D)."""
    bias = centres.square().sum(-1) / 2
    return torch.cat([(part @ centres.T - bias).argmax(-1) for part in points.split(chunk)])
