"""Attention itself: queries, keys and values in, what each query sees out.

Legend: B batch, T queries, S keys, H heads, K key-value heads, W head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mmpt.model.layout import Layout, visible

CHUNK = 64  # queries of a piece


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
