"""Random numbers that are functions of integers, computed where the integers are.

What is drawn so does not depend on how a batch is divided, and comes out alike when a forward pass
is repeated.
"""

import torch

_BITS = 24  # of a number, as many as float32 keeps


def mix(keys: torch.Tensor) -> torch.Tensor:
    """int64 -> int64 whose bits look random (the finaliser of SplitMix64)."""
    keys = (keys ^ _shift(keys, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    keys = (keys ^ _shift(keys, 27)) * (0x94D049BB133111EB - (1 << 64))
    return keys ^ _shift(keys, 31)


def logistic(keys: torch.Tensor) -> torch.Tensor:
    """float32: a draw for each key, distributed as the difference of two Gumbel draws."""
    uniform = (_shift(mix(keys), 64 - _BITS).float() + 0.5) / (1 << _BITS)
    return torch.logit(uniform.clamp(max=1 - 2.0**-_BITS))


def hash_ids(ids: torch.Tensor, num_experts: int, num_active: int) -> torch.Tensor:
    """int64 (N,) -> (N, num_active): for each id always the same experts, all different."""
    first = _shift(mix(ids + 1), 1) % num_experts
    return (first[:, None] + torch.arange(num_active, device=ids.device)) % num_experts


def _shift(keys: torch.Tensor, by: int) -> torch.Tensor:
    # to the right, with zeros: the operator copies the sign
    return (keys >> by) & ((1 << (64 - by)) - 1)
