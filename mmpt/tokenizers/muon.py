"""Muon for convolutions: the momentum of each kernel, made orthogonal, and Adam for all else.

Keller Jordan et al., "Muon" (2024); the scale that makes its steps as long as Adam's is that of
arXiv 2502.16982, section 2.2, so that both halves share one learning rate. torch.optim.Muon takes
matrices only; here a kernel counts as the matrix of its output channels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.9
BETAS, EPS = (0.9, 0.95), 1e-8  # of Adam
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Kernels are the parameters of four dimensions. Weight decay is decoupled, for all."""

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # no closure
        """Take a step along the gradients; parameters without one stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                move = self._orthogonal if parameter.ndim == 4 else self._adam
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(move(parameter, parameter.grad), alpha=-group["lr"])

    def _orthogonal(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        mean.lerp_(gradient, 1 - MOMENTUM)
        matrix = gradient.lerp(mean, MOMENTUM).flatten(1)
        return orthogonal(matrix).mul_(0.2 * max(matrix.shape) ** 0.5).view_as(parameter)

    def _adam(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["mean"], state["square"] = (torch.zeros_like(parameter) for _ in range(2))
            state["step"] = torch.zeros(())
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - BETAS[0])
        state["square"].lerp_(gradient.square(), 1 - BETAS[1])
        mean, square = (
            value / (1 - beta ** float(state["step"]))
            for value, beta in zip((state["mean"], state["square"]), BETAS, strict=True)
        )
        return mean / (square.sqrt() + EPS)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix of the same shape whose singular values are one."""
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-9)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T
