"""Which layouts so many ranks can have, what each costs, and which is the fastest that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mmpt.config import UserError
from mmpt.plan.machines import Machine
from mmpt.plan.memory import Memory, gb, memory
from mmpt.plan.timing import Seconds, seconds
from mmpt.plan.traffic import Layout, messages
from mmpt.plan.workload import Workload

RECOMPUTE = ("none", "selective", "full")  # each keeps less than the one before
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")


@dataclass(frozen=True)
class Cost:
    """A layout and what it takes; the workload's recompute is the one it was computed for."""

    layout: Layout
    work: Workload
    memory: Memory
    seconds: Seconds
    machine: Machine

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.machine.memory * self.machine.usable

    @property
    def recompute(self) -> str:
        return self.work.recipe.parallel.recompute

    @property
    def mfu(self) -> float:
        """Operations of the model, without those done again, over the peak of all ranks."""
        layout = self.layout
        useful = 3 * self.work.mean_flops * self.work.tokens / layout.num_data / layout.tensor
        return useful / self.seconds.step / self.machine.peak(self.work.recipe.precision)

    def row(self) -> dict[str, Any]:
        """For JSON. Memory and sent bytes in GB of one rank, times in seconds."""
        layout, step = self.layout, self.seconds.step
        sent = dict.fromkeys(KINDS, 0.0)
        tensors = 0.0
        for message in messages(self.work, layout):
            volume = message.sent(layout.side(message.side)[0])
            sent[message.kind] += volume
            tensors += volume * (message.side == "tensor")
        ranks = layout.num_data * layout.tensor
        return {
            **vars(layout),
            "recompute": self.recompute,
            "fits": self.fits,
            "memory": self.memory.rounded(),
            "sent": {k: gb(v) for k, v in sent.items()} | {"of which tensors": gb(tensors)},
            "seconds": self.seconds.rounded(),
            "tokens per second and rank": float(f"{self.work.tokens / step / ranks:.4g}"),
            "mfu": round(self.mfu, 4),
        }


def sensible(work: Workload, count: int, machine: Machine) -> Iterator[Layout]:
    """Tensors within a node, experts by their number, replicas that do not end within one."""
    most = max(group.num_experts for group in work.model.groups.values())
    for tensor in _divisors(min(machine.node, count)):
        for expert in _divisors(most):
            if count % (tensor * expert):
                continue
            for replicate in _divisors(count // (tensor * expert)):
                shard = count // replicate
                if replicate == 1 or shard % machine.node == 0 or machine.node % shard == 0:
                    outer = count // (tensor * expert * replicate)
                    yield Layout(replicate, outer, expert, tensor)


def check(work: Workload, layout: Layout, count: int) -> None:
    """Raises UserError where the engine or the loader would."""
    recipe = work.recipe
    layout.config(recipe.parallel).check(work.model, count)
    if recipe.data.rows % layout.num_data:
        raise UserError(
            f"{layout.num_data} ranks that read rows do not divide data.rows = {recipe.data.rows}; "
            f"use a multiple of {layout.num_data}"
        )


def cost(work: Workload, layout: Layout, machine: Machine, *, recompute: str) -> Cost:
    """Of one layout, with one kind of recomputation."""
    parallel = replace(layout.config(work.recipe.parallel), recompute=recompute)  # type: ignore[arg-type] # one of three
    work = replace(work, recipe=replace(work.recipe, parallel=parallel))
    return Cost(layout, work, memory(work, layout), seconds(work, layout, machine), machine)


def cheapest(work: Workload, layout: Layout, machine: Machine) -> Cost:
    """The first kind of recomputation that fits, from the recipe's own on; else the last."""
    kinds = RECOMPUTE[RECOMPUTE.index(work.recipe.parallel.recompute) :]
    costs = [cost(work, layout, machine, recompute=kind) for kind in kinds]
    return next((each for each in costs if each.fits), costs[-1])


@dataclass(frozen=True)
class Survey:
    """The recipe's own layout if it can be, all that fit (the fastest first), and what does not."""

    own: Cost | None
    fitting: list[Cost]
    refused: list[tuple[str, str]]  # layout, why

    @property
    def best(self) -> Cost | None:
        return self.fitting[0] if self.fitting else None


def survey(work: Workload, count: int, machine: Machine) -> Survey:
    """Look at every sensible layout of so many ranks."""
    refused: list[tuple[str, str]] = []
    costs: list[Cost] = []
    own = None
    try:
        layout = Layout.of(work.recipe.parallel, count)
        check(work, layout, count)
        own = cost(work, layout, machine, recompute=work.recipe.parallel.recompute)
    except UserError as error:
        refused.append(("the recipe's own", str(error)))
    for layout in sensible(work, count, machine):
        try:
            check(work, layout, count)
        except UserError as error:
            refused.append((str(layout), str(error)))
            continue
        costs.append(cheapest(work, layout, machine))
    fitting = [each for each in costs if each.fits]
    large = sorted((each for each in costs if not each.fits), key=lambda each: each.memory.peak)
    refused += [(str(each.layout), _too_large(each)) for each in large]
    return Survey(own, sorted(fitting, key=lambda each: each.seconds.step), refused)


def _too_large(each: Cost) -> str:
    sizes = each.memory.rounded()
    peak = sizes.pop("peak")
    name = max(sizes, key=lambda key: sizes[key])
    limit = gb(each.machine.memory * each.machine.usable)
    return (
        f"needs {peak} GB of {limit} usable with recompute = {each.recompute}, most of it "
        f"{name}: {sizes[name]} GB"
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
