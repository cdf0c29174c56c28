"""Learned codebooks: moving averages with restarts, SimVQ, and the search that they share.

Legend: N vectors, D latent width, K codebook size.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.config import UserError
from mmpt.tokenizers.quantize import Quantized, Quantizer, pass_through

# similarities that are held at once: 1 MiB stays in a core's cache, and a GPU wants large tiles
TILE = {"cpu": 2**18, "cuda": 2**26}
MIN_POINTS, MAX_CODES = 64, 16_384  # of one tile
RESTART_BELOW = 0.1  # of the uniform share


@torch.no_grad()
def nearest_centre(points: Tensor, centres: Tensor) -> Tensor:
    """Index (N,) of the nearest centre in squared distance, of points (N, D); ties: the first."""
    return most_similar(points, centres, centres.square().sum(-1) / 2)


@torch.no_grad()
def most_similar(points: Tensor, centres: Tensor, bias: Tensor | None = None) -> Tensor:
    """Index (N,) of the centre (K, D) with the largest dot product less bias (K,); ties: the first.

    points: fp32 (N, D). Searched in tiles, so that memory does not grow with N x K.
    """
    best, values = None, None
    for first in range(0, len(centres), MAX_CODES):
        part = slice(first, first + MAX_CODES)
        value, index = _search(points, centres[part], None if bias is None else bias[part])
        if best is None or values is None:
            best, values = index, value
        else:
            better = value > values
            best = torch.where(better, index + first, best)
            values = torch.where(better, value, values)
    assert best is not None
    return best


def _search(points: Tensor, centres: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(largest value (N,), its index (N,)) for up to MAX_CODES centres."""
    num_codes = len(centres)
    # an argmax over all codes is slow, a maximum is not: find the block, then look into it
    block = _divisor_near_root(num_codes)
    size = max(TILE.get(points.device.type, TILE["cuda"]) // num_codes, MIN_POINTS)
    size = min(size, max(len(points), 1))
    tile = points.new_empty(num_codes * size)
    every = torch.arange(size, device=points.device)
    values, codes = [points.new_empty(0)], [every[:0]]
    for part in points.split(size):
        # code by code in memory, which makes both the product and the maximum fast
        similar = tile[: num_codes * len(part)].view(num_codes, len(part))
        if bias is None:
            torch.mm(centres, part.T, out=similar)
        else:
            torch.addmm(bias[:, None], centres, part.T, beta=-1, out=similar)
        blocks = similar.view(num_codes // block, block, len(part))
        which = blocks.amax(1).max(0).indices
        value, within = blocks[which, :, every[: len(part)]].max(-1)
        values.append(value)
        codes.append(which * block + within)
    return torch.cat(values), torch.cat(codes)


def _divisor_near_root(number: int) -> int:
    root = math.isqrt(number)
    return next(d for d in range(root, 0, -1) if number % d == 0)


class EMAVectorQuantizer(Quantizer):
    """Nearest neighbour; moving averages learn the codebook (1711.00937, A.1).

    spherical: latents and codes are unit vectors, which, low-dimensional, keep the codebook in use
    (arXiv 2110.04627). A code whose share falls below a tenth of the uniform one is restarted at a
    random latent of the batch. All ranks of torch.distributed keep the same codebook.
    Until `initialise` is called latents pass through unquantised, so that an encoder can settle.
    The loss is the commitment |z - sg(e)|^2, of one vector on average.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    initialised: Tensor

    def __init__(
        self, codebook_size: int, width: int, *, decay: float = 0.99, spherical: bool = True
    ) -> None:
        super().__init__()
        self.codebook_size, self.width = codebook_size, width
        self.decay, self.spherical = decay, spherical
        codebook = self.bound(torch.randn(codebook_size, width))
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(codebook_size))
        self.register_buffer("sums", codebook.clone())
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def bound(self, latents: Tensor) -> Tensor:
        """To the unit sphere, where the codes are."""
        bounded = super().bound(latents)
        return F.normalize(bounded, dim=-1) if self.spherical else bounded

    def snap(self, bounded: Tensor) -> Quantized:
        """The nearest code; in training, the codebook moves."""
        flat = bounded.detach().reshape(-1, self.width)
        find = most_similar if self.spherical else nearest_centre
        codes = find(flat, self.codebook)
        shaped = codes.reshape(*bounded.shape[:-1], 1)
        if not self.ready:
            return Quantized(bounded, shaped, bounded.new_zeros(()))
        nearest = self.lookup(shaped)
        latents = pass_through(nearest, bounded)
        if not self.learns:
            return Quantized(latents, shaped, latents.new_zeros(()))
        loss = (bounded - nearest).square().sum(-1).mean()
        if self.training:
            self._update(flat, codes)
        return Quantized(latents, shaped, loss, {"commitment": loss})

    def lookup(self, codes: Tensor) -> Tensor:
        """Codebook vectors (..., D)."""
        return F.embedding(codes[..., 0], self.codebook)

    @property
    def ready(self) -> bool:
        return bool(self.initialised)

    @torch.no_grad()
    def initialise(
        self, latents: Tensor, generator: torch.Generator, *, num_steps: int = 20
    ) -> None:
        """k-means on latents (N, D), N >= K, of rank 0; switches quantisation on."""
        centres, counts = kmeans(
            self.bound(latents.float()),
            self.codebook_size,
            generator,
            num_steps=num_steps,
            spherical=self.spherical,
        )
        _broadcast(centres, counts)
        share = counts / counts.sum() * self.codebook_size
        self.codebook.copy_(centres)
        self.counts.copy_(share)
        self.sums.copy_(centres * share[:, None])
        self.initialised.fill_(True)

    @torch.no_grad()
    def _update(self, points_ND: Tensor, codes_N: Tensor) -> None:
        counts_K = torch.bincount(codes_N, minlength=self.codebook_size).float()
        sums_KD = torch.zeros_like(self.sums).index_add_(0, codes_N, points_ND)
        _sum_over_ranks(counts_K, sums_KD)
        total = counts_K.sum()
        if not total or not torch.isfinite(sums_KD).all():
            return  # one bad batch would stay in the averages forever
        scale = self.codebook_size / total  # 1 = the uniform share
        self.counts.lerp_(counts_K * scale, 1 - self.decay)
        self.sums.lerp_(sums_KD * scale, 1 - self.decay)
        dead = self.counts < RESTART_BELOW
        if dead.any():
            picks = torch.randint(len(points_ND), (int(dead.sum()),), device=points_ND.device)
            anew = points_ND[picks]
            _broadcast(anew)
            # sums are reset with the counts, or the next average would pull the code back
            self.counts[dead] = 1.0
            self.sums[dead] = anew
        if self.spherical:
            self.codebook.copy_(F.normalize(self.sums, dim=-1))
        else:
            self.codebook.copy_(self.sums / self.counts[:, None])


class SimVQ(Quantizer):
    """A codebook C W of frozen random vectors C and one learned map W (arXiv 2411.02038).

    Every step moves every code, so none dies. The loss is |sg(z) - q|^2 + .25 |z - sg(q)|^2 (eq. 5;
    the codebook follows the encoder more than the other way round). Without training the product is
    computed once and kept as a table.
    """

    frozen: Tensor

    def __init__(self, codebook_size: int, width: int) -> None:
        super().__init__()
        self.codebook_size, self.width = codebook_size, width
        self.register_buffer("frozen", torch.randn(codebook_size, width) / math.sqrt(width))
        self.weight = nn.Parameter(torch.eye(width))
        self._baked: tuple[tuple, Tensor] | None = None

    @property
    def codebook(self) -> Tensor:
        """C W (K, D), without a gradient; computed anew when a factor has changed."""
        factors = (self.frozen, self.weight)
        if any(factor.is_inference() for factor in factors):  # whose changes nobody counts
            return self.frozen @ self.weight.detach()
        state = tuple((f.data_ptr(), f._version, f.device) for f in factors)
        if self._baked is None or self._baked[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # training may read it later
                self._baked = (state, self.frozen @ self.weight)
        return self._baked[1]

    def snap(self, bounded: Tensor) -> Quantized:
        """The nearest code in squared distance."""
        flat = bounded.detach().reshape(-1, self.width)
        codes = nearest_centre(flat, self.codebook)
        shaped = codes.reshape(*bounded.shape[:-1], 1)
        latents = pass_through(self.lookup(shaped), bounded)
        if not self.learns:
            return Quantized(latents, shaped, latents.new_zeros(()))
        quantised = (self.frozen[codes] @ self.weight).reshape(bounded.shape)
        codebook = (bounded.detach() - quantised).square().mean()
        commitment = (bounded - quantised.detach()).square().mean()
        parts = {"codebook": codebook, "commitment": commitment}
        return Quantized(latents, shaped, codebook + 0.25 * commitment, parts)

    def lookup(self, codes: Tensor) -> Tensor:
        """Rows (..., D) of the table."""
        return F.embedding(codes[..., 0], self.codebook)


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
    # the picks are the generator's, wherever the points are
    first = torch.randperm(len(points), generator=generator)[:num_centres]
    centres = points[first.to(points.device)].clone()
    counts = torch.ones(num_centres, device=points.device)
    for _ in range(num_steps):
        nearest = nearest_centre(points, centres)
        counts = torch.bincount(nearest, minlength=num_centres).float()
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = counts == 0
        anew = torch.randint(len(points), (int(empty.sum()),), generator=generator)
        sums[empty], counts[empty] = points[anew.to(points.device)], 1.0
        centres = sums / counts[:, None]
        if spherical:
            centres = F.normalize(centres, dim=-1)
    return centres, counts


def _sum_over_ranks(*tensors: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def _broadcast(*tensors: Tensor) -> None:
    """What rank 0 has becomes what all have."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
