"""What a layer says to other ranks when tensors or experts are spread over several of them.

Without a group every function here is the identity, so that one process runs the same code.
Gradients follow Megatron-LM (arXiv 1909.08053, section 3): `enter` and `leave` are each other's
transposes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, distribute_tensor


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override] # torch's own signature is *args
        return _sum(gradient, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override] # torch's own signature is *args
        return gradient, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: ProcessGroup
    ) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override] # torch's own signature is *args
        back = _all_to_all(gradient, ctx.received, ctx.sent, ctx.group)
        return back, None, None, None


def enter(x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """What all ranks of the group have alike goes into work that they share: gradients add up."""
    return x if group is None else _Enter.apply(x, group)  # type: ignore[return-value] # apply is untyped


def leave(x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """The sum over the group of what each rank computed."""
    return x if group is None else _Leave.apply(x, group)  # type: ignore[return-value] # apply is untyped


def exchange(
    x: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: ProcessGroup
) -> torch.Tensor:
    """Rows of x to other ranks: the first `sent[0]` to rank 0, ...; as many come as `received`.

    Every rank of the group calls it, also with no rows.
    """
    return _Exchange.apply(x, list(sent), list(received), group)  # type: ignore[return-value] # apply is untyped


def exchange_counts(counts: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """counts int64 (ranks, n) to send -> (ranks, n) to receive."""
    received = torch.empty_like(counts)
    distributed.all_to_all_single(received, counts.contiguous(), group=group)
    return received


def local(weight: torch.Tensor) -> torch.Tensor:
    """This rank's part of a weight that is spread; the weight itself where it is whole."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


@torch.no_grad()
def fill(weight: torch.Tensor, value: torch.Tensor) -> None:
    """Overwrite a weight by a whole tensor that every rank has; each keeps its part."""
    value = value.to(weight.device, weight.dtype)
    if isinstance(weight, DTensor):
        place = (weight.device_mesh, weight.placements)
        value = distribute_tensor(value, *place, src_data_rank=None)
    weight.copy_(value)


def whole(weight: torch.Tensor) -> torch.Tensor:
    """All of a weight, on every rank; all ranks call it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _sum(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(x, group=group)
    return x


def _all_to_all(
    x: torch.Tensor, sent: list[int], received: list[int], group: ProcessGroup
) -> torch.Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    distributed.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
