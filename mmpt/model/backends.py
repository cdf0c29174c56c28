"""Attention itself: queries, keys and values in, what each query sees out.

Every way to compute it follows `sees`: PyTorch's products with a dense mask (everywhere), its
FlexAttention with a mask of blocks and the block-diagonal kernels of xformers (both on CUDA).

Legend: B batch, T queries, S keys, H heads, K key-value heads, W head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F

from mmpt.config import UserError
from mmpt.model.layout import Layout, sees, segments, visible

CHUNK = 64  # queries of a piece

Backend = Literal["sdpa", "flex", "xformers"]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q (B, H, T, W), k and v (B, K, S, W) -> (B, H, T, W), in the dtype of v."""


def check_backend(name: Backend, device: torch.device) -> None:
    """Refuse what this machine cannot do."""
    if name != "sdpa" and device.type != "cuda":
        raise UserError(f"attention = {name} needs CUDA, and this runs on {device}; use sdpa")
    if name == "xformers" and find_spec("xformers") is None:
        raise UserError("attention = xformers needs it: pip install 'mmpt[gpu]', or use sdpa")


def plan_attention(query: Layout, key: Layout, backend: Backend = "sdpa") -> Attend:
    """What computes attention of these queries to these keys, for all layers.

    Where a backend has no mask for a layout, the one that has all of them takes over: xformers
    knows packed rows of clean ids.
    """
    if backend == "flex":
        return Flex.plan(query, key)
    if backend == "xformers" and query is key and (sizes := segments(query)):
        return Diagonal.plan(sizes)
    return Masked(plan_pieces(query, key))


@dataclass(frozen=True)
class Causal:
    """Each query sees the keys up to its own: a row is one document."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        dtype, (q, k, v) = v.dtype, _exact(q, k, v)
        k, v = _share(q, k, v)
        with torch.autocast(v.device.type, enabled=False):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).to(dtype)


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


@dataclass(frozen=True)
class Masked:
    """Any layout, by a dense mask."""

    pieces: list[Piece]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        dtype, (q, k, v) = v.dtype, _exact(q, k, v)
        out = []
        with torch.autocast(v.device.type, enabled=False):
            for piece in self.pieces:
                k_piece, v_piece = _share(q, k[:, :, piece.keys], v[:, :, piece.keys])
                q_piece = q[:, :, piece.queries]
                out.append(
                    F.scaled_dot_product_attention(q_piece, k_piece, v_piece, attn_mask=piece.mask)
                )
        return (out[0] if len(out) == 1 else torch.cat(out, dim=2)).to(dtype)


@dataclass(frozen=True)
class Flex:
    """Any layout, by a mask of blocks: what no query of a block sees is not computed.

    The kernel is compiled on CUDA; on CPUs there is the plain one, and no backward pass.
    """

    mask: Any  # BlockMask

    @classmethod
    def plan(cls, query: Layout, key: Layout) -> "Flex":
        from torch.nn.attention.flex_attention import create_block_mask

        (rows, num_queries), num_keys = query.document.shape, key.document.shape[1]
        mine = query.document, query.limit, query.block
        theirs = key.document, key.position, key.block

        def rule(row: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Any:
            seen = sees(*(x[row, q] for x in mine), *(x[row, k] for x in theirs))
            return seen | (k == q + (num_keys - num_queries))

        device = query.document.device
        return cls(create_block_mask(rule, rows, None, num_queries, num_keys, device=str(device)))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attend = _flex_kernel(v.device.type == "cuda")
        with torch.autocast(v.device.type, enabled=False):
            return attend(q, k, v, block_mask=self.mask, enable_gqa=True)


@cache
def _flex_kernel(compiled: bool) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention  # type: ignore[return-value] # one tensor


@dataclass(frozen=True)
class Diagonal:
    """Packed rows of clean ids, laid end to end: blocks along the diagonal, each causal."""

    bias: Any  # BlockDiagonalCausalMask

    @classmethod
    def plan(cls, sizes: list[int]) -> "Diagonal":
        """Of documents that follow each other, over all rows."""
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask  # type: ignore # optional

        return cls(BlockDiagonalCausalMask.from_seqlens(sizes))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from xformers.ops import memory_efficient_attention  # type: ignore # optional

        k, v = _share(q, k, v)
        flat = (x.transpose(1, 2).flatten(0, 1)[None] for x in (q, k, v))
        with torch.autocast(v.device.type, enabled=False):
            out = memory_efficient_attention(*flat, attn_bias=self.bias)
        return out[0].unflatten(0, (len(q), -1)).transpose(1, 2)


def _exact(*parts: torch.Tensor) -> list[torch.Tensor]:
    # bf16 attention is slower than float32 on CPUs, and less exact
    if parts[0].device.type != "cpu":
        return list(parts)
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in parts]


def _share(q: torch.Tensor, *parts: torch.Tensor) -> list[torch.Tensor]:
    # each key-value head serves a run of query heads
    return [part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in parts]
