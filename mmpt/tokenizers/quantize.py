"""Quantisers: latents -> codes and back, behind one protocol, always in fp32.

Legend: N vectors, D latent width, K codebook size, Q codebooks.
"""

import abc
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from mmpt.config import UserError


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Which quantiser, and its size.

    levels: of fsq, whose codebook is their product. codebook_size and width: of all others
    (lfq and bsq have width log2(codebook_size)). num_codebooks above 1 makes it residual.
    """

    kind: Literal["fsq", "ema"] = "fsq"
    levels: tuple[int, ...] = ()
    codebook_size: int = 0
    width: int = 0
    num_codebooks: int = 1


@dataclass
class Quantized:
    """What a quantiser makes of latents.

    latents: float (..., D), straight-through; codes: int64 (..., Q); loss: a scalar to train on;
    parts: its terms by name, for the log.
    """

    latents: Tensor
    codes: Tensor
    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module, abc.ABC):
    """What a codec needs: `codebook_size` codes in each of `num_codebooks`, latents of `width`."""

    codebook_size: int
    width: int
    num_codebooks: int = 1

    @abc.abstractmethod
    def forward(self, latents: Tensor) -> Quantized:
        """Quantise float (..., D)."""

    @abc.abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """The quantised latents float (..., D) of codes int64 (..., Q)."""

    @property
    def ready(self) -> bool:
        """Whether there is a codebook yet; `initialise` makes one."""
        return True

    def initialise(self, latents: Tensor, generator: torch.Generator) -> None:
        """Make a first codebook from latents (N, D), N >= K; most quantisers need none."""


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantiser that a config describes. Raises UserError in one line."""
    if config.num_codebooks != 1:
        raise UserError(f"num_codebooks = {config.num_codebooks}; only 1 so far")
    if config.kind == "fsq":
        return FSQ(config.levels)
    return EMAVectorQuantizer(config.codebook_size, config.width)


class FSQ(Quantizer):
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
        codes = (digits.round().long() * self._basis).sum(-1, keepdim=True)
        return Quantized(self._scale(passed), codes, latents.new_zeros((), dtype=torch.float32))

    def lookup(self, codes: Tensor) -> Tensor:
        """Quantised latents (..., D) in [-1, 1]."""
        levels = self._levels.long()
        digits = (codes // self._basis) % levels
        return self._scale((digits - levels // 2).float())

    def _scale(self, rounded: Tensor) -> Tensor:
        return rounded / self._levels.div(2, rounding_mode="floor")


class EMAVectorQuantizer(Quantizer):
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
        shaped = codes.reshape(*latents.shape[:-1], 1)
        if not self.ready:
            return Quantized(unit, shaped, unit.new_zeros(()))
        nearest = self.codebook[codes].reshape(unit.shape)
        if self.training:
            self._update(flat.detach(), codes)
        loss = (unit - nearest).square().sum(-1).mean()
        return Quantized(unit + (nearest - unit).detach(), shaped, loss, {"commitment": loss})

    def lookup(self, codes: Tensor) -> Tensor:
        """Unit vectors (..., D)."""
        return self.codebook[codes[..., 0]]

    @property
    def ready(self) -> bool:
        return bool(self.initialised)

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
