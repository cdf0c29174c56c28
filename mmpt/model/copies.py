"""Rows of ids to experts and back: permutations, copies, and their sums, forward and backward.

All sums add rows in a fixed order, so that results do not differ from run to run.

Legend: N ids, G ids of a group, D width, E experts, C experts per id, K ids per expert, P places of
copies of ids.
"""

from dataclasses import dataclass

import torch

from mmpt.model.dispatch import invert


def permute(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Rows of x in another order."""
    return _Permute.apply(x, order, inverse)  # type: ignore[return-value] # apply is untyped


def scatter(x_GD: torch.Tensor, row_P: torch.Tensor, inverse_GC: torch.Tensor) -> torch.Tensor:
    """(P, D): copies of the rows of x, as `row_P` names them; a row has its at `inverse_GC`."""
    return _Scatter.apply(x_GD, row_P, inverse_GC)  # type: ignore[return-value] # apply is untyped


def gather(
    y_PD: torch.Tensor, gates_GC: torch.Tensor, row_P: torch.Tensor, inverse_GC: torch.Tensor
) -> torch.Tensor:
    """(G, D): the sum of what experts made of each row's copies, times their gates."""
    return _Gather.apply(y_PD, gates_GC, row_P, inverse_GC)  # type: ignore[return-value] # apply is untyped


def take(x_GD: torch.Tensor, rows_EK: torch.Tensor) -> torch.Tensor:
    """(E, K, D): the rows that each expert takes, each at most once."""
    return _Take.apply(x_GD, rows_EK)  # type: ignore[return-value] # apply is untyped


def give(
    y_EKD: torch.Tensor, gates_EK: torch.Tensor, rows_EK: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """(num_rows, D): the sum of what experts made of each row, times their gates."""
    return _Give.apply(y_EKD, gates_EK, rows_EK, num_rows)  # type: ignore[return-value] # apply is untyped


@dataclass(frozen=True)
class Places:
    """Where the N copies of ids stand, sorted by expert, with P - N places that nobody reads."""

    order_P: torch.Tensor  # the copy at each place; any where nobody reads
    inverse_N: torch.Tensor  # the place of each copy
    counts_E: torch.Tensor  # places of each expert

    @classmethod
    def plan(cls, expert_N: torch.Tensor, counts_E: torch.Tensor, *, step: int) -> "Places":
        """step: what the places of an expert are a multiple of."""
        order = torch.argsort(expert_N, stable=True)
        if step == 1:
            return cls(order, invert(order), counts_E)
        longer_E = (counts_E + (step - 1)) // step * step
        shift_E = longer_E.cumsum(0) - longer_E - counts_E.cumsum(0) + counts_E
        place_N = torch.arange(len(order), device=order.device) + shift_E[expert_N[order]]
        order_P = order.new_zeros(int(longer_E.sum())).index_copy_(0, place_N, order)
        inverse_N = torch.empty_like(order).index_copy_(0, order, place_N)
        return cls(order_P, inverse_N, longer_E)


class _Permute(torch.autograd.Function):
    """x[order], whose gradient is a gather too (index_select would scatter, which is slower)."""

    @staticmethod
    def forward(ctx, x, order, inverse):  # type: ignore[override] # torch's own signature is *args
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override] # torch's own signature is *args
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_GD, row_P, inverse_GC):  # type: ignore[override] # torch's own signature is *args
        ctx.save_for_backward(inverse_GC)
        return x_GD.index_select(0, row_P)

    @staticmethod
    def backward(ctx, gradient_PD):  # type: ignore[override] # torch's own signature is *args
        (inverse_GC,) = ctx.saved_tensors
        return _sum_copies(gradient_PD, inverse_GC), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_PD, gates_GC, row_P, inverse_GC):  # type: ignore[override] # torch's own signature is *args
        ctx.save_for_backward(y_PD, gates_GC, row_P, inverse_GC)
        return _sum_copies(y_PD, inverse_GC, gates_GC)

    @staticmethod
    def backward(ctx, gradient_GD):  # type: ignore[override] # torch's own signature is *args
        y_PD, gates_GC, row_P, inverse_GC = ctx.saved_tensors
        gradient_PD = gradient_GD.to(gates_GC.dtype).index_select(0, row_P)
        for_gates_P = (gradient_PD * y_PD.to(gates_GC.dtype)).sum(-1)
        gates_P = gates_GC.new_zeros(len(row_P))  # nothing comes back from unread places
        gates_P[inverse_GC.flatten()] = gates_GC.flatten()
        gradient_PD *= gates_P[:, None]
        return gradient_PD.to(y_PD.dtype), for_gates_P[inverse_GC], None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_GD, rows_EK):  # type: ignore[override] # torch's own signature is *args
        ctx.save_for_backward(rows_EK)
        ctx.num_rows = len(x_GD)
        return x_GD.index_select(0, rows_EK.flatten()).view(*rows_EK.shape, x_GD.shape[1])

    @staticmethod
    def backward(ctx, gradient_EKD):  # type: ignore[override] # torch's own signature is *args
        (rows_EK,) = ctx.saved_tensors
        return _sum_taken(gradient_EKD, rows_EK, ctx.num_rows), None


class _Give(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_EKD, gates_EK, rows_EK, num_rows):  # type: ignore[override] # torch's own signature is *args
        ctx.save_for_backward(y_EKD, gates_EK, rows_EK)
        return _sum_taken(y_EKD, rows_EK, num_rows, gates_EK)

    @staticmethod
    def backward(ctx, gradient_GD):  # type: ignore[override] # torch's own signature is *args
        y_EKD, gates_EK, rows_EK = ctx.saved_tensors
        gradient_EKD = gradient_GD.to(gates_EK.dtype).index_select(0, rows_EK.flatten())
        gradient_EKD = gradient_EKD.view_as(y_EKD)
        for_gates_EK = (gradient_EKD * y_EKD.to(gates_EK.dtype)).sum(-1)
        return (gradient_EKD * gates_EK[..., None]).to(y_EKD.dtype), for_gates_EK, None, None


def _sum_copies(
    x_ND: torch.Tensor, inverse_GC: torch.Tensor, gates_GC: torch.Tensor | None = None
) -> torch.Tensor:
    """Summed in float32 or better; one copy of all rows after another, which stays in the cache."""
    exact = torch.promote_types(x_ND.dtype, torch.float32)
    total_GD: torch.Tensor | None = None
    for number, place_G in enumerate(inverse_GC.unbind(1)):
        part_GD = x_ND.index_select(0, place_G).to(exact)
        if gates_GC is not None:
            part_GD *= gates_GC[:, number, None]
        total_GD = part_GD if total_GD is None else total_GD.add_(part_GD)
    assert total_GD is not None
    return total_GD.to(x_ND.dtype)


def _sum_taken(
    x_EKD: torch.Tensor,
    rows_EK: torch.Tensor,
    num_rows: int,
    gates_EK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summed in float32 or better, expert after expert: no row is added to twice at a time."""
    exact = torch.promote_types(x_EKD.dtype, torch.float32)
    total_GD = x_EKD.new_zeros(num_rows, x_EKD.shape[2], dtype=exact)
    for number, row_K in enumerate(rows_EK.unbind()):
        part_KD = x_EKD[number].to(exact)
        if gates_EK is not None:
            part_KD = part_KD * gates_EK[number, :, None]
        total_GD.index_add_(0, row_K, part_KD)
    return total_GD.to(x_EKD.dtype)
