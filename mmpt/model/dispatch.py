"""Which id goes where: planned once per batch, used by every layer.

The ids of a batch are sorted by group. What else the routers of a group need to know of its ids,
besides their vectors, is in its `Part`.

Legend: B batch, T row, N ids (batch x row), G ids of a group, C experts per id, K ids per expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmpt.config import UserError
from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.draws import hash_ids, mix
from mmpt.model.layout import Layout
from mmpt.vocab import Modality


@dataclass(frozen=True)
class Part:
    """What routers need to know of the ids of a group, in the order of the dispatch.

    pool_G, slots_K: expert choice sorts the ids by pool, then by score; each expert takes those at
    the places K. pool_G is None where all are in one pool.
    """

    hashed_GC: torch.Tensor | None = None  # the experts that the ids' hashes choose
    pool_G: torch.Tensor | None = None
    slots_K: torch.Tensor | None = None
    noise_G: torch.Tensor | None = None  # int64, seeds of what is drawn; None: nothing is


@dataclass(frozen=True)
class Dispatch:
    """Flat positions by group: clean groups, noisy ones, then pads, which no expert takes."""

    order: torch.Tensor  # int64 (N,)
    inverse: torch.Tensor  # int64 (N,)
    counts: tuple[int, ...]  # ids per group, then pads
    noisy_index: torch.Tensor | None  # flat positions of noisy ids; None when there are none
    parts: tuple[Part, ...]  # of each group

    @classmethod
    def plan(
        cls,
        group: torch.Tensor,
        config: ModelConfig,
        *,
        ids: torch.Tensor | None = None,
        layout: Layout | None = None,
        time: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> "Dispatch":
        """From group numbers (B, T), see `group_table`. One host sync on a GPU.

        ids, layout: (B, T), for hashes and pools; a document stands together in its row, and so
        does a block. time: float (B, T) from 0 (noise) to 1 (clean), which capacities may follow.
        noise: int64 (B,), a seed per row. UserError for ids that the model does not know.
        """
        flat, groups = group.flatten(), list(config.ordered_groups.values())
        order = torch.argsort(flat, stable=True)
        strange = flat.new_zeros(()) if ids is None else _strange(ids, config)
        told, pools = [count(flat, len(groups) + 2), strange[None]], None
        if any(each.router == "expert_choice" for each in groups):
            assert layout is not None, "pools follow from the layout"
            pools = _Pools.plan(flat[order], order, groups, layout, time)
            told.append(pools.slots)
        numbers = torch.cat(told).tolist()
        counts, unserved = numbers[: len(groups) + 1], numbers[len(groups) + 1]
        _refuse(numbers[len(groups) + 2], unserved, config)
        slots = numbers[len(groups) + 3 :] or [0] * len(groups)
        num_clean = sum(n for n, g in zip(counts, groups, strict=False) if not g.noisy)
        num_noisy = sum(counts[:-1]) - num_clean
        noisy = order[num_clean : num_clean + num_noisy]
        # while training, the weights of noisy ids take part where there are none, too
        unused = not num_noisy and not (torch.is_grad_enabled() and any(g.noisy for g in groups))
        seeds = None if noise is None else _seeds(noise, order, group.shape[1])
        parts, stop = [], 0
        for each, number, num_slots in zip(groups, counts, slots, strict=False):
            place = slice(stop, stop + number)
            stop = place.stop
            hashed = pool = taken = None
            if each.router == "hash":
                assert ids is not None, "a hash is of an id"
                hashed = hash_ids(ids.flatten()[order[place]], each.num_experts, each.num_active)
            if each.router == "expert_choice" and pools is not None:
                pool = None if each.scope == "batch" else pools.run_N[place]
                taken = torch.argsort(~pools.taken_N[place], stable=True)[:num_slots]
            parts.append(Part(hashed, pool, taken, None if seeds is None else seeds[place]))
        noisy_index = None if unused else noisy
        return cls(order, invert(order), tuple(counts), noisy_index, tuple(parts))


@dataclass(frozen=True)
class _Pools:
    """Of ids in the order of a dispatch: runs that compete for experts, and who may win.

    An expert takes as many of each run as the run has places marked in `taken_N`: its first ones.
    """

    run_N: torch.Tensor  # the number of the run, ascending
    taken_N: torch.Tensor  # bool
    slots: torch.Tensor  # int64 (groups,): places that are marked

    @classmethod
    def plan(
        cls,
        group_N: torch.Tensor,
        order: torch.Tensor,
        groups: Sequence[GroupConfig],
        layout: Layout,
        time: torch.Tensor | None,
    ) -> "_Pools":
        whole = torch.tensor([each.scope == "batch" for each in groups] + [True] * 2)
        share = torch.tensor([each.num_active / each.num_experts for each in groups] + [0.0] * 2)
        slope = torch.tensor([each.capacity_slope for each in groups] + [0.0] * 2)
        whole_N, share_N, slope_N = (x.to(order.device)[group_N] for x in (whole, share, slope))
        block_N, row_N = layout.block.flatten()[order], order // layout.block.shape[1]
        what_N = torch.where(block_N < 0, layout.document.flatten()[order], block_N)
        new_N = torch.ones_like(whole_N)
        new_N[1:] = ((row_N.diff() != 0) | (what_N.diff() != 0)) & ~whole_N[1:]
        new_N[1:] |= group_N.diff() != 0
        run_N = new_N.cumsum(0) - 1
        size_N = count(run_N, len(run_N))  # of each run; there are at most as many as ids
        first_N = (size_N.cumsum(0) - size_N)[run_N]
        clean_N = 0.5 if time is None else time.flatten()[order][first_N]
        # the mean over all times is the share: a capacity that follows the noise costs no more
        wanted_N = size_N[run_N] * share_N * (1 + slope_N * (2 * clean_N - 1))
        rank_N = torch.arange(len(run_N), device=order.device) - first_N
        taken_N = rank_N < (wanted_N + 0.5).floor().clamp(min=1)  # one, where it comes to none
        slots = torch.zeros(len(groups) + 2, dtype=torch.int64, device=order.device)
        slots = slots.scatter_add_(0, group_N, taken_N.long())[: len(groups)]
        return cls(run_N, taken_N, slots)


def group_table(config: ModelConfig) -> torch.Tensor:
    """int64 (2, 4): the group of [noisy, modality]; one past the number of pads where none is."""
    groups = list(config.ordered_groups.values())
    table = torch.full((2, len(Modality)), len(groups) + 1)
    for number, group in enumerate(groups):
        for name in group.modalities:
            table[int(group.noisy), Modality[name.upper()]] = number
    return table


def count(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """int64 (size,): how often each number occurs; without the host sync of `bincount`."""
    zeros = torch.zeros(size, dtype=torch.int64, device=numbers.device)
    return zeros.scatter_add_(0, numbers, torch.ones_like(numbers))


def invert(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `order`."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse


def _strange(ids: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    return ((ids < 0) | (ids >= config.vocab_size)).sum()


def _refuse(strange: int, unserved: int, config: ModelConfig) -> None:
    if strange:
        raise UserError(
            f"{strange} ids are not among the {config.vocab_size} of this model; encode with the "
            "vocabulary that it was made with"
        )
    if unserved:
        raise UserError(
            f"no group serves the modality of {unserved} ids; use modalities 0 to 3, and for noisy "
            "ids, of which there may be no noisy group, call add_noisy_groups() and adapt"
        )


def _seeds(noise: torch.Tensor, order: torch.Tensor, length: int) -> torch.Tensor:
    # of each id by its row's seed and its place there: other rows change nothing
    return mix(noise[order // length]) + order % length
