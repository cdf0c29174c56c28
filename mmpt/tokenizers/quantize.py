"""Quantisers: latents -> codes and back, behind one protocol, always in fp32.

Every quantiser first bounds the latents (to a box, to the unit sphere, or not at all) and then
snaps them to a codebook. This file holds the protocol, FSQ and the residual wrapper; signs are in
`binary`, learned codebooks in `codebooks` and `ibq`.

Legend: N vectors, D latent width, K codebook size, Q codebooks.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from mmpt.config import UserError

HUGE = 1e15  # latents are cut to this, so that squared norms of any width stay finite


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Which quantiser, and its size.

    levels: of fsq, whose codebook is their product. codebook_size and width: of all others
    (lfq and bsq have width log2(codebook_size), which may be left 0). num_codebooks above 1 makes
    it residual; dropout is then the chance that a training step uses only the first few.
    entropy: weight of the entropy term of ibq, lfq and bsq.
    """

    kind: Literal["fsq", "ema", "simvq", "ibq", "lfq", "bsq"] = "fsq"
    levels: tuple[int, ...] = ()
    codebook_size: int = 0
    width: int = 0
    num_codebooks: int = 1
    dropout: float = 0.0
    entropy: float = 0.05


@dataclass
class Quantized:
    """What a quantiser makes of latents.

    latents: float (..., D), with a gradient for the encoder; codes: int64 (..., Q); loss: a scalar
    to train on, 0 where no gradient is wanted; parts: its terms by name, unweighted, for the log.
    """

    latents: Tensor
    codes: Tensor
    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parts = {name: term.detach() for name, term in self.parts.items()}


class Quantizer(nn.Module, abc.ABC):
    """What a codec needs: `codebook_size` codes in each of `num_codebooks`, latents of `width`.

    Codes are legal for any finite latents, and do not depend on autocast. The latents that come
    out have the values of `lookup(codes)`, exactly.
    """

    codebook_size: int
    width: int
    num_codebooks: int = 1
    straight_through = True  # the gradient skips the snapping; if not, it has its own way
    step: float | Tensor = 1.0  # size of what snapping leaves over, where it is known beforehand

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, latents: Tensor) -> Quantized:
        """Quantise float (..., D)."""
        return self.snap(self.bound(latents.float()))

    def bound(self, latents: Tensor) -> Tensor:
        """What the codes approximate: latents fp32 (..., D), brought to the codebook's domain."""
        return latents.clamp(-HUGE, HUGE)

    @abc.abstractmethod
    def snap(self, bounded: Tensor) -> Quantized:
        """Quantise what `bound` made, or a residual of it."""

    @abc.abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """The quantised latents float (..., D) of codes int64 (..., Q)."""

    @property
    def ready(self) -> bool:
        """Whether there is a codebook yet; `initialise` makes one."""
        return True

    def initialise(self, latents: Tensor, generator: torch.Generator) -> None:
        """Make a first codebook from latents (N, D), N >= K; most quantisers need none."""

    @property
    def learns(self) -> bool:
        """Whether losses are wanted. A frozen quantiser still teaches the encoder before it."""
        return self.training or torch.is_grad_enabled()


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantiser that a config describes. Raises UserError in one line."""
    if config.num_codebooks < 1 or not 0 <= config.dropout < 1:
        raise UserError(
            f"num_codebooks = {config.num_codebooks}, dropout = {config.dropout}; "
            "give 1 or more codebooks and a dropout in [0, 1)"
        )
    layers = [_build_one(config) for _ in range(config.num_codebooks)]
    return layers[0] if len(layers) == 1 else ResidualQuantizer(layers, dropout=config.dropout)


def _build_one(config: QuantizerConfig) -> Quantizer:
    if config.kind == "fsq":
        return FSQ(config.levels)
    # the others build on this file
    from mmpt.tokenizers.binary import BSQ, LFQ
    from mmpt.tokenizers.codebooks import EMAVectorQuantizer, SimVQ
    from mmpt.tokenizers.ibq import IBQ

    if config.kind in ("lfq", "bsq"):
        made = LFQ if config.kind == "lfq" else BSQ
        quantizer = made(config.codebook_size, entropy_weight=config.entropy)
        if config.width not in (0, quantizer.width):
            raise UserError(
                f"width = {config.width}: {config.kind} of {config.codebook_size} codes has "
                f"width {quantizer.width}; leave it out"
            )
        return quantizer
    if config.codebook_size < 2 or config.width < 1:
        raise UserError(
            f"{config.kind} needs codebook_size of 2 or more and width of 1 or more; got "
            f"{config.codebook_size} and {config.width}"
        )
    if config.kind == "ema":
        # residuals have a length that matters: no sphere for them
        spherical = config.num_codebooks == 1
        return EMAVectorQuantizer(config.codebook_size, config.width, spherical=spherical)
    if config.kind == "simvq":
        return SimVQ(config.codebook_size, config.width)
    return IBQ(config.codebook_size, config.width, entropy_weight=config.entropy)


def pass_through(quantised: Tensor, bounded: Tensor) -> Tensor:
    """Straight-through estimator (1308.3432): the values of `quantised`, gradient to `bounded`.

    The added difference is exactly zero, so values equal those of a lookup.
    """
    if not (torch.is_grad_enabled() and bounded.requires_grad):
        return quantised
    return quantised.detach() + (bounded - bounded.detach())


class FSQ(Quantizer):
    """Finite scalar quantisation (arXiv 2309.15505): round each bounded dimension to its levels.

    No codebook, no loss, no state, so nothing can collapse. levels: at least 2 each. The code is
    the mixed-radix number of the digits, the first dimension least significant.
    """

    _scale: Tensor
    _offset: Tensor
    _shift: Tensor
    _middle: Tensor
    _top: Tensor
    _levels: Tensor
    _basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise UserError(f"levels {levels}: give one or more, each at least 2")
        self.levels = levels
        self.width = len(levels)
        self.codebook_size = math.prod(levels)
        count = torch.tensor(levels, dtype=torch.float32)
        # the slack lets the outer levels be reached; with many levels it must not round to another
        half = (count - 1) * (1 + (0.5 / count).clamp(max=1e-3)) / 2
        offset = torch.where(count % 2 == 0, 0.5, 0.0)
        middle = count.div(2, rounding_mode="floor")
        basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
        constants = {
            "_scale": half / middle,
            "_offset": -offset / middle,
            "_shift": torch.atanh(offset / half),
            "_middle": middle,
            "_top": count - 1 - middle,
            "_levels": count.long(),
            "_basis": basis,
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def step(self) -> Tensor:  # type: ignore[override] # a constant here, too
        return 0.5 / self._middle

    def bound(self, latents: Tensor) -> Tensor:
        """Eq. 1 of the paper, divided by half the levels: about [-1, 1]."""
        return torch.addcmul(self._offset, (latents + self._shift).tanh_(), self._scale)

    def snap(self, bounded: Tensor) -> Quantized:
        """Round to the nearest of each dimension's levels."""
        rounded = (bounded.detach() * self._middle).round_().clamp_(-self._middle, self._top)
        # fp64 counts exactly, and a product with a vector is the fastest sum
        codes = ((rounded + self._middle).double() @ self._basis.double()).long()[..., None]
        latents = pass_through(rounded / self._middle, bounded)
        return Quantized(latents, codes, latents.new_zeros(()))

    def lookup(self, codes: Tensor) -> Tensor:
        """Quantised latents (..., D) in [-1, 1]."""
        digits = (codes // self._basis) % self._levels
        return (digits.float() - self._middle) / self._middle


class ResidualQuantizer(Quantizer):
    """Several codebooks: each quantises what the ones before leave (arXiv 2107.03312, alg. 1).

    Only the first bounds the latents. A quantiser of fixed corners (fsq, lfq, bsq) sees its
    residual enlarged by the steps before it; learned codebooks find their own scale. `lookup` adds
    up as many codebooks as it is given, so fewer of them make a coarser decoding.
    """

    def __init__(self, layers: Sequence[Quantizer], *, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.width, self.codebook_size = layers[0].width, layers[0].codebook_size
        self.num_codebooks = len(layers)
        self.straight_through = layers[0].straight_through
        self.dropout = dropout

    def bound(self, latents: Tensor) -> Tensor:
        """As the first codebook does."""
        return self._layers[0].bound(latents)

    def snap(self, bounded: Tensor) -> Quantized:
        """Codebook after codebook; the loss and its parts are means over them."""
        outs: list[Quantized] = []
        residual, made = bounded, torch.zeros_like(bounded)
        num_used = self._num_used()
        for index, (layer, scale) in enumerate(zip(self._layers, self._scales(), strict=True)):
            out = layer.snap(residual / scale)
            outs.append(out)
            # the gradient of the residual is the one of the latents: codebooks count once each
            residual = residual - out.latents.detach() * scale
            if index < num_used:
                made = made + out.latents * scale
        if self.straight_through:  # once, not once for every codebook
            made = pass_through(made, bounded)
        codes = torch.cat([out.codes for out in outs], dim=-1)
        loss = torch.stack([out.loss for out in outs]).mean()
        parts = {k: torch.stack([out.parts[k] for out in outs]).mean() for k in outs[0].parts}
        return Quantized(made, codes, loss, parts)

    def lookup(self, codes: Tensor) -> Tensor:
        """The sum over the codebooks of codes (..., up to Q), float (..., D)."""
        parts = codes.split(1, dim=-1)
        made = torch.zeros(())
        for layer, scale, part in zip(self._layers, self._scales(), parts, strict=False):
            made = made.to(codes.device) + layer.lookup(part) * scale
        return made

    @property
    def ready(self) -> bool:
        return all(layer.ready for layer in self._layers)

    @torch.no_grad()
    def initialise(self, latents: Tensor, generator: torch.Generator) -> None:
        """Each codebook from what the ones before it leave of latents (N, D)."""
        training, residual = self.training, self.bound(latents.float())
        self.eval()  # looking at what is left is no step of training
        for layer, scale in zip(self._layers, self._scales(), strict=True):
            layer.initialise(residual / scale, generator)
            residual = residual - layer.snap(residual / scale).latents * scale
        self.train(training)

    @property
    def _layers(self) -> list[Quantizer]:
        return list(self.layers)  # type: ignore[arg-type] # built from quantisers

    def _scales(self) -> list[float | Tensor]:
        step = self._layers[0].step
        return [step**index for index in range(self.num_codebooks)]

    def _num_used(self) -> int:
        # from the global generator, as the restarts of dead codes
        if self.training and torch.rand(()) < self.dropout:
            return int(torch.randint(1, self.num_codebooks, ()))
        return self.num_codebooks
