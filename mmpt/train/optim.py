"""The optimiser: AdamW with decay by rule; learning rates are pure functions of the step."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mmpt.config import UserError

NO_DECAY = ("embedding", "norm")  # parts of names; one-dimensional weights never decay either


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Rates and limits of AdamW."""

    lr: float = 3e-3
    warmup: int = 50  # steps of linear rise
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    decay: float = 0.2  # wsd: the share of all steps over which the rate falls, at the end
    final: float = 0.05  # the rate at the end, as a part of lr
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # largest gradient norm; 0: no limit

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.warmup < 0 or self.clip < 0:
            raise UserError(
                f"optim: lr = {self.lr}, warmup = {self.warmup}, clip = {self.clip}; "
                "use lr above 0, the others at least 0"
            )
        if not (0 <= self.decay <= 1 and 0 <= self.final <= 1):
            raise UserError(
                f"optim: decay = {self.decay} and final = {self.final} are shares; use 0 to 1"
            )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of step `step` (from 0) of a run of `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return config.lr * (config.final + (1 - config.final) * _height(step, steps, config))


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are trained, in groups: with and without weight decay.

    Parameters that are spread over other ranks are in groups of their own, for what is computed
    together must be spread alike.
    """
    groups: dict[tuple[bool, DeviceMesh | None], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups[decays(name, parameter), mesh].append((name, parameter))
    return torch.optim.AdamW(
        [
            {"params": named, "weight_decay": config.weight_decay if decay else 0.0}
            for (decay, _), named in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices that are no embedding and no norm."""
    return parameter.ndim > 1 and not any(part in name for part in NO_DECAY)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this rate from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def _height(step: int, steps: int, config: OptimConfig) -> float:
    """Between 1 (the full rate) and 0 (the final one)."""
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(steps - config.warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    # warm up, stay, then fall linearly over the last share of steps (arXiv 2404.06395)
    return min(1.0, (steps - step) / max(config.decay * steps, 1))
