"""The optimiser: AdamW or Muon, with decay and rates by rule, and rates as functions of the step.

With `mup_base_width`, what is tuned at that width holds at any other (arXiv 2203.03466): hidden
matrices start with variance 1 / fan in, as they do anyway, and Adam moves them at a rate of
base / width; embeddings and heads move at the same rate at any width. The logits, of a tied head
too, are multiplied by base / width. Since the final norm comes just before the head, its scale is
that multiplier: it starts at base / width and moves at that rate, so that nothing but the first
weights and the rates knows of it. Muon's steps have the spectral norm lr x 0.2 sqrt(width), where a
constant one is due (arXiv 2310.17813), so its matrices move at a rate of sqrt(base / width). Head
widths must stay and their number grow; decay is divided by the rate's factor, so that weights live
equally long at any width (arXiv 2405.13698).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mmpt.config import UserError
from mmpt.model.attention import Attention
from mmpt.model.transformer import Decoder
from mmpt.muon import Matrices, Muon

NO_DECAY = ("embedding", "norm")  # parts of names; one-dimensional weights never decay either
VOCABULARY = {"embedding", "head"}  # one row an id: an id's row is a vector, not part of a map
# what Adam moves though it has two axes: routers are many small readouts, and an orthogonal step of
# one low-rank factor is no orthogonal step of the product
NOT_ORTHOGONAL = VOCABULARY | {"router", "auxiliary", "head_gate", "noisy_in", "noisy_out"}
POWER = -0.51  # of the tokens seen, arXiv 2408.13359


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Which optimiser, its rates and limits. Muon takes the rates of AdamW."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-3
    warmup: int = 50  # steps of linear rise
    schedule: Literal["wsd", "cosine", "constant", "power"] = "wsd"
    hold: int = 0  # power: the step at which the rate begins to fall as step^-0.51; 0: after warmup
    decay: float = 0.2  # wsd, power: the share of all steps over which the rate falls, at the end
    final: float = 0.05  # the rate at the end, as a part of lr
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # of Muon
    mup_base_width: int = 0  # the width that the rates are meant for; 0: the model's own
    clip: float = 1.0  # largest gradient norm; 0: no limit

    def __post_init__(self) -> None:
        if self.lr <= 0 or min(self.warmup, self.hold, self.clip, self.mup_base_width) < 0:
            raise UserError(
                f"optim: lr = {self.lr}, warmup = {self.warmup}, hold = {self.hold}, clip = "
                f"{self.clip}, mup_base_width = {self.mup_base_width}; use lr above 0, the others "
                "at least 0"
            )
        if not (0 <= self.decay <= 1 and 0 <= self.final <= 1):
            raise UserError(
                f"optim: decay = {self.decay} and final = {self.final} are shares; use 0 to 1"
            )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of step `step` (from 0) of a run of `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    height = _height(step, steps, config)
    if config.schedule == "power":  # the curve itself, not its height above the final rate
        return config.lr * max(config.final, height)
    return config.lr * (config.final + (1 - config.final) * height)


def build_optimizer(model: Decoder, config: OptimConfig) -> torch.optim.Optimizer:
    """An optimiser of the parameters that are trained, in groups of equal decay and rate.

    Parameters that are spread over other ranks are in groups of their own, for what is computed
    together must be spread alike.
    """
    groups: dict[tuple[float, float, DeviceMesh | None], list[tuple[str, nn.Parameter]]] = {}
    matrices: dict[torch.Tensor, Matrices] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.kind == "muon" and is_matrix(name, parameter):
            matrices[parameter] = matrices_of(model, name)
        scale = _lr_scale(name, parameter, model, config)
        decay = config.weight_decay / scale if decays(name, parameter) else 0.0
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((decay, scale, mesh), []).append((name, parameter))
    parameters = [
        {"params": named, "weight_decay": decay, "lr": config.lr * scale, "lr_scale": scale}
        for (decay, scale, _), named in groups.items()
    ]
    betas = (config.beta1, config.beta2)
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, betas=betas, fused=True)
    return Muon(
        parameters,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        betas=betas,
        matrices=matrices,
    )


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether this is a hidden matrix or a stack of some, which Muon makes orthogonal."""
    return parameter.ndim > 1 and not NOT_ORTHOGONAL & set(name.split("."))


def matrices_of(model: nn.Module, name: str) -> Matrices:
    """The maps that a parameter holds: q, k, v in one, gate and up of every expert, else it is one.

    Each is a map of its own, and its step should have all singular values at one. Together, the
    parts of a stack would share that: the one with the largest gradient takes most of it, and the
    scale would follow the stack's height.
    """
    owner, _, leaf = name.rpartition(".")
    if leaf == "project_in":
        attention = model.get_submodule(owner)
        assert isinstance(attention, Attention)
        sizes, width = (attention.num_queries, 1, 1), attention.head_width
        return Matrices(
            lambda stack: [
                part.flatten(-4, -2)
                for part in stack.unflatten(-2, (-1, sum(sizes), width)).split(sizes, -3)
            ],
            lambda parts: torch.cat(
                [p.unflatten(-2, (-1, n, width)) for p, n in zip(parts, sizes, strict=True)], -3
            ).flatten(-4, -2),
            stacked=attention.project_in.ndim == 3,
        )
    if leaf == "gate_up":
        return Matrices(
            lambda stack: list(stack.unbind(2)), lambda parts: torch.stack(parts, 2), stacked=True
        )
    stacked = model.get_parameter(name).ndim == 3
    return Matrices(lambda matrix: [matrix], lambda parts: parts[0], stacked=stacked)


@torch.no_grad()
def initialise_mup(model: Decoder, config: OptimConfig) -> None:
    """Make a fresh model's first weights those of `mup_base_width`; nothing where that is 0."""
    factor = _width_factor(model, config)
    model.norm.scale.mul_(factor)
    if model.head is not None and config.mup_base_width:
        model.head.zero_()  # else its random part would fade with the width (microsoft/mup#7)
    for name, parameter in model.named_parameters():
        if name.endswith(".router"):  # its output has no width: 1 / fan in, not its root
            parameter.mul_(factor**0.5)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices that are no embedding and no norm."""
    return parameter.ndim > 1 and not any(part in name for part in NO_DECAY)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this rate from now on, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def _height(step: int, steps: int, config: OptimConfig) -> float:
    """Between 1 (the full rate) and 0 (the final one)."""
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(steps - config.warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    # warm up, stay, then fall linearly over the last share of steps (arXiv 2404.06395)
    tail = min(1.0, (steps - step) / max(config.decay * steps, 1))
    if config.schedule == "wsd":
        return tail
    # min(eta_max, beta a n^b) of n tokens seen: with batches of one size n is a multiple of the
    # step, so that lr (eta_max) and the step where the curve meets it stand for beta and a
    hold = max(config.hold, config.warmup, 1)
    return tail * min(1.0, ((step + 1) / hold) ** POWER)


def _width_factor(model: Decoder, config: OptimConfig) -> float:
    return config.mup_base_width / model.config.width if config.mup_base_width else 1.0


def _lr_scale(name: str, parameter: torch.Tensor, model: Decoder, config: OptimConfig) -> float:
    factor, parts = _width_factor(model, config), name.split(".")
    if name == "norm.scale":
        return factor  # see above: the multiplier of the logits
    if parameter.ndim < 2 or VOCABULARY & set(parts) or parts[-1] == "up":
        return 1.0  # vectors, and what is read from an id or from a low rank: no width is summed
    if config.kind == "muon" and is_matrix(name, parameter):
        return factor**0.5
    return factor
