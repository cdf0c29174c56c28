"""The weights of experts, and their products with the rows that each of them got.

Legend: N rows, D width, E experts, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from mmpt.model.collectives import enter, leave, local
from mmpt.model.float8 import Linear

ROW_STEP = 32  # rows of an expert, see `row_step`


class Bank(nn.Module):
    """The weights of a group's experts; of some of them where others are on other ranks.

    gate_up: (E, D, 2, F), down: (E, F, D).
    """

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, width, 2, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.tensor_group: ProcessGroup | None = None  # ranks that share the hidden width
        self.linear: Linear | None = None  # how experts multiply, if not by grouped products

    def forward(self, x_ND: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        """x sorted by expert, `counts` (E,) rows for each -> what the experts make of them.

        Without counts all have equally many. What rows that no count covers give is undefined.
        """
        x_ND = enter(x_ND, self.tensor_group)
        gate_up, down = (local(w).to(x_ND.dtype) for w in (self.gate_up, self.down))
        inner = _products(x_ND, gate_up.flatten(2), counts, self.linear)
        y_ND = _products(_SwiGLU.apply(inner), down, counts, self.linear)
        return leave(y_ND, self.tensor_group)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """That of matrix products: autocast does not know grouped ones."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def row_step(x: torch.Tensor) -> int:
    """On CPUs each new shape of a bf16 product is compiled, which takes longer than the product.

    Decoding has few shapes, and few rows.
    """
    training = torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.bfloat16
    return ROW_STEP if training else 1


def lengthen(x: torch.Tensor) -> torch.Tensor:
    """x (..., N, D) with rows of zeros at the end, so that their number is one of few."""
    missing = -x.shape[-2] % row_step(x)
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _products(
    x_ND: torch.Tensor, w_EDF: torch.Tensor, counts_E: torch.Tensor | None, linear: Linear | None
) -> torch.Tensor:
    """Rows sorted by expert, each times the matrix of its expert."""
    num_experts, width, _ = w_EDF.shape
    if num_experts == 1:
        return _product(x_ND, w_EDF[0], linear)
    each = len(x_ND) // num_experts
    if linear is None and counts_E is None:
        return torch.bmm(x_ND.view(num_experts, each, width), w_EDF).flatten(0, 1)
    even = width % 8 == w_EDF.shape[2] % 8 == 0  # as it needs its rows to lie
    if linear is None and counts_E is not None and x_ND.dtype == torch.bfloat16 and even:
        # in other dtypes it is no faster than a loop
        return F.grouped_mm(x_ND, w_EDF, offs=counts_E.cumsum(0, dtype=torch.int32))
    counts = [each] * num_experts if counts_E is None else counts_E.tolist()
    rest = len(x_ND) - sum(counts)
    parts = zip(x_ND.split([*counts, rest]), w_EDF, strict=False)
    y = [_product(x, w, linear) for x, w in parts]
    return torch.cat(y + [x_ND.new_zeros(rest, w_EDF.shape[2])] * (rest > 0))


def _product(x_ND: torch.Tensor, w_DF: torch.Tensor, linear: Linear | None) -> torch.Tensor:
    return x_ND @ w_DF if linear is None else linear(x_ND, w_DF.T)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of both side by side; its gradient is written in one piece."""

    @staticmethod
    def forward(ctx, x_N2F):  # type: ignore[override] # torch's own signature is *args
        ctx.save_for_backward(x_N2F)
        gate, up = x_N2F.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override] # torch's own signature is *args
        (x_N2F,) = ctx.saved_tensors
        gate, up = x_N2F.chunk(2, dim=-1)
        out = torch.empty_like(x_N2F)
        for_gate, for_up = out.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=for_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=for_gate)
        return out
