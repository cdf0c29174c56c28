"""How long a step takes, from a model that is stated here.

- Computing: operations / (peak x efficiency) + bytes of activations and logits moved / memory
  rate. Ranks that share tensors all compute routers and head.
- A message: latency x log2(ranks) + bytes sent / bandwidth. Within a node that is the link's;
  between nodes a ring uses the network ports of all its members in a node, at most the link's
  bandwidth; of an all-to-all, what leaves the node goes through the sender's own port.
- Weights and gradients travel while layers compute, for up to `overlap` of that time; what experts
  and tensors exchange is waited for.
- The optimiser moves its states through memory; Muon's iterations are products, which every rank
  repeats for matrices that are gathered.
- Experts are taken as equally loaded, data as ready, and ranks as equally fast.
"""

import math
from dataclasses import dataclass

from mmpt.muon import ROUNDS
from mmpt.plan.machines import Machine
from mmpt.plan.memory import kept_of_layer
from mmpt.plan.traffic import WIDE, Layout, Message, gathered_by_muon, held, messages
from mmpt.plan.workload import Workload

# times that a kept activation goes through memory: written and read twice, forward and backward,
# where its gradient is read and written, too
MOVES = 6
# bytes that go through memory for each logit: products' dtype and float32, eleven times in all
LOGITS = 46
# float32 numbers that go through memory for each weight a step: those of the optimiser, and of the
# norm and the clipping
UPDATES = 7 + 3


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of a step: work of a rank, and what of its messages is waited for."""

    compute: float
    optimizer: float
    weights: float  # travelling weights and gradients, hidden or not
    exchanged: float  # between experts and tensors
    waited: float  # the part of `weights` that no computing hides

    @property
    def step(self) -> float:
        """All of it."""
        return self.compute + self.optimizer + self.exchanged + self.waited

    def rounded(self) -> dict[str, float]:
        """Seconds to four digits."""
        parts = [*vars(self).items(), ("step", self.step)]
        return {name: float(f"{value:.4g}") for name, value in parts}


def seconds(work: Workload, layout: Layout, machine: Machine) -> Seconds:
    """Of one step of every rank."""
    compute = _compute(work, layout, machine)
    hidden = exchanged = 0.0
    for message in messages(work, layout):
        took = _travel(message, layout, machine)
        hidden += took * message.hidden
        exchanged += took * (not message.hidden)
    return Seconds(
        compute=compute,
        optimizer=_optimizer(work, layout, machine),
        weights=hidden,
        exchanged=exchanged,
        waited=max(0.0, hidden - machine.overlap * compute),
    )


def flops_of_rank(work: Workload, layout: Layout) -> float:
    """Of a step, what is computed again among them."""
    ids = work.tokens / layout.num_data
    routers = sum(
        2 * work.model.width * group.num_choices * work.share_of(group)
        for group in work.model.groups.values()
        if group.learned and not group.noisy
    )
    whole = work.model.num_layers * routers
    layers = work.mean_flops - work.head_flops - whole
    passes = 4 if work.recipe.parallel.recompute == "full" else 3
    return ids * (passes * (layers / layout.tensor + whole) + 3 * work.head_flops)


def _compute(work: Workload, layout: Layout, machine: Machine) -> float:
    products = flops_of_rank(work, layout) / (
        machine.peak(work.recipe.precision) * machine.efficiency
    )
    passes = MOVES * (1.0 if work.recipe.parallel.recompute == "none" else 4 / 3)
    kept = work.model.num_layers * kept_of_layer(work, layout, "none")
    ids = work.tokens / layout.num_data
    moved = ids * (passes * kept + LOGITS * work.model.vocab_size)
    calls = work.recipe.accumulate * work.model.num_layers * machine.small_step
    return products + moved / machine.memory_rate + calls


def _travel(message: Message, layout: Layout, machine: Machine) -> float:
    ranks, distance = layout.side(message.side)
    within = max(1, min(ranks, machine.node // distance))  # of the group, in one node
    latency = machine.link_latency if within == ranks else machine.network_latency
    if within == ranks:
        rate = machine.link
    elif message.kind == "all-to-all":
        outside = (ranks - within) / (ranks - 1)
        rate = min(machine.link, machine.network / outside)
    else:
        rate = min(machine.link, machine.network * within)
    return message.count * latency * math.log2(ranks) + message.sent(ranks) / rate


def _optimizer(work: Workload, layout: Layout, machine: Machine) -> float:
    mine = sum(each.mine * each.weight.num for each in held(work, layout))
    updates = UPDATES * WIDE * mine / machine.memory_rate
    if work.recipe.optim.kind != "muon":
        return updates
    gathered = {each.weight.name for each in gathered_by_muon(work, layout)}
    operations = 0.0
    for each in held(work, layout):
        if each.weight.orthogonal:
            whole = each.weight.name in gathered
            share = 1.0 if whole else each.mine / each.weight.numel
            operations += share * each.weight.num * _orthogonal_flops(each.weight.shape)
    dtype = work.recipe.precision if work.recipe.device == "cpu" else "bf16"
    return updates + operations / (machine.peak(dtype) * machine.efficiency)


def _orthogonal_flops(shape: tuple[int, ...]) -> float:
    """Of Muon's iteration on all matrices of a weight; of q, k and v as if they were one."""
    if len(shape) == 4:  # gate and up side by side
        stack, rows, maps, columns = shape
    else:
        (*stacked, rows, columns), maps = shape, 1
        stack = math.prod(stacked)
    small, large = min(rows, columns), max(rows, columns)
    return ROUNDS * stack * maps * (4 * small**2 * large + 2 * small**3)
