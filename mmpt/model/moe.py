"""ModalityMoE (MoMa, arXiv 2407.21770): feed-forward experts in groups, one group per modality.

An id reaches only the experts of its own group. The `Dispatch` (which id belongs to which group) is
planned once per batch and used by every layer. Inside a group a router says who computes what. A
clean id's experts never depend on another id, except where expert choice trains: then nothing leaks
from the future, and a packed row equals its documents alone.

Legend: N ids (batch x row), G ids of a group, D width, E experts, C experts per id, K ids per
expert, P places of copies of ids.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from mmpt.model.bank import Bank, lengthen, product_dtype, row_step
from mmpt.model.collectives import exchange, exchange_counts
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.copies import Places, gather, give, permute, scatter, take
from mmpt.model.dispatch import Dispatch, Part, count, invert
from mmpt.model.routers import (
    Auxiliary,
    choose_experts,
    choose_ids,
    draw_noise,
    gate,
    router_loss,
    score,
)

WHOLE = Part()
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


class Experts(nn.Module):
    """One group: its router, and the experts that it chooses from.

    layer: its number, which random choices depend on. bank: that of another layer, to share.
    """

    load: torch.Tensor
    scores: torch.Tensor
    unserved: torch.Tensor
    balance: torch.Tensor

    def __init__(
        self, config: ModelConfig, group: GroupConfig, *, layer: int = 0, bank: Bank | None = None
    ) -> None:
        super().__init__()
        self.group, self.layer = group, layer
        self.num_experts, self.num_active = group.num_experts, group.num_active
        self.owns_bank = bank is None
        if bank is None:
            self.bank = Bank(group.num_experts, config.width, config.expert_hidden)
        else:  # past torch's registry: its weights are found, and saved, where they are owned
            object.__setattr__(self, "bank", bank)
        shared = group.shared_hidden
        self.shared = Bank(1, config.width, shared) if shared else None
        self.expert_group: ProcessGroup | None = None  # ranks that have some experts each
        self.router: nn.Parameter | None = None
        if group.learned:
            self.router = nn.Parameter(torch.empty(config.width, group.num_choices))
        if group.router == "token_choice":
            self.register_buffer("balance", torch.zeros(group.num_choices))
        auxiliary = group.causal == "auxiliary"
        self.auxiliary = Auxiliary(config.width, group.num_experts) if auxiliary else None
        # ids per expert since the last `update_balance`; counted while training only
        self.register_buffer("load", torch.zeros(group.num_choices), persistent=False)
        self.register_buffer("scores", torch.zeros(group.num_choices), persistent=False)  # summed
        # ids that no expert computes, and all
        self.register_buffer("unserved", torch.zeros(2), persistent=False)

    def forward(
        self, x_GD: torch.Tensor, part: Part = WHOLE
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the experts make of the ids, and what each adds to the router's loss, if anything.

        Also runs on no ids at all while training: absent groups get zero gradients, not None.
        """
        low_GD = x_GD.to(product_dtype(x_GD))
        y_GD, loss_G = self._choose(x_GD, low_GD, part)
        if self.shared is not None:
            y_GD = y_GD + self.shared(lengthen(low_GD))[: len(x_GD)]
        return y_GD, loss_G

    def _choose(
        self, x_GD: torch.Tensor, low_GD: torch.Tensor, part: Part
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.group.router == "hard":
            self._count(len(x_GD))
            return self.bank(lengthen(low_GD))[: len(x_GD)], None
        if part.hashed_GC is not None:
            exact = torch.promote_types(x_GD.dtype, torch.float32)
            gates_GC = torch.full_like(part.hashed_GC, 1 / self.num_active, dtype=exact)
            self._count(count(part.hashed_GC.flatten(), self.num_experts))
            return self._by_token(low_GD, gates_GC, part.hashed_GC), None
        assert self.router is not None, "hashes are in the part"
        exact_GD = x_GD.to(torch.promote_types(x_GD.dtype, torch.float32))
        with torch.autocast(x_GD.device.type, enabled=False):
            logits_GE = exact_GD @ self.router.to(exact_GD.dtype)
            if self.group.router == "token_choice":
                return self._choose_experts(logits_GE, low_GD)
            if self.group.noisy or self._as_trained:
                return self._choose_ids(logits_GE, exact_GD, low_GD, part)
            return self._choose_causally(logits_GE, exact_GD, low_GD), None

    def _choose_experts(
        self, logits_GE: torch.Tensor, low_GD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scores_GE = score(logits_GE, self.group)
        bias_E = self.balance.to(scores_GE.dtype)
        chosen_GC = choose_experts(scores_GE, bias_E, self.num_active)
        gates_GC = gate(scores_GE.gather(1, chosen_GC), self.group)
        load_E = count(chosen_GC.flatten(), self.group.num_choices)
        self._count(load_E, scores_GE, (chosen_GC >= self.num_experts).all(1))
        loss_G = router_loss(logits_GE, self.group, load_E) if self._learns else None
        return self._by_token(low_GD, gates_GC, chosen_GC, load_E), loss_G

    def _choose_ids(
        self, logits_GE: torch.Tensor, exact_GD: torch.Tensor, low_GD: torch.Tensor, part: Part
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        noisy_GE = logits_GE
        if self.group.router_noise and part.noise_G is not None and self._learns:
            noisy_GE = logits_GE + draw_noise(part, self.num_experts, self.layer)
        scores_GE = score(noisy_GE, self.group)
        rows_EK = choose_ids(scores_GE, part)
        gates_EK = gate(scores_GE.T.gather(1, rows_EK), self.group)
        left_G = torch.ones(len(low_GD), dtype=torch.bool, device=low_GD.device)
        left_G.index_fill_(0, rows_EK.flatten(), False)
        self._count(rows_EK.shape[1], scores_GE, left_G)
        loss_G = None
        if self.auxiliary is not None and self.auxiliary.inner.requires_grad:
            loss_G = self.auxiliary.loss(exact_GD, rows_EK)
        elif self._learns:
            loss_G = router_loss(logits_GE, self.group)
        x_EKD = take(low_GD, rows_EK)
        longer_EKD = lengthen(x_EKD)
        y_PD = self._compute(longer_EKD.flatten(0, 1))
        y_EKD = y_PD.view_as(longer_EKD)[:, : rows_EK.shape[1]]
        return give(y_EKD, gates_EK, rows_EK, len(low_GD)), loss_G

    def _choose_causally(
        self, logits_GE: torch.Tensor, exact_GD: torch.Tensor, low_GD: torch.Tensor
    ) -> torch.Tensor:
        """Expert choice where an id must not depend on later ones."""
        scores_GE = score(logits_GE, self.group)
        if self.auxiliary is None:
            chosen_GC = scores_GE.topk(self.num_active, dim=-1, sorted=False).indices
            return self._by_token(
                low_GD, gate(scores_GE.gather(1, chosen_GC), self.group), chosen_GC
            )
        # sigmoid above .5; any number of experts per id, so the host has to know how many
        expert_P, row_P = (self.auxiliary(exact_GD) > 0).T.nonzero(as_tuple=True)
        y_PD = self._compute(low_GD[row_P], count(expert_P, self.num_experts))
        gates_P = gate(scores_GE, self.group)[row_P, expert_P]
        y_GD = torch.zeros_like(low_GD, dtype=gates_P.dtype)
        return y_GD.index_add(0, row_P, y_PD * gates_P[:, None]).to(low_GD.dtype)

    def _by_token(
        self,
        low_GD: torch.Tensor,
        gates_GC: torch.Tensor,
        chosen_GC: torch.Tensor,
        load_E: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Every id through the experts that it chose."""
        flat = chosen_GC.flatten()
        load_E = count(flat, self.group.num_choices) if load_E is None else load_E
        place = Places.plan(flat, load_E, step=row_step(low_GD))
        inverse_GC = place.inverse_N.view_as(chosen_GC)
        row_P = place.order_P // self.num_active
        x_PD = scatter(low_GD, row_P, inverse_GC)
        counts_E = place.counts_E[: self.num_experts]
        if not self.group.num_identity:
            y_PD = self._compute(x_PD, counts_E)
        else:  # they come last; nothing may flow through what the bank makes of their rows
            real_P1 = (torch.arange(len(x_PD), device=x_PD.device) < counts_E.sum())[:, None]
            y_PD = self._compute(torch.where(real_P1, x_PD, 0.0), counts_E)
            y_PD = torch.where(real_P1, y_PD, x_PD)
        return gather(y_PD, gates_GC, row_P, inverse_GC)

    def _compute(self, x_ND: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        """Rows sorted by expert through their experts, wherever those are; see `Bank.forward`."""
        if self.expert_group is None:
            return self.bank(x_ND, counts)
        if counts is None:
            each = len(x_ND) // self.num_experts
            counts = torch.full((self.num_experts,), each, device=x_ND.device)
        sent_RE = counts.view(self.expert_group.size(), -1)
        received_RE = exchange_counts(sent_RE, self.expert_group)
        sent, received = sent_RE.sum(1).tolist(), received_RE.sum(1).tolist()
        x_MD = exchange(x_ND[: sum(sent)], sent, received, self.expert_group)
        # they come sorted by rank, then by expert
        experts = torch.arange(received_RE.shape[1], device=counts.device)
        number = experts.repeat(len(received)).repeat_interleave(received_RE.flatten())
        order = torch.argsort(number, stable=True)
        inverse = invert(order)
        y_MD = self.bank(permute(x_MD, order, inverse), received_RE.sum(0))
        y_ND = exchange(permute(y_MD, inverse, order), received, sent, self.expert_group)
        return F.pad(y_ND, (0, 0, 0, len(x_ND) - len(y_ND))) if len(y_ND) < len(x_ND) else y_ND

    @property
    def _trains(self) -> bool:
        # neither sampling nor evaluation in a training run
        return self.training and torch.is_grad_enabled()

    @property
    def _learns(self) -> bool:
        return self._trains and self.router is not None and self.router.requires_grad

    @property
    def _as_trained(self) -> bool:
        # a frozen router chooses as it does at inference, unless its auxiliary one learns from it
        auxiliary = self.auxiliary is not None and self.auxiliary.inner.requires_grad
        return self._learns or (auxiliary and self._trains)

    def _count(
        self,
        load: torch.Tensor | int,
        scores_GE: torch.Tensor | None = None,
        left_G: torch.Tensor | None = None,
    ) -> None:
        """load: ids of each expert. left: which ids no expert computes."""
        if not self._trains or _recomputing:  # nothing counts twice
            return
        self.load += load
        if scores_GE is not None and left_G is not None:
            self.scores += scores_GE.detach().sum(0)
            self.unserved[0] += left_G.sum()
            self.unserved[1] += len(left_G)

    def banks(self) -> list[Bank]:
        """Those that are stored here."""
        return [b for b in (self.bank if self.owns_bank else None, self.shared) if b is not None]

    @torch.no_grad()
    def update_balance(self, rate: float) -> None:
        """Move the bias against the load since the last call (eq. 3), then count anew."""
        learned = self.group.router == "token_choice" and self.group.balance == "bias"
        if learned and self.router is not None and self.router.requires_grad:
            self.balance += rate * torch.sign(self.load.mean() - self.load).to(self.balance.dtype)
        for counted in (self.load, self.scores, self.unserved):
            counted.zero_()


class ModalityMoE(nn.Module):
    """The feed-forward half of a layer.

    layer: its number. lender: a layer whose experts this one shares; it has routers of its own.
    """

    def __init__(
        self, config: ModelConfig, *, layer: int = 0, lender: "ModalityMoE | None" = None
    ) -> None:
        super().__init__()
        self.layer, self.groups = layer, nn.ModuleDict()
        self.always = False  # other ranks wait for this one, also where a group has no ids here
        for name, group in config.ordered_groups.items():
            self.groups[name] = self._build(config, name, group, lender)

    def forward(
        self, x_BTD: torch.Tensor, dispatch: Dispatch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Each id through its group, pads give zero; and what ids add to routers' losses (B, T)."""
        x_ND = permute(x_BTD.flatten(0, 1), dispatch.order, dispatch.inverse)
        *groups, pads = x_ND.split(dispatch.counts)
        touch = torch.is_grad_enabled() or self.always
        out, losses = [], []
        for experts, x_GD, part in zip(self.experts(), groups, dispatch.parts, strict=True):
            if touch or len(x_GD):
                y_GD, loss_G = experts(x_GD, part)
                out.append(y_GD)
                losses.append(loss_G)
        y_ND = torch.cat([*out, torch.zeros_like(pads, dtype=out[0].dtype if out else None)])
        y_BTD = permute(y_ND, dispatch.inverse, dispatch.order).view_as(x_BTD)
        if all(loss_G is None for loss_G in losses):
            return y_BTD, None
        zeros = (torch.zeros(n, device=x_ND.device) for n in dispatch.counts)
        loss_N = torch.cat(
            [z if g is None else g for z, g in zip(zeros, [*losses, None], strict=True)]
        )
        return y_BTD, permute(loss_N, dispatch.inverse, dispatch.order).view(x_BTD.shape[:2])

    def experts(self) -> list[Experts]:
        """The groups in the order of a dispatch."""
        return list(self.groups.values())  # type: ignore[arg-type] # ModuleDict forgets the class

    def grow(self, config: ModelConfig, lender: "ModalityMoE | None" = None) -> None:
        """Add the groups that `config` has and this has not, as copies: noisy_x of x."""
        for name, group in config.ordered_groups.items():
            if name in self.groups:
                continue
            source: Experts = self.groups[name.removeprefix("noisy_")]  # type: ignore[assignment] # ModuleDict forgets the class
            copy = self._build(config, name, group, lender).to(source.bank.down)
            tensors = source.state_dict()
            copy.load_state_dict(
                {key: tensors.get(key, own) for key, own in copy.state_dict().items()}
            )
            self.groups[name] = copy.train(source.training)

    def _build(
        self, config: ModelConfig, name: str, group: GroupConfig, lender: "ModalityMoE | None"
    ) -> Experts:
        bank = None if lender is None else lender.groups[name].bank
        return Experts(config, group, layer=self.layer, bank=bank)  # type: ignore[arg-type] # ModuleDict forgets the class
