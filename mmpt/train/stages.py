"""Staged training of a vocabulary that was expanded: the rows of new ids first, then everything.

New rows are noise to begin with, and what they send back would disturb a model that knows its text
(the first stage of arXiv 2402.14714 and of its kin).
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mmpt.model.collectives import local
from mmpt.model.transformer import Decoder


class NewRowsFirst:
    """For its first `steps` a run trains the rows of ids from `num_old` on, and nothing else.

    What is held follows from the step alone, so a run that goes on holds the same. The gradients of
    all else are dropped, so that an optimiser neither moves them nor counts their steps; and
    nothing decays.
    """

    def __init__(
        self, model: Decoder, optimizer: torch.optim.Optimizer, *, num_old: int, steps: int
    ) -> None:
        self.steps, self._optimizer = steps, optimizer
        rows = [each for each in (model.embedding, model.head) if each is not None]
        self._old = {each: _old_rows(each, num_old) for each in rows if steps}
        # kept, since a model that FSDP has gathered names other parameters than its shards
        self._others = [p for p in model.parameters() if p not in self._old] if steps else []
        self._decays = [group["weight_decay"] for group in optimizer.param_groups]

    def holds(self, step: int) -> bool:
        """Whether step `step` (from 0) trains new rows only."""
        return step < self.steps

    @torch.no_grad()
    def apply(self, step: int) -> None:
        """Between the gradients of a step and their norm."""
        if not self.steps:
            return
        held = self.holds(step)
        for group, decay in zip(self._optimizer.param_groups, self._decays, strict=True):
            group["weight_decay"] = 0.0 if held else decay
        if held:
            for weight, old in self._old.items():
                if weight.grad is not None:
                    local(weight.grad)[old] = 0
            for parameter in self._others:
                parameter.grad = None


def _old_rows(weight: nn.Parameter, num_old: int) -> Tensor:
    """bool: which of the rows that this rank has are of ids below `num_old`."""
    old = torch.arange(len(weight), device=weight.device) < num_old
    if not isinstance(weight, DTensor):
        return old
    sides = [side if side == Shard(0) else Replicate() for side in weight.placements]
    return distribute_tensor(old, weight.device_mesh, sides, src_data_rank=None).to_local()
