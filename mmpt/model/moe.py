"""ModalityMoE (MoMa, arXiv 2407.21770): feed-forward experts in groups, one group per modality.

An id reaches only the experts of its own group. The `Dispatch` (which id belongs to which group) is
planned once per batch and used by every layer. Inside a group each id takes its best experts; no
id's choice depends on another id, so nothing leaks from the future and a packed row equals its
documents alone.

Legend: N ids (batch x row), G ids of a group, D width, E experts, C experts per id, F hidden width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from mmpt.config import UserError
from mmpt.model.collectives import enter, exchange, exchange_counts, leave, local
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.vocab import Modality


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


class Bank(nn.Module):
    """The weights of a group's experts; of some of them where others are on other ranks.

    gate_up: (E, D, 2, F), down: (E, F, D).
    """

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, width, 2, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.tensor_group: ProcessGroup | None = None  # ranks that share the hidden width

    def forward(self, x_ND: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """x sorted by expert, `counts` rows for each -> what the experts make of their rows."""
        x_ND = enter(x_ND, self.tensor_group)
        gate_up, down = local(self.gate_up).flatten(2), local(self.down)
        parts = zip(x_ND.split(list(counts)), gate_up.unbind(), down.unbind(), strict=True)
        return leave(torch.cat([_swiglu(*part) for part in parts]), self.tensor_group)


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
        if self.router is None:
            self._count(len(x_GD))
            return self.bank(x_GD, [len(x_GD)])
        gates_GC, chosen_GC = self._route(x_GD)
        flat = chosen_GC.flatten()
        counts = torch.bincount(flat, minlength=self.num_experts)
        self._count(counts)
        order = torch.argsort(flat, stable=True)
        inverse = invert(order)
        repeated = x_GD.repeat_interleave(self.num_active, 0) if self.num_active > 1 else x_GD
        y = permute(self._compute(permute(repeated, order, inverse), counts), inverse, order)
        y_GCD = y.unflatten(0, chosen_GC.shape) * gates_GC[..., None]
        return y_GCD.sum(1).to(y.dtype)

    def _compute(self, x_ND: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Rows sorted by expert through their experts, wherever those are."""
        if self.expert_group is None:
            return self.bank(x_ND, counts.tolist())
        sent_RE = counts.view(self.expert_group.size(), -1)
        received_RE = exchange_counts(sent_RE, self.expert_group)
        sent, received = sent_RE.sum(1).tolist(), received_RE.sum(1).tolist()
        x_MD = exchange(x_ND, sent, received, self.expert_group)
        # they come sorted by rank, then by expert
        experts = torch.arange(received_RE.shape[1], device=counts.device)
        number = experts.repeat(len(received)).repeat_interleave(received_RE.flatten())
        order = torch.argsort(number, stable=True)
        inverse = invert(order)
        y_MD = self.bank(permute(x_MD, order, inverse), received_RE.sum(0).tolist())
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


def _swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down


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
