"""Attention over packed rows: projections of grouped queries, QK-norm, weights of noisy ids.

`layout` says who sees whom, `rotary` where ids stand, `backends` how it is computed.

Legend: B batch, T ids, N all ids (batch x row), D width, H heads, G key-value heads, W head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from mmpt.model.backends import Attend
from mmpt.model.cache import LayerCache
from mmpt.model.collectives import enter, leave, local
from mmpt.model.config import ModelConfig
from mmpt.model.float8 import Linear
from mmpt.model.moe import invert, permute
from mmpt.model.rotary import Rotary


@dataclass(frozen=True)
class Sorted:
    """Flat positions of ids by the clean group of their medium, for weights that groups have."""

    order: torch.Tensor  # int64 (N,)
    inverse: torch.Tensor  # int64 (N,)
    counts: tuple[int, ...]

    @classmethod
    def plan(cls, group: torch.Tensor, num_groups: int) -> "Sorted":
        """Of numbers (B, T) of clean groups. One host sync on a GPU."""
        order = torch.argsort(group.flatten(), stable=True)
        counts = torch.bincount(group.flatten(), minlength=num_groups).tolist()
        return cls(order, invert(order), tuple(counts))

    def project(self, x_BTD: torch.Tensor, weight: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Each id by the matrix (groups, out, D) of its group."""
        parts = permute(x_BTD.flatten(0, 1), self.order, self.inverse).split(self.counts)
        y_ND = torch.cat([linear(x, w) for x, w in zip(parts, weight, strict=True)])
        return permute(y_ND, self.inverse, self.order).unflatten(0, x_BTD.shape[:2])


@dataclass(frozen=True)
class Context:
    """What attention needs to know of the ids, planned once per pass for all layers.

    groups: where weights are untied by group, which id takes whose. linear: how to multiply.
    """

    rotary: Rotary
    attend: Attend
    groups: Sorted | None = None
    linear: Linear = F.linear

    def project(self, x_BTD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """By one matrix (out, D) for all ids, or by those of the groups."""
        if self.groups is None:
            return self.linear(x_BTD, local(weight))
        return self.groups.project(x_BTD, weight, self.linear)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 or better; keeps the dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
        """group: ranks that each have some of the vectors, with the same scale."""
        exact = torch.promote_types(x.dtype, torch.float32)
        scale = enter(self.scale, group).to(exact)
        return F.rms_norm(x.to(exact), scale.shape, scale, self.eps).to(x.dtype)


class LowRank(nn.Module):
    """A low-rank addition to a projection that only noisy ids take; zero at the start (LoRA)."""

    def __init__(self, num_in: int, num_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, num_in))
        self.up = nn.Parameter(torch.zeros(num_out, rank))
        self.tensor_group: ProcessGroup | None = None  # ranks that share one of the two

    def forward(self, y: torch.Tensor, x: torch.Tensor, noisy_index: torch.Tensor) -> torch.Tensor:
        """y (B, T, num_out) plus the addition at the flat positions `noisy_index` of x."""
        chosen = x.flatten(0, 1).index_select(0, noisy_index)
        down, up = self._weight(self.down), self._weight(self.up)
        delta = F.linear(F.linear(chosen, down), up)
        return y.flatten(0, 1).index_add(0, noisy_index, delta.to(y.dtype)).view_as(y)

    def _weight(self, weight: torch.Tensor) -> torch.Tensor:
        # the one that is whole takes part in each rank's share of the work
        return local(weight) if isinstance(weight, DTensor) else enter(weight, self.tensor_group)


class Attention(nn.Module):
    """Grouped-query attention; noisy ids may take low-rank additions.

    The rows of `project_in` are the queries, the key and the value of the first key-value head,
    then of the second and so on: ranks that share a layer have whole heads (G of them). Untied
    projections are stacks of such matrices, one for each clean group (arXiv 2411.04996).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.width_per_head
        self.num_queries = config.num_heads // config.num_kv_heads  # of a key-value head
        num_out = config.num_kv_heads * (self.num_queries + 2) * self.head_width
        groups = sum(not group.noisy for group in config.groups.values())
        stack = (groups,) if config.untied_attention else ()
        self.project_in = nn.Parameter(torch.empty(*stack, num_out, config.width))
        self.bias_in = nn.Parameter(torch.empty(num_out)) if config.attention_bias else None
        self.project_out = nn.Parameter(torch.empty(*stack, config.width, config.width_of_heads))
        # each head has a gate, sigmoid(x W), on what it puts out (arXiv 2505.06708)
        self.head_gate: nn.Parameter | None = None
        if config.gated_attention:
            self.head_gate = nn.Parameter(torch.empty(config.num_heads, config.width))
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            heads = (1, 1) if config.qk_norm == "head" else (config.num_heads, config.num_kv_heads)
            self.query_norm, self.key_norm = (
                RMSNorm(num * self.head_width, config.norm_eps) for num in heads
            )
        self.noisy_in: LowRank | None = None
        self.noisy_out: LowRank | None = None
        self.tensor_group: ProcessGroup | None = None  # ranks that share the heads

    def add_noisy(self, rank: int) -> None:
        """Grow the low-rank weights of noisy ids; they change nothing until they are trained."""
        options = {"device": self.project_in.device, "dtype": self.project_in.dtype}
        self.noisy_in, self.noisy_out = (
            LowRank(num_in, num_out, rank).to(**options)
            for num_out, num_in in (self.project_in.shape[-2:], self.project_out.shape[-2:])
        )

    def num_active(self, *, noisy: bool) -> int:
        """Weights that one id multiplies with."""
        used = (p for n, p in self.named_parameters() if noisy or "noisy" not in n)
        return sum(p.numel() // (len(p) if p.ndim == 3 else 1) for p in used)

    def forward(
        self,
        x_BTD: torch.Tensor,
        *,
        context: Context,
        noisy_index: torch.Tensor | None,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        """Keys of `cache` come before those of x; noisy ids are at flat positions `noisy_index`."""
        x_BTD = enter(x_BTD, self.tensor_group)
        y = context.project(x_BTD, self.project_in)
        if self.bias_in is not None:
            y = y + self.bias_in.to(y.dtype)
        if self.noisy_in is not None and noisy_index is not None:
            y = self.noisy_in(y, x_BTD, noisy_index)
        y_BTGHW = y.unflatten(-1, (-1, self.num_queries + 2, self.head_width))
        q, k, v = y_BTGHW.split((self.num_queries, 1, 1), dim=-2)
        q, k, v = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
        q, k = self._norm(q, self.query_norm), self._norm(k, self.key_norm)
        q, k = (context.rotary.turn(x).to(v.dtype).transpose(1, 2) for x in (q, k))
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        out = context.attend(q, k, v).transpose(1, 2)
        if self.head_gate is not None:
            out = out * F.linear(x_BTD, self.head_gate).sigmoid()[..., None]
        out = out.flatten(2)
        z = context.project(out, self.project_out)
        if self.noisy_out is not None and noisy_index is not None:
            z = self.noisy_out(z, out, noisy_index)
        return leave(z, self.tensor_group)

    def _norm(self, x_BTHW: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
        if norm is None:
            return x_BTHW
        flat = x_BTHW.flatten(2).unflatten(2, (-1, len(norm.scale)))  # each head, or all together
        return norm(flat, self.tensor_group).view_as(x_BTHW)
