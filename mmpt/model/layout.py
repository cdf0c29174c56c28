"""Who sees whom: the one rule that every way to compute attention follows.

Packed rows, left-padded prompts, a cache of committed ids, the joint layout of clean and noisy ids:
each is a matter of what the four integers of a `Layout` are.

Legend: B batch, T queries, S keys.
"""

from dataclasses import dataclass, fields

import torch


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

    def select(self, rows: slice | torch.Tensor) -> "Layout":
        """The layout of some rows."""
        return Layout(*(getattr(self, f.name)[rows] for f in fields(self)))

    def cat(self, *others: "Layout") -> "Layout":
        """This layout, followed by others along the row."""
        parts = ([getattr(each, f.name) for each in (self, *others)] for f in fields(self))
        return Layout(*(torch.cat(part, dim=1) for part in parts))

    def first(self, count: int) -> "Layout":
        """The layout of the first ids of each row."""
        return Layout(*(getattr(self, f.name)[:, :count] for f in fields(self)))


def sees(
    document: torch.Tensor,
    limit: torch.Tensor,
    block: torch.Tensor,
    key_document: torch.Tensor,
    key_position: torch.Tensor,
    key_block: torch.Tensor,
) -> torch.Tensor:
    """bool: whether queries see keys, of columns that broadcast against each other.

    Within a document, a clean key is seen up to the query's limit, a noisy key by its own block.
    """
    same = (document == key_document) & (document >= 0)
    return same & torch.where(key_block < 0, key_position <= limit, key_block == block)


def visible(query: Layout, key: Layout) -> torch.Tensor:
    """bool (B, T, S): which key each query sees.

    The queries are the last T keys; each sees itself, so that no row is empty (pads).
    """
    mine = (x[:, :, None] for x in (query.document, query.limit, query.block))
    seen = sees(*mine, *(x[:, None] for x in (key.document, key.position, key.block)))
    num_queries, num_keys = seen.shape[1:]
    seen.diagonal(num_keys - num_queries, 1, 2).fill_(True)
    return seen


def segments(layout: Layout) -> list[int] | None:
    """The sizes of the documents that follow each other, over all rows; each pad is one by itself.

    None where some id sees other ids than those before it in its run: noisy blocks, documents in
    parts. One host sync on a GPU.
    """
    document, position = layout.document, layout.position
    joined = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
    joined &= position[:, 1:] == position[:, :-1] + 1
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = ~joined
    row = torch.arange(len(document), device=document.device)[:, None]
    named = (document + row * (document.max() + 1))[begins & (document >= 0)]
    plain = ((layout.block < 0) & (layout.limit == position)).all() & (
        len(named.unique()) == len(named)
    )
    if not plain:
        return None
    starts = begins.flatten().nonzero()[:, 0].tolist()
    return [stop - start for start, stop in zip(starts, [*starts[1:], begins.numel()], strict=True)]
