"""What one step of a recipe is: its weights, and the operations and bytes of each id.

Weights and operations are asked of the model, built on the meta device, where it takes no memory.
Layers are alike, so one of them stands for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmpt.model.config import GroupConfig, ModelConfig
from mmpt.model.dispatch import group_table
from mmpt.model.transformer import Decoder
from mmpt.train.optim import is_matrix
from mmpt.train.recipe import TrainRecipe
from mmpt.vocab import Modality

ROOT = ""  # the unit of what is in no layer
# sides that `tensor` divides, by the end of a weight's name; see Ranks.spread
TENSOR_SIDES = {"project_in": 0, "project_out": 1, "gate_up": 3, "bank.down": 1, "shared.down": 1}
TENSOR_SIDES |= {"noisy_in.up": 0, "noisy_out.down": 1}


@dataclass(frozen=True)
class Weight:
    """A parameter: of the root, or of one layer that stands for `num` equal ones."""

    name: str  # without the layer's number
    shape: tuple[int, ...]
    num: int  # layers that have it; 1 of the root
    uses: int  # layers that compute with one of these; more than `num` where layers lend experts
    group: str | None  # of experts, where it is a bank's
    trained: bool  # auxiliary routers are not, until their own training
    orthogonal: bool  # Muon would make it so
    tensor_side: int | None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Workload:
    """A recipe's model and step, whoever computes it.

    mix: the share of ids of each modality. length: ids of a row. products: bytes of a number in
    matrix products, 2 or 4.
    """

    model: ModelConfig
    recipe: TrainRecipe
    weights: tuple[Weight, ...]
    flops: Mapping[Modality, int]  # forward, an id
    mix: Mapping[Modality, float]

    @classmethod
    def of(cls, recipe: TrainRecipe, mix: Mapping[Modality, float] | None = None) -> "Workload":
        """Of a recipe; without a mix, equal parts of the modalities."""
        model = on_meta(recipe.model)
        equal = dict.fromkeys(Modality, 1 / len(Modality))
        # a masked product computes every pair of a row, also those that it leaves out
        flops = {m: model.flops_per_token(m, context=recipe.data.length) for m in Modality}
        return cls(recipe.model, recipe, _weights(model), flops, mix or equal)

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel * weight.num for weight in self.weights)

    @property
    def num_auxiliary(self) -> int:
        """Those of the parameters that are in auxiliary routers, which no pretraining uses."""
        return sum(w.numel * w.num for w in self.weights if ".auxiliary." in w.name)

    @property
    def products(self) -> int:
        return 4 if self.recipe.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Ids of a step over all ranks, pads among them."""
        return self.recipe.accumulate * self.recipe.data.rows * self.recipe.data.length

    @property
    def head_flops(self) -> int:
        """Forward, an id; ranks that share tensors all do it."""
        return 2 * self.model.width * self.model.vocab_size

    @property
    def mean_flops(self) -> float:
        """Forward, an id of the mix."""
        return sum(self.flops[modality] * share for modality, share in self.mix.items())

    def share_of(self, group: GroupConfig) -> float:
        """Of ids that a group serves."""
        return sum(self.mix[Modality[name.upper()]] for name in group.modalities)

    def summary(self) -> dict[str, Any]:
        """What the model is, to print."""
        model = on_meta(self.model)
        active = {m.name.lower(): model.num_active_parameters(m) for m in Modality}
        return {
            "parameters": self.num_parameters,
            "active parameters": active,
            "active share": {m: round(n / self.num_parameters, 4) for m, n in active.items()},
            "auxiliary parameters": self.num_auxiliary,
            "activation rates": {n: round(r, 4) for n, r in self.model.activation_rates.items()},
            "flops per token, forward": {m.name.lower(): n for m, n in self.flops.items()},
            "flops per token, training": {m.name.lower(): 3 * n for m, n in self.flops.items()},
            "mix": {m.name.lower(): round(share, 4) for m, share in self.mix.items()},
            "tokens per step": self.tokens,
            "flops per step": 3 * self.mean_flops * self.tokens,
        }


def on_meta(config: ModelConfig) -> Decoder:
    """A model without memory, that can be asked for its sizes."""
    with torch.device("meta"):
        model = Decoder(config)
    model.groups = group_table(config)
    return model


def _weights(model: Decoder) -> tuple[Weight, ...]:
    weights = []
    for name, parameter in model.named_parameters():
        layer, within, short = name.startswith("layers."), name, name
        if layer:
            _, number, short = name.split(".", 2)
            within = f"layer.{short}"
            if number != "0":
                continue
        bank = ".bank." in short
        layers = model.config.num_layers if layer else 1
        num = -(-layers // (model.config.expert_share_every if bank else 1))
        sides = (side for end, side in TENSOR_SIDES.items() if short.endswith(end))
        weights.append(
            Weight(
                name=within,
                shape=tuple(parameter.shape),
                num=num,
                uses=layers,
                group=short.split(".")[2] if bank else None,
                trained=parameter.requires_grad,
                orthogonal=is_matrix(name, parameter),
                tensor_side=next(sides, None),
            )
        )
    return tuple(weights)
