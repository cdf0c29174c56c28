"""One expert of a group into many, with the function kept (sparse upcycling, arXiv 2212.05055).

Experts that are copies of one compute what it computed wherever the gates of an id sum to one. Ours
are 2/C sigmoid(score) for C active experts, so they do at a score of zero, and unlike gates that
are made to sum to one they teach the router from the first step. A router of exact zeros would
send every id to the same experts, though, and one that is drawn at a usual scale would change the
function. So it is drawn at `SCATTER`: enough to spread ids over equal experts, and lost in the
rounding of float32 where it enters a gate. The bias of the balancing starts at zero.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from mmpt.config import UserError
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder

SCATTER = 1e-6  # the size of a score; a gate moves by a quarter of it
MOST = 4096  # experts of a group


def upcycle_config(
    config: ModelConfig, experts: Mapping[str, int], *, active: int = 1
) -> ModelConfig:
    """The model with so many experts per named group, `active` of them per id, all others as is."""
    groups = dict(config.groups)
    for name, count in experts.items():
        if name not in groups:
            raise UserError(f"no group {name!r}; this model has {', '.join(groups)}")
        group = groups[name]
        if group.num_experts != 1:
            raise UserError(
                f"group {name} has {group.num_experts} experts; only a group of one can be grown"
            )
        plain = group.router in ("hard", "hash", "token_choice") and group.gate == "sigmoid"
        if not plain or group.renormalise or group.num_identity:
            raise UserError(
                f"group {name} has router = {group.router}, gate = {group.gate}, renormalise = "
                f"{group.renormalise}, num_identity = {group.num_identity}; only sigmoid gates of "
                "token choice keep the function"
            )
        if not 2 <= count <= MOST:
            raise UserError(f"{name}={count}; use 2 to {MOST} experts")
        groups[name] = replace(group, num_experts=count, num_active=active, router="token_choice")
    return replace(config, groups=groups)


@torch.no_grad()
def upcycle(model: Decoder, config: ModelConfig, *, seed: int = 0) -> Decoder:
    """The model as `upcycle_config` has it; its new routers are a function of the seed."""
    grown = Decoder(config)
    fresh = {n: torch.zeros_like(t) for n, t in grown.state_dict().items()}
    tensors = fresh | expand(model.state_dict(), grown)
    generator = torch.Generator().manual_seed(seed)
    for name, router in tensors.items():
        if (
            name.endswith(".router")
            and config.groups[_group(name)] != model.config.groups[_group(name)]
        ):
            noise = torch.randn(router.shape, generator=generator)
            tensors[name] = router + SCATTER * config.width**-0.5 * noise.to(router)
    dtype = model.embedding.dtype
    grown.load_state_dict({n: t.to(dtype) for n, t in tensors.items()}, assign=True)
    return grown.train(model.training)


def expand(tensors: Mapping[str, torch.Tensor], model: Decoder) -> dict[str, torch.Tensor]:
    """Tensors `weight` or `weight:state` of a model before, copied for each expert that it has now.

    Scalars stay as they are.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {
        name: tensor.expand(shapes[name.partition(":")[0]]).clone() if tensor.ndim else tensor
        for name, tensor in tensors.items()
    }


def _group(name: str) -> str:
    return name.split(".groups.")[1].split(".")[0]
