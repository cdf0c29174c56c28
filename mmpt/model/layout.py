"""Who sees whom: the one rule that every way to compute attention follows.

Packed rows, left-padded prompts, a cache of committed ids, the joint layout of clean and noisy ids:
each is a matter of what the four integers of a `Layout` are.

Legend: B batch, T queries, S keys.
"""

from collections.abc import Callable
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

    def cat(self, other: "Layout") -> "Layout":
        """This layout, followed by another along the row."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Layout(*(torch.cat(pair, dim=1) for pair in pairs))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Layout":
        """The same with every column changed alike."""
        return Layout(*(function(getattr(self, f.name)) for f in fields(self)))


def sees(query: Layout, key: Layout) -> torch.Tensor:
    """bool: whether each query sees each key, of columns that broadcast against each other.

    Within a document, a clean key is seen up to the query's limit, a noisy key by its own block.
    """
    same = (query.document == key.document) & (query.document >= 0)
    before, within = key.position <= query.limit, query.block == key.block
    return same & torch.where(key.block < 0, before, within)


def visible(query: Layout, key: Layout) -> torch.Tensor:
    """bool (B, T, S): which key each query sees.

    The queries are the last T keys; each sees itself, so that no row is empty (pads).
    """
    seen = sees(query.map(lambda x: x[:, :, None]), key.map(lambda x: x[:, None, :]))
    num_queries, num_keys = seen.shape[1:]
    seen.diagonal(num_keys - num_queries, 1, 2).fill_(True)
    return seen
