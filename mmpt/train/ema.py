"""The average of the weights over the steps, which often is the better model.

It is held beside the trained parameters, divided over ranks as they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmpt.model.collectives import local


class Average:
    """An exponential average of the parameters that are trained, from when it is made."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        # kept, since a model that FSDP has gathered names other parameters than its shards
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._means = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters, after step `step` (from 0); further in the first steps.

        So the first weights fade in a short run too: the decay is at most (1 + step) / (10 + step).
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        # parts that are spread in different ways cannot be computed with together
        means, trained = (
            [local(tensor) for tensor in tensors.values()]
            for tensors in (self._means, self._trained)
        )
        torch._foreach_lerp_(means, trained, 1 - decay)  # type: ignore # it has no public name

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model with the averaged weights while the block runs, to use and not to train."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, not copied."""
        return dict(self._means)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; KeyError where a parameter is missing."""
        for name, mean in self._means.items():
            mean.copy_(state[name])

    @torch.no_grad()
    def _exchange(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # else the gathered weights of before would be used
        for name, mean in self._means.items():
            parameter = self._trained[name]
            kept = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(kept)
