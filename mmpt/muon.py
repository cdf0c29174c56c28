"""Muon: the momentum of each matrix, made orthogonal, and Adam for all else.

Keller Jordan et al., "Muon" (2024); the scale that makes its steps as long as Adam's is that of
arXiv 2502.16982, section 2.2, so that both halves share one learning rate. torch.optim.Muon takes
single matrices only; here a matrix may also be a kernel, an expert of a stack, or one of several
that one parameter holds side by side.

Parameters may be DTensors. A matrix that is divided over ranks is gathered, and every rank makes
all of it orthogonal: that is exact, and repeats the work. Stacks divided by experts stay where they
are, for each expert is whole on its rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

EPS = 1e-8  # of Adam
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
ROUNDS = 5


@dataclass(frozen=True)
class Matrices:
    """How a parameter divides into matrices (..., m, n), and is made of them again.

    stacked: each index of the first axis has matrices of its own, such as those of one expert.
    """

    divide: Callable[[Tensor], list[Tensor]]
    join: Callable[[list[Tensor]], Tensor]
    stacked: bool = False


def _kernel(parameter: Tensor) -> Matrices:
    """The matrix of a kernel's output channels."""
    shape = parameter.shape
    return Matrices(lambda k: [k.flatten(1)], lambda parts: parts[0].view(shape))


class Muon(torch.optim.Optimizer):
    """One state a parameter: `mean` of a matrix; `mean`, `square`, `step` of all else.

    matrices: what is made orthogonal, by parameter; the kernels of four dimensions unless given.
    Weight decay is decoupled, for all.
    """

    def __init__(
        self,
        parameters: ParamsT,
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.95),
        matrices: Mapping[Tensor, Matrices] | None = None,
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas}
        super().__init__(parameters, options)
        if matrices is None:
            every = (parameter for group in self.param_groups for parameter in group["params"])
            matrices = {p: _kernel(p) for p in every if p.ndim == 4}
        self._matrices = matrices

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # no closure
        """Take a step along the gradients; parameters without one stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                move = self._orthogonal if parameter in self._matrices else self._adam
                change = move(parameter, parameter.grad, group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(change, alpha=-group["lr"])

    def _orthogonal(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state, momentum = self.state[parameter], group["momentum"]
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        state["mean"].lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(state["mean"], momentum)  # Nesterov's
        if ahead.is_cuda:  # before it is gathered: half the bytes; the iteration tolerates it
            ahead = ahead.bfloat16()
        return _orthogonal_parts(ahead, self._matrices[parameter])

    def _adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state, betas = self.state[parameter], group["betas"]
        if not state:
            state["mean"], state["square"] = (torch.zeros_like(parameter) for _ in range(2))
            state["step"] = torch.zeros(())
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - betas[0])
        state["square"].lerp_(gradient.square(), 1 - betas[1])
        mean, square = (
            value / (1 - beta ** float(state["step"]))
            for value, beta in zip((state["mean"], state["square"]), betas, strict=True)
        )
        return mean.div_(square.sqrt_().add_(EPS))


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrices (..., m, n) whose singular values are one, in the same dtype."""
    a, b, c = COEFFICIENTS
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-9)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def _make_orthogonal(tensor: Tensor, matrices: Matrices) -> Tensor:
    return matrices.join(
        [
            orthogonal(part).mul_(0.2 * max(part.shape[-2:]) ** 0.5)
            for part in matrices.divide(tensor)
        ]
    )


def _orthogonal_parts(tensor: Tensor, matrices: Matrices) -> Tensor:
    """`_make_orthogonal` of a tensor that may be divided over ranks, divided in the same way."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    if not isinstance(tensor, DTensor):
        return _make_orthogonal(tensor, matrices)
    mesh, placements = tensor.device_mesh, tensor.placements
    if matrices.stacked and all(each.is_replicate() or each == Shard(0) for each in placements):
        mine = _make_orthogonal(tensor.to_local(), matrices)
        return DTensor.from_local(
            mine, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    # every rank holds the same whole: each cuts its own shard, and nothing is sent
    made = _make_orthogonal(tensor.full_tensor(), matrices)
    return distribute_tensor(made, mesh, placements, src_data_rank=None)
