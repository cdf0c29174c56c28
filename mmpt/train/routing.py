"""How routers use their experts: entropy, imbalance, gradients, experts and ids left out."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from mmpt.model.transformer import Decoder
from mmpt.train.parallel import gradient_norms

DEAD = 100  # steps with ids for its group, but none for itself, after which an expert counts so


class Routing:
    """Looks at every step; remembers for how many steps each expert has had nothing to do."""

    def __init__(self) -> None:
        self._idle: dict[str, torch.Tensor] = {}  # group -> int64 (layers, experts)

    def look(
        self,
        loads: Mapping[str, torch.Tensor],
        scores: Mapping[str, torch.Tensor],
        unserved: Mapping[str, torch.Tensor] | None = None,
        gradients: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, dict[str, list[float | int | None]]]:
        """Group -> name -> a number per layer, of groups with several experts.

        Of this step, on the host: loads, scores (layers, experts), ids per expert and sums of
        router scores; unserved (layers, 2), ids that no expert computed, and all; gradients
        (layers,), norms of those of routers. entropy: of the mean score, from 0 (one expert) to 1
        (all alike). imbalance: the largest load over the mean. unserved: the share, where there are
        such ids. Each is None where the group had no ids.
        """
        rows = {}
        for name, load in loads.items():
            if load.shape[1] == 1:
                continue
            load, score, total = load.double(), scores[name].double(), load.double().sum(1)
            idle = self._idle.get(name, torch.zeros_like(load, dtype=torch.int64))
            idle = torch.where(load > 0, 0, idle + (total > 0).long()[:, None])
            self._idle[name] = idle
            share = score / score.sum(1, keepdim=True)
            entropy = torch.special.entr(share).sum(1) / math.log(load.shape[1])
            rows[name] = {
                "entropy": _finite(entropy),
                "imbalance": _finite(load.amax(1) / (total / load.shape[1])),
                "dead": (idle >= DEAD).sum(1).tolist(),
            }
            if unserved is not None and unserved[name][:, 0].any():
                left, seen = unserved[name].double().unbind(1)
                rows[name]["unserved"] = _finite(left / seen)
            if gradients is not None and name in gradients:
                rows[name]["grad_norm"] = _finite(gradients[name], digits=8)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {name: idle.tolist() for name, idle in self._idle.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._idle = {name: torch.tensor(idle) for name, idle in state.items()}


def router_gradients(model: Decoder) -> dict[str, torch.Tensor]:
    """Per group (layers,): norms of the gradients of its routers, before they are clipped."""
    routers = model.routers()
    if not routers:
        return {}
    norms = gradient_norms([each for layers in routers.values() for each in layers]).cpu()
    split = norms.split([len(layers) for layers in routers.values()])
    return dict(zip(routers, split, strict=True))


def _finite(values: torch.Tensor, digits: int = 4) -> list[float | int | None]:
    return [round(value, digits) if math.isfinite(value) else None for value in values.tolist()]
