"""What a codec's training must remember to go on: one safetensors file, whole or absent."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mmpt.config import UserError, write_atomic
from mmpt.muon import Muon
from mmpt.tokenizers.health import BadSteps, CodebookHealth
from mmpt.tokenizers.objectives import Objective
from mmpt.tokenizers.recipe import CodecRecipe, recipe_hash


class State:
    """The module, its average, the adversary, the optimisers, and counts."""

    def __init__(self, recipe: CodecRecipe, objective: Objective) -> None:
        self.objective = objective
        self.module = objective.trained().train()
        self.average = copy.deepcopy(self.module).requires_grad_(False)
        self.optimizer = _optimizer(recipe, self.module)
        self.health = CodebookHealth(objective.codec, recipe.health, first_step=recipe.warmup)
        self.health.to(objective.codec.device)
        self.bad_steps = BadSteps(recipe.health)
        self._recipe = recipe_hash(recipe)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the average towards the module; buffers are copied."""
        for mean, now in zip(self.average.parameters(), self.module.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
        for mean, now in zip(self.average.buffers(), self.module.buffers(), strict=True):
            mean.copy_(now)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The codec with the averaged weights, to use and not to train, while the block runs."""
        now = {key: value.clone() for key, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.average.state_dict())
        self.module.eval()
        try:
            yield
        finally:
            self.module.load_state_dict(now)
            self.module.train()

    def save(self, path: Path, step: int, seconds: float) -> None:
        """Write a checkpoint after `step` steps, atomically."""
        tensors = {
            f"{name}.{key}": value.contiguous()
            for name, module in self._modules().items()
            for key, value in module.state_dict().items()
        }
        for name, optimizer in self._optimizers().items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        meta = {
            "step": str(step),
            "seconds": str(seconds),
            "infeasible": str(self.objective.infeasible),
            "recipe": self._recipe,
        }
        write_atomic(path, safetensors.torch.save(tensors, metadata=meta))

    def load(self, path: Path) -> tuple[int, float]:
        """Read what `save` wrote: steps done and the seconds that they took."""
        another = UserError(f"{path} belongs to another recipe; remove it to start anew")
        meta, tensors = _read(path)
        if meta.get("recipe") != self._recipe:
            raise another
        try:
            for name, module in self._modules().items():
                module.load_state_dict(_below(f"{name}.", tensors))
        except RuntimeError:
            raise another from None
        for name, optimizer in self._optimizers().items():
            saved = optimizer.state_dict()
            for key, value in _below(f"{name}.", tensors).items():
                index, field = key.split(".", 1)
                saved["state"].setdefault(int(index), {})[field] = value
            optimizer.load_state_dict(saved)
        self.objective.infeasible = int(meta["infeasible"])
        return int(meta["step"]), float(meta["seconds"])

    def _modules(self) -> dict[str, nn.Module]:
        modules = {"module": self.module, "average": self.average}
        modules |= {"health": self.health, "bad_steps": self.bad_steps}
        adversary = self.objective.adversary
        return modules if adversary is None else modules | {"adversary": adversary}

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        optimizers: dict[str, torch.optim.Optimizer] = {"optimizer": self.optimizer}
        if self.objective.adversary is not None:
            optimizers["adversary_optimizer"] = self.objective.adversary.optimizer
        return optimizers


def _optimizer(recipe: CodecRecipe, module: nn.Module) -> torch.optim.Optimizer:
    lr, decay, parameters = recipe.lr, recipe.weight_decay, module.parameters()
    if recipe.optimizer == "muon":
        return Muon(parameters, lr=lr, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=decay)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
            return file.metadata() or {}, tensors
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it to start anew") from None


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
