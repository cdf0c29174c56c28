"""ModalityMoE (MoMa, arXiv 2407.21770): feed-forward experts in groups, one group per modality.

An id reaches only the experts of its own group. The `Dispatch` (which id belongs to which group) is
planned once per batch and used by every layer. Inside a group each id takes its best experts; no
id's choice depends on another id, so nothing leaks from the future and a packed row equals its
documents alone.

Legend: N ids (batch x row), G ids of a group, D width, E experts, C experts per id, F hidden width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from mmpt.config import UserError
from mmpt.model.collectives import enter, exchange, exchange_counts, leave, local
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.float8 import Linear
from mmpt.vocab import Modality

ROW_STEP = 32  # rows of an expert, see `_row_step`


@dataclass(frozen=True)
class Dispatch:
    """Flat positions by group: clean groups, noisy ones, then pads, which no expert takes."""

    order: torch.Tensor  # int64 (N,)
    inverse: torch.Tensor  # int64 (N,)
    counts: tuple[int, ...]  # ids per group, then pads
    noisy_index: torch.Tensor | None  # flat positions of noisy ids; None when there are none

    @classmethod
    def plan(cls, group: torch.Tensor, config: ModelConfig) -> "Dispatch":
        """From group numbers (B, T) as `group_numbers` gives them. One host sync on a GPU."""
        flat, groups = group.flatten(), list(config.ordered_groups.values())
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=len(groups) + 2).tolist()
        if counts.pop():
            raise UserError(
                "noisy ids of a modality that has no noisy group; call add_noisy_groups() and adapt"
            )
        num_clean = sum(n for n, g in zip(counts, groups, strict=False) if not g.noisy)
        num_noisy = sum(counts[:-1]) - num_clean
        noisy = order[num_clean : num_clean + num_noisy]
        # while training, the weights of noisy ids take part where there are none, too
        unused = not num_noisy and not (torch.is_grad_enabled() and any(g.noisy for g in groups))
        return cls(order, invert(order), tuple(counts), None if unused else noisy)


def group_table(config: ModelConfig) -> torch.Tensor:
    """int64 (2, 4): the group of [noisy, modality]; one past the number of pads where none is."""
    groups = list(config.ordered_groups.values())
    table = torch.full((2, len(Modality)), len(groups) + 1)
    for number, group in enumerate(groups):
        for name in group.modalities:
            table[int(group.noisy), Modality[name.upper()]] = number
    return table


def invert(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `order`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


_recomputing = False


@contextmanager
def recomputing() -> Iterator[None]:
    """Inside, forward passes repeat earlier ones: they do not count towards the load."""
    global _recomputing
    _recomputing = True
    try:
        yield
    finally:
        _recomputing = False


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


def permute(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Rows of x in another order."""
    return _Permute.apply(x, order, inverse)  # type: ignore[return-value] # apply is untyped


@dataclass(frozen=True)
class _Places:
    """Where the N copies of ids stand, sorted by expert, with P - N places that nobody reads."""

    order_P: torch.Tensor  # the copy at each place; any where nobody reads
    inverse_N: torch.Tensor  # the place of each copy
    counts_E: torch.Tensor  # places of each expert

    @classmethod
    def plan(cls, expert_N: torch.Tensor, counts_E: torch.Tensor, *, step: int) -> "_Places":
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


def _row_step(x: torch.Tensor) -> int:
    """On CPUs each new shape of a bf16 product is compiled, which takes longer than the product.

    Decoding has few shapes, and few rows.
    """
    training = torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.bfloat16
    return ROW_STEP if training else 1


def _lengthen(x_GD: torch.Tensor) -> torch.Tensor:
    """With rows of zeros at the end, so that their number is one of few."""
    return F.pad(x_GD, (0, 0, 0, -len(x_GD) % _row_step(x_GD)))


class _Scatter(torch.autograd.Function):
    """Copies of the rows of x at the places of their experts: `row_P` names the row."""

    @staticmethod
    def forward(ctx, x_GD, row_P, inverse_GC):  # type: ignore[override] # torch's own signature is *args
        ctx.save_for_backward(inverse_GC)
        return x_GD.index_select(0, row_P)

    @staticmethod
    def backward(ctx, gradient_PD):  # type: ignore[override] # torch's own signature is *args
        (inverse_GC,) = ctx.saved_tensors
        return _sum_copies(gradient_PD, inverse_GC), None, None


class _Gather(torch.autograd.Function):
    """The sum of what the experts made of each row, times their gates: undoes `_Scatter`."""

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

    def forward(self, x_ND: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """x sorted by expert, `counts` (E,) rows for each -> what the experts make of them."""
        x_ND = enter(x_ND, self.tensor_group)
        gate_up, down = (local(w).to(x_ND.dtype) for w in (self.gate_up, self.down))
        inner = _products(x_ND, gate_up.flatten(2), counts, self.linear)
        y_ND = _products(_SwiGLU.apply(inner), down, counts, self.linear)
        return leave(y_ND, self.tensor_group)


def _products(
    x_ND: torch.Tensor, w_EDF: torch.Tensor, counts_E: torch.Tensor, linear: Linear | None
) -> torch.Tensor:
    """Rows sorted by expert, each times the matrix of its expert."""
    if linear is not None:
        parts = zip(x_ND.split(counts_E.tolist()), w_EDF.unbind(), strict=True)
        return torch.cat([linear(x, w.T) for x, w in parts])
    if len(w_EDF) == 1:
        return x_ND @ w_EDF[0]
    even = x_ND.shape[1] % 8 == w_EDF.shape[2] % 8 == 0  # as it needs its rows to lie
    if x_ND.dtype == torch.bfloat16 and even:  # in others it is no faster than a loop
        return F.grouped_mm(x_ND, w_EDF, offs=counts_E.cumsum(0, dtype=torch.int32))
    parts = zip(x_ND.split(counts_E.tolist()), w_EDF.unbind(), strict=True)
    return torch.cat([x @ w for x, w in parts])


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


class Experts(nn.Module):
    """One group: its router, and the experts that it chooses from."""

    load: torch.Tensor
    scores: torch.Tensor
    balance: torch.Tensor

    def __init__(self, config: ModelConfig, group: GroupConfig) -> None:
        super().__init__()
        self.num_experts, self.num_active = group.num_experts, group.num_active
        self.bank = Bank(group.num_experts, config.width, config.expert_hidden)
        self.expert_group: ProcessGroup | None = None  # ranks that have some experts each
        self.router: nn.Parameter | None = None
        if group.router == "token_choice":
            self.router = nn.Parameter(torch.empty(config.width, group.num_experts))
            self.register_buffer("balance", torch.zeros(group.num_experts))
        # ids per expert since the last `update_balance`; counted while training only
        self.register_buffer("load", torch.zeros(group.num_experts), persistent=False)
        self.register_buffer("scores", torch.zeros(group.num_experts), persistent=False)  # summed

    def forward(self, x_GD: torch.Tensor) -> torch.Tensor:
        """Also runs on no ids at all while training: absent groups get zero gradients, not None."""
        low_GD = x_GD.to(_product_dtype(x_GD))
        if self.router is None:
            self._count(len(x_GD))
            return self.bank(_lengthen(low_GD), torch.tensor([len(x_GD)]))[: len(x_GD)]
        gates_GC, chosen_GC = self._route(x_GD)
        flat = chosen_GC.flatten()
        counts = torch.bincount(flat, minlength=self.num_experts)
        self._count(counts)
        place = _Places.plan(flat, counts, step=_row_step(low_GD))
        inverse_GC = place.inverse_N.view_as(chosen_GC)
        row_P = place.order_P // self.num_active
        sorted_PD: torch.Tensor = _Scatter.apply(low_GD, row_P, inverse_GC)  # type: ignore[assignment] # apply is untyped
        y_PD = self._compute(sorted_PD, place.counts_E)
        return _Gather.apply(y_PD, gates_GC, row_P, inverse_GC)  # type: ignore[return-value] # apply is untyped

    def _compute(self, x_ND: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert through their experts, wherever those are."""
        if self.expert_group is None:
            return self.bank(x_ND, counts)
        sent_RE = counts.view(self.expert_group.size(), -1)
        received_RE = exchange_counts(sent_RE, self.expert_group)
        sent, received = sent_RE.sum(1).tolist(), received_RE.sum(1).tolist()
        x_MD = exchange(x_ND, sent, received, self.expert_group)
        # they come sorted by rank, then by expert
        experts = torch.arange(received_RE.shape[1], device=counts.device)
        number = experts.repeat(len(received)).repeat_interleave(received_RE.flatten())
        order = torch.argsort(number, stable=True)
        inverse = invert(order)
        y_MD = self.bank(permute(x_MD, order, inverse), received_RE.sum(0))
        return exchange(permute(y_MD, inverse, order), received, sent, self.expert_group)

    def _route(self, x_GD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Sigmoid scores in float32; the balancing bias decides who is chosen and never enters the
        # gate (loss-free balancing, arXiv 2408.15664). Gates are 2/C sigmoid: they sum to one at a
        # score of zero, so that copies of one expert compute what the one computed.
        assert self.router is not None
        exact = torch.promote_types(x_GD.dtype, torch.float32)
        with torch.autocast(x_GD.device.type, enabled=False):
            scores_GE = torch.sigmoid(x_GD.to(exact) @ self.router.to(exact))
        if self._counts:
            self.scores += scores_GE.detach().sum(0)
        biased = scores_GE.detach() + self.balance.to(exact)
        chosen_GC = biased.topk(self.num_active, dim=-1, sorted=False).indices
        return scores_GE.gather(1, chosen_GC) * (2 / self.num_active), chosen_GC

    @property
    def _counts(self) -> bool:
        # sampling in a training run does not count, and nothing counts twice
        return self.training and torch.is_grad_enabled() and not _recomputing

    def _count(self, counts: torch.Tensor | int) -> None:
        if self._counts:
            self.load += counts

    @torch.no_grad()
    def update_balance(self, rate: float) -> None:
        """Move the bias against the load since the last call (eq. 3), then count anew."""
        if self.router is not None and self.router.requires_grad:
            self.balance += rate * torch.sign(self.load.mean() - self.load).to(self.balance.dtype)
        self.load.zero_()
        self.scores.zero_()


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """That of matrix products: autocast does not know grouped ones."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class ModalityMoE(nn.Module):
    """The feed-forward half of a layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.groups = nn.ModuleDict(
            {name: Experts(config, group) for name, group in config.ordered_groups.items()}
        )
        self.always = False  # other ranks wait for this one, also where a group has no ids here

    def forward(self, x_BTD: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """Each id through its group; pads give zero."""
        x_ND = permute(x_BTD.flatten(0, 1), dispatch.order, dispatch.inverse)
        *parts, pads = x_ND.split(dispatch.counts)
        touch = torch.is_grad_enabled() or self.always
        out = [
            experts(part)
            for experts, part in zip(self.groups.values(), parts, strict=True)
            if touch or len(part)
        ]
        dtype = out[0].dtype if out else x_ND.dtype
        out.append(torch.zeros_like(pads, dtype=dtype))
        return permute(torch.cat(out), dispatch.inverse, dispatch.order).view_as(x_BTD)

    def experts(self) -> list[Experts]:
        """The groups in the order of a dispatch."""
        return list(self.groups.values())  # type: ignore[arg-type] # ModuleDict forgets the class

    def grow(self, config: ModelConfig) -> None:
        """Add the groups that `config` has and this has not, as copies: noisy_x of x."""
        for name, group in config.ordered_groups.items():
            if name in self.groups:
                continue
            source = self.groups[name.removeprefix("noisy_")]
            copy = Experts(config, group).to(next(source.parameters()))
            copy.load_state_dict(source.state_dict())
            self.groups[name] = copy.train(source.training)
