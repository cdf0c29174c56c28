"""The processes of a training: one, or the ranks that torchrun starts.

Every process draws the whole batch and keeps its share, and gradients are averaged, so that a step
does not depend on the number of processes. All must see the same files; only the first one writes.
"""

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn

from mmpt.config import UserError
from mmpt.process import pick_device


class Processes:
    """Who this process is among how many, and where it computes.

    device: "auto" is a GPU if there is one, and under torchrun the one of the local rank.
    """

    def __init__(self, device: str = "auto") -> None:
        self.rank, self.count = 0, int(os.environ.get("WORLD_SIZE", "1"))
        self.device = pick_device(device)
        self._opened = False
        if self.count > 1:
            if not distributed.is_initialized():
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)
                distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
                self._opened = True
            self.rank = distributed.get_rank()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._opened:
            distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def share_of(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """This process's rows of a batch, and their weight in a mean over all processes."""
        size = len(next(iter(batch.values())))
        if size < self.count:
            raise UserError(
                f"a batch of {size} cannot be shared by {self.count} processes; raise batch"
            )
        rows = slice(self.rank, None, self.count)
        mine = {name: value[rows].to(self.device) for name, value in batch.items()}
        return mine, len(next(iter(mine.values()))) * self.count / size

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.count == 1:
            return
        # a parameter may be out of use here and in use elsewhere: flags travel with the gradients
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flags = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        flat = self.average(torch.cat([grad.float().flatten() for grad in grads] + [flags]))
        pieces = flat.split([p.numel() for p in parameters] + [len(flags)])
        for parameter, piece, used in zip(parameters, pieces, pieces[-1].tolist(), strict=False):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype) if used else None

    def average(self, values: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        return self.sum(values) / self.count if self.count > 1 else values

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.count > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def metrics(self, row: dict[str, Any], share: float) -> dict[str, Any]:
        """A row of the log over all processes: counts (int) are summed, floats averaged."""
        if self.count == 1:
            return row
        values = [
            float(v) * (1 if isinstance(v, int) else share / self.count) for v in row.values()
        ]
        total = self.sum(torch.tensor(values, dtype=torch.float64, device=self.device))
        kinds = [type(value) for value in row.values()]
        return {k: kind(v) for k, kind, v in zip(row, kinds, total.tolist(), strict=True)}

    def same_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's buffers."""
        if self.count > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)

    def any(self, wish: bool) -> bool:
        """Whether one of the processes wishes it."""
        if self.count == 1:  # without waiting for a GPU
            return wish
        return bool(self.sum(torch.tensor(float(wish), device=self.device)))
