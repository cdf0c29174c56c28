"""What the ranks of a layout hold of each weight, and what they send each other in a step.

The sides of a layout are those of `mmpt.train.parallel`. Bytes are those of the whole tensor of a
collective: what an all-gather gives, what a reduce-scatter takes, what the others change in place.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mmpt.plan.workload import ROOT, Weight, Workload
from mmpt.train.parallel import ParallelConfig, free_side

WIDE = 4  # bytes of weights, gradients and what is summed of them: always float32
Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]


@dataclass(frozen=True)
class Layout:
    """A grid of ranks, the last side fastest."""

    replicate: int
    outer: int
    expert: int
    tensor: int

    @classmethod
    def of(cls, config: ParallelConfig, count: int) -> "Layout":
        """Of so many ranks; UserError where they do not come out."""
        return cls(*config.grid(count))

    @property
    def num_data(self) -> int:
        """Ranks that read rows of their own."""
        return self.replicate * self.outer * self.expert

    def side(self, name: str) -> tuple[int, int]:
        """Ranks of a group of this name, and the distance of its neighbours."""
        spans = {
            "tensor": (self.tensor, 1),
            "expert": (self.expert, self.tensor),
            "outer": (self.outer, self.tensor * self.expert),
            "shard": (self.outer * self.expert, self.tensor),
            "replicate": (self.replicate, self.tensor * self.expert * self.outer),
        }
        return spans[name]

    def config(self, of: ParallelConfig) -> ParallelConfig:
        """A recipe's table with these sides."""
        return replace(of, replicate=self.replicate, expert=self.expert, tensor=self.tensor)

    def __str__(self) -> str:
        return " x ".join(map(str, (self.replicate, self.outer, self.expert, self.tensor)))


@dataclass(frozen=True)
class Held:
    """What one rank has of a weight.

    over: the side whose ranks divide it further (FSDP); whole: elements of all of them together,
    padded: of what each of them gathers; mine: of the largest part. first: its first side is what
    is divided, if any. unit: what it is gathered with.
    """

    weight: Weight
    over: Literal["shard", "outer"]
    whole: int
    padded: int
    mine: int
    first: bool
    unit: str


@dataclass(frozen=True)
class Message:
    """A collective of all ranks along `side`, `count` times a step of so many bytes each.

    hidden: it travels while layers compute.
    """

    kind: Kind
    side: str
    bytes: float
    count: float
    hidden: bool = False

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends in a step by a ring, or pair by pair."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.count * self.bytes * rounds * (ranks - 1) / ranks


def held(work: Workload, layout: Layout) -> list[Held]:
    """Every weight of the root and of one layer, as one rank has it."""
    return [_hold(work, layout, weight) for weight in work.weights]


def _hold(work: Workload, layout: Layout, weight: Weight) -> Held:
    shape, taken = list(weight.shape), set()
    apart = _apart(work, layout, weight)
    if apart:
        shape[0] //= layout.expert
        taken.add(0)
    if weight.tensor_side is not None and layout.tensor > 1:
        shape[weight.tensor_side] //= layout.tensor
        taken.add(weight.tensor_side)
    over = "outer" if apart else "shard"
    ranks, whole = layout.side(over)[0], math.prod(shape)
    side = free_side(shape, taken, ranks)
    part = math.ceil(shape[side] / ranks) * (whole // shape[side])
    layer = "layer" if weight.name.startswith("layer.") else ROOT
    lent = weight.group is not None and work.model.expert_share_every > 1
    unit = f"bank {weight.group}" if apart or lent else layer
    first = side == 0 and taken <= {0}
    return Held(weight, over, whole, part * ranks, part, first, unit)


def _apart(work: Workload, layout: Layout, weight: Weight) -> bool:
    return (
        weight.group is not None
        and layout.expert > 1
        and work.model.groups[weight.group].num_experts > 1
    )


def messages(work: Workload, layout: Layout) -> Iterator[Message]:
    """All of a step but single numbers."""
    yield from _of_weights(work, layout)
    yield from _of_experts(work, layout)
    yield from _of_tensors(work, layout)
    yield from _of_muon(work, layout)


def _of_weights(work: Workload, layout: Layout) -> Iterator[Message]:
    recipe, units = work.recipe, held(work, layout)
    for name in sorted({each.unit for each in units}):
        parts = [each for each in units if each.unit == name]
        over = parts[0].over
        size = WIDE * sum(each.padded for each in parts)
        gathers = 1 + (recipe.parallel.reshard and name != ROOT)  # for the backward pass, too
        first = parts[0].weight  # experts that layers share are gathered by each, and reduced once
        gathers *= recipe.accumulate * first.uses
        count = recipe.accumulate * first.num
        trained = [each for each in parts if each.weight.trained]
        if layout.side(over)[0] > 1:
            reduced = WIDE * sum(each.padded for each in trained)
            yield Message("all-gather", over, size, gathers, hidden=True)
            yield Message("reduce-scatter", over, reduced, count, hidden=True)
        if layout.replicate > 1:
            mine = WIDE * sum(each.mine for each in trained)
            yield Message("all-reduce", "replicate", mine, count, hidden=True)


def _of_experts(work: Workload, layout: Layout) -> Iterator[Message]:
    if layout.expert == 1:
        return
    model, recipe = work.model, work.recipe
    ids = recipe.data.rows * recipe.data.length / layout.num_data
    count = recipe.accumulate * model.num_layers
    again = recipe.parallel.recompute != "none"
    for group in model.groups.values():
        if group.num_experts > 1:
            rows = ids * work.share_of(group) * group.mean_active * model.width
            # there and back as products take and give it; gradients likewise
            yield Message("all-to-all", "expert", rows * work.products, 2 * count * (2 + again))
            yield Message("all-to-all", "expert", 8 * group.num_experts, count * (1 + again))


def _of_tensors(work: Workload, layout: Layout) -> Iterator[Message]:
    if layout.tensor == 1:
        return
    model, recipe = work.model, work.recipe
    ids = recipe.data.rows * recipe.data.length / layout.num_data
    count = recipe.accumulate * model.num_layers
    forward = count * (2 if recipe.parallel.recompute != "none" else 1)
    yield Message("all-reduce", "tensor", ids * model.width * work.products, forward)
    yield Message("all-reduce", "tensor", ids * model.width * WIDE, count)
    yield Message("all-reduce", "tensor", WIDE * model.width_per_head, 2 * count)  # of QK-norm
    for group in model.groups.values():
        # rows of identity experts go along, unless experts are elsewhere
        apart = layout.expert > 1 and group.num_experts > 1
        experts = group.mean_active if apart else group.num_active
        rows = ids * work.share_of(group) * (experts + (group.shared_hidden > 0)) * model.width
        yield Message("all-reduce", "tensor", rows * work.products, forward + count)


def _of_muon(work: Workload, layout: Layout) -> Iterator[Message]:
    for each in gathered_by_muon(work, layout):
        size = each.mine * work_bytes(work)
        sides = ["tensor"] if each.weight.tensor_side is not None else []
        sides += ["expert"] if each.over == "outer" else []  # its experts, which are apart, too
        for side in [*sides, each.over]:
            ranks = layout.side(side)[0]
            size *= ranks
            if ranks > 1:
                yield Message("all-gather", side, size, each.weight.num)


def gathered_by_muon(work: Workload, layout: Layout) -> list[Held]:
    """Matrices that Muon gathers, to make all of each orthogonal on every rank."""
    if work.recipe.optim.kind != "muon":
        return []
    stays = [each for each in held(work, layout) if each.weight.group and each.first]
    trained = [each for each in held(work, layout) if each.weight.trained]
    return [e for e in trained if e.weight.orthogonal and e not in stays]


def work_bytes(work: Workload) -> int:
    """Of a number that Muon gathers: half of float32 on GPUs."""
    return 4 if work.recipe.device == "cpu" else 2
