"""How routers choose: scores of experts, choices by ids or by experts, and losses of routers.

Token choice: each id takes its best experts. Expert choice (arXiv 2202.09368): each expert takes
the best ids of a pool, so all experts have equally many; who is taken depends on the others of the
pool, later ones among them.

Legend: G ids of a group, D width, E experts, C experts per id, K ids per expert.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mmpt.model.config import GroupConfig
from mmpt.model.dispatch import Part
from mmpt.model.draws import logistic, mix


def score(logits_GE: torch.Tensor, group: GroupConfig) -> torch.Tensor:
    """Between 0 and 1."""
    return logits_GE.softmax(-1) if group.gate == "softmax" else logits_GE.sigmoid()


def gate(scores: torch.Tensor, group: GroupConfig) -> torch.Tensor:
    """What experts are multiplied with, from the scores (..., C) of those that were chosen.

    Sigmoid gates are 2/C of the score: at logits of zero, those of C experts sum to one, so that
    copies of one expert compute what the one computed.
    """
    if group.renormalise:
        return scores / scores.sum(-1, keepdim=True)
    return scores if group.gate == "softmax" else scores * (2 / group.num_active)


def choose_experts(scores_GE: torch.Tensor, bias_E: torch.Tensor, num_active: int) -> torch.Tensor:
    """(G, C): the best experts of each id.

    The bias balances the load: it decides who is chosen and never enters a gate (loss-free
    balancing, arXiv 2408.15664).
    """
    return (scores_GE.detach() + bias_E).topk(num_active, dim=-1, sorted=False).indices


def choose_ids(scores_GE: torch.Tensor, part: Part) -> torch.Tensor:
    """(E, K): the best ids of each pool, for each expert; no two of an expert are the same."""
    assert part.slots_K is not None
    scores_GE = scores_GE.detach()
    if part.pool_G is None:
        return scores_GE.topk(len(part.slots_K), dim=0, sorted=False).indices.T
    order_GE = scores_GE.argsort(dim=0, descending=True, stable=True)
    order_GE = order_GE.gather(0, part.pool_G[order_GE].argsort(dim=0, stable=True))
    return order_GE[part.slots_K].T


def draw_noise(part: Part, num_experts: int, layer: int) -> torch.Tensor:
    """(G, E) to add to logits: sigmoid(x + G' - G'') of MoMa (arXiv 2407.21770)."""
    assert part.noise_G is not None
    keys = mix(part.noise_G + (layer << 32))[:, None]
    return logistic(keys + torch.arange(num_experts, device=keys.device))


def router_loss(
    logits_GE: torch.Tensor, group: GroupConfig, load_E: torch.Tensor | None = None
) -> torch.Tensor | None:
    """(G,): what each id adds to the balance loss and the z-loss, with their weights.

    load: how often these ids chose each expert. The first has the mean E sum(f P) of OLMoE (arXiv
    2409.02060) over the ids, with f = load / (C G) and P the mean softmax: at least 1. The second
    has the mean of logsumexp^2. It is softmax with any gate: sigmoids could shrink to please it.
    """
    loss_G = None
    if group.balance == "loss" and load_E is not None:
        share_E = (load_E / load_E.sum().clamp(min=1)).to(logits_GE.dtype)
        loss_G = group.balance_loss * len(load_E) * (logits_GE.softmax(-1) @ share_E)
    if group.router_z_loss:
        z_G = group.router_z_loss * logits_GE.logsumexp(-1).square()
        loss_G = z_G if loss_G is None else loss_G + z_G
    return loss_G


class Auxiliary(nn.Module):
    """MoMa's causal router: says from an id alone whether expert choice takes it, by expert.

    It is trained after the model, whose weights stay, and chooses where later ids must not count.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(width, width // 2))
        self.outer = nn.Parameter(torch.empty(width // 2, num_experts))
        self.requires_grad_(False)  # until its own training, see `Decoder.freeze_for_routers`

    def forward(self, x_GD: torch.Tensor) -> torch.Tensor:
        """Logits (G, E)."""
        return F.silu(x_GD @ self.inner.to(x_GD)) @ self.outer.to(x_GD)

    def loss(self, x_GD: torch.Tensor, rows_EK: torch.Tensor) -> torch.Tensor:
        """(G,): binary cross-entropy against what was taken, the mean over experts."""
        taken_EG = torch.zeros(len(rows_EK), len(x_GD), device=x_GD.device, dtype=x_GD.dtype)
        taken_EG.scatter_(1, rows_EK, 1.0)
        logits_GE = self(x_GD.detach())
        return F.binary_cross_entropy_with_logits(logits_GE, taken_EG.T, reduction="none").mean(1)
