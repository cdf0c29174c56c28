"""Attention over packed rows: who sees whom, rotary positions, grouped queries.

`visible` is the one place that says who sees whom. Everything else (packed rows, left-padded
prompts, a cache of committed ids, the joint layout of clean and noisy ids) is a matter of what the
four integers of a `Layout` are.

Legend: B batch, T queries, S keys, D width, H heads, G key-value heads, W head width.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from mmpt.model.cache import LayerCache
from mmpt.model.collectives import enter, leave, local
from mmpt.model.config import ModelConfig
from mmpt.model.float8 import Linear

CHUNK = 64  # queries of a piece


@dataclass(frozen=True)
class Layout:
    """What attention needs to know about each id; all int64 (B, T).

    document: unique within a row, -1 for pads. position: counted from the document's start.
    block: -1 for clean ids, else the number of the noisy block, unique within a row.
    limit: the last clean position that this id sees; its own position for clean ids.
    """

    document: torch.Tensor
    position: torch.Tensor
    block: torch.Tensor
    limit: torch.Tensor

    @classmethod
    def clean(cls, document: torch.Tensor, position: torch.Tensor) -> "Layout":
        """The plain causal layout of committed ids."""
        return cls(document, position, torch.full_like(position, -1), position)

    def cat(self, *others: "Layout") -> "Layout":
        """This layout, followed by others along the row."""
        parts = ([getattr(each, f.name) for each in (self, *others)] for f in fields(self))
        return Layout(*(torch.cat(part, dim=1) for part in parts))


def visible(query: Layout, key: Layout) -> torch.Tensor:
    """bool (B, T, S): which key each query sees.

    Within a document, a clean key is seen up to the query's limit, a noisy key by its own block.
    The queries are the last T keys; each sees itself, so that no row is empty (pads).
    """
    same = query.document[:, :, None] == key.document[:, None, :]
    same &= query.document[:, :, None] >= 0
    before = key.position[:, None, :] <= query.limit[:, :, None]
    within = query.block[:, :, None] == key.block[:, None, :]
    seen = same & torch.where(key.block[:, None, :] < 0, before, within)
    num_queries, num_keys = seen.shape[1:]
    seen.diagonal(num_keys - num_queries, 1, 2).fill_(True)
    return seen


@dataclass(frozen=True)
class Piece:
    """A chunk of the queries, the keys that any of them sees, and bool (B, 1, queries, keys)."""

    queries: slice
    keys: slice | torch.Tensor
    mask: torch.Tensor


def plan_pieces(query: Layout, key: Layout) -> list[Piece]:
    """`visible`, cut into pieces so that a CPU does not compute what no query of a chunk sees.

    Packed documents are short: at 100 ids each, rows of 512 take a third of the dense time. On
    other devices it is one piece, which needs no look at the values.
    """
    seen = visible(query, key)
    num_queries, num_keys = seen.shape[1:]
    if seen.device.type != "cpu" or num_queries <= 2 * CHUNK:
        return [Piece(slice(0, num_queries), slice(0, num_keys), seen[:, None])]
    pieces = []
    for start in range(0, num_queries, CHUNK):
        queries = slice(start, min(start + CHUNK, num_queries))
        columns = seen[:, queries].any(1).any(0).nonzero()[:, 0]
        low, high = int(columns[0]), int(columns[-1]) + 1
        keys = slice(low, high) if high - low == len(columns) else columns
        pieces.append(Piece(queries, keys, seen[:, None, queries, keys]))
    return pieces


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: list[Piece] | None
) -> torch.Tensor:
    """Attention of q (B, H, T, W) to k, v (B, K, S, W); without pieces, causal over the row."""
    dtype = v.dtype
    if v.device.type == "cpu":  # bf16 attention is slower than float32 on CPUs, and less exact
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    with torch.autocast(v.device.type, enabled=False):
        if pieces is None:
            k, v = _share(q, k, v)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).to(dtype)
        out = []
        for piece in pieces:
            k_piece, v_piece = _share(q, k[:, :, piece.keys], v[:, :, piece.keys])
            q_piece = q[:, :, piece.queries]
            out.append(
                F.scaled_dot_product_attention(q_piece, k_piece, v_piece, attn_mask=piece.mask)
            )
    return (out[0] if len(out) == 1 else torch.cat(out, dim=2)).to(dtype)


def _share(q: torch.Tensor, *parts: torch.Tensor) -> list[torch.Tensor]:
    # each key-value head serves a run of query heads
    return [part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in parts]


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 or better; keeps the dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
        """group: ranks that each have some of the vectors, with the same scale."""
        exact = torch.promote_types(x.dtype, torch.float32)
        scale = enter(self.scale, group).to(exact)
        return F.rms_norm(x.to(exact), scale.shape, scale, 1e-6).to(x.dtype)


@dataclass(frozen=True)
class Rotary:
    """cos and sin (B, T, 1, W / 2) of each position's angles, computed once per pass."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def at(cls, position: torch.Tensor, config: ModelConfig, dtype: torch.dtype) -> "Rotary":
        """Angles position * base^(-2i / W), in float32 or better."""
        dtype = torch.promote_types(dtype, torch.float32)
        half = torch.arange(0, config.head_width, 2, device=position.device, dtype=dtype)
        angle = position[:, :, None, None].to(dtype) * config.rope_base ** (
            -half / config.head_width
        )
        return cls(angle.cos(), angle.sin())

    def turn(self, x_BTHW: torch.Tensor) -> torch.Tensor:
        """Rotate the two halves of each head against each other (RoPE, eq. 34)."""
        a, b = x_BTHW.chunk(2, dim=-1)
        return torch.cat((a * self.cos - b * self.sin, a * self.sin + b * self.cos), dim=-1)


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
    """Grouped-query attention with QK-norm; noisy ids may take low-rank additions.

    The rows of `project_in` are the queries, the key and the value of the first key-value head,
    then of the second and so on: ranks that share a layer have whole heads (G of them).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.num_queries = config.num_heads // config.num_kv_heads  # of a key-value head
        num_out = config.num_kv_heads * (self.num_queries + 2) * self.head_width
        self.project_in = nn.Parameter(torch.empty(num_out, config.width))
        self.project_out = nn.Parameter(torch.empty(config.width, config.width))
        self.query_norm, self.key_norm = RMSNorm(self.head_width), RMSNorm(self.head_width)
        self.noisy_in: LowRank | None = None
        self.noisy_out: LowRank | None = None
        self.tensor_group: ProcessGroup | None = None  # ranks that share the heads
        self.linear: Linear = F.linear  # how projections multiply

    def add_noisy(self, rank: int) -> None:
        """Grow the low-rank weights of noisy ids; they change nothing until they are trained."""
        num_out, num_in = self.project_in.shape
        options = {"device": self.project_in.device, "dtype": self.project_in.dtype}
        self.noisy_in = LowRank(num_in, num_out, rank).to(**options)
        self.noisy_out = LowRank(num_in, num_in, rank).to(**options)

    def forward(
        self,
        x_BTD: torch.Tensor,
        *,
        rotary: Rotary,
        pieces: list[Piece] | None,
        noisy_index: torch.Tensor | None,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        """See `attend`; keys of `cache` come before those of x."""
        x_BTD = enter(x_BTD, self.tensor_group)
        y = self.linear(x_BTD, local(self.project_in))
        if self.noisy_in is not None and noisy_index is not None:
            y = self.noisy_in(y, x_BTD, noisy_index)
        y_BTGHW = y.unflatten(-1, (-1, self.num_queries + 2, self.head_width))
        q, k, v = y_BTGHW.split((self.num_queries, 1, 1), dim=-2)
        q, k, v = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)
        q = rotary.turn(self.query_norm(q, self.tensor_group)).to(v.dtype).transpose(1, 2)
        k = rotary.turn(self.key_norm(k, self.tensor_group)).to(v.dtype).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        out = attend(q, k, v, pieces).transpose(1, 2).flatten(2)
        z = self.linear(out, local(self.project_out))
        if self.noisy_out is not None and noisy_index is not None:
            z = self.noisy_out(z, out, noisy_index)
        return leave(z, self.tensor_group)
