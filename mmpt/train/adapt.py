"""Adaptation to parallel decoding (DiDA): a trained model learns to denoise whole media blocks.

The model grows experts for noisy ids as copies of its own, and only what noisy ids alone use is
trained, so its autoregressive pass stays bit-equal. The loop is that of pretraining, with another
objective.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmpt.config import UserError
from mmpt.decode.dida import JointRows, corrupt, denoising_loss, joint_forward
from mmpt.model.transformer import Decoder
from mmpt.model.weights import files_of
from mmpt.stream import Rows
from mmpt.train.checkpoint import begun_with, latest
from mmpt.train.loop import Trainer, TrainResult, checkpoints_of
from mmpt.train.loss import Losses, modality_weights
from mmpt.train.metrics import Metrics
from mmpt.train.recipe import AdaptRecipe, load_run_recipe
from mmpt.vocab import Modality, Vocabulary


def adapt_command(recipe: Path, overrides: Sequence[str] = (), *, out: Path) -> dict[str, Any]:
    """Adapt a trained model to parallel decoding; the same command goes on after an interruption.

    The recipe's `start` names a model folder or a training run. Overrides are key=value.
    """
    resolved, vocabulary = load_run_recipe(AdaptRecipe, recipe, overrides)
    return adapt(resolved, out, vocabulary=vocabulary).to_json()


def adapt(
    recipe: AdaptRecipe,
    run: str | Path,
    *,
    vocabulary: Vocabulary,
    progress: bool = True,
    on_step: Callable[[Metrics], None] | None = None,
) -> TrainResult:
    """Adapt the model at `recipe.start`, or go on with the run in the folder `run`."""
    trainer = adapter(recipe, run, vocabulary=vocabulary)
    return trainer.run(progress=progress, on_step=on_step)


def adapter(recipe: AdaptRecipe, run: str | Path, *, vocabulary: Vocabulary) -> Trainer:
    """What `adapt` runs."""
    vocabulary = begun_with(checkpoints_of(run), vocabulary)
    start = find_model(recipe.start)

    def build() -> Decoder:
        model = Decoder.load(start, vocabulary=vocabulary)
        model.add_noisy_groups(seed=recipe.seed)
        model.freeze_for_adaptation()
        return model

    objective = Denoise(vocabulary, recipe.loss_weights, max_noisy=recipe.max_noisy)
    return Trainer(
        recipe, run, build=build, vocabulary=vocabulary, objective=objective, start=start
    )


def find_model(folder: str | Path) -> Path:
    """A model folder, or the newest checkpoint of a run folder."""
    folder = Path(folder)
    if files_of(folder):
        return folder
    newest = latest(checkpoints_of(folder))
    if newest is None:
        raise UserError(f"no model at {folder}; give a model folder or the --out of mmpt train")
    return newest


@dataclass
class NoisyBatch:
    """The joint layout of clean ids and noisy blocks, and the weight of each position."""

    joint: JointRows
    weight: torch.Tensor

    def to(self, device: torch.device | str) -> "NoisyBatch":
        """The same batch on another device."""
        return NoisyBatch(self.joint.to(device), self.weight.to(device))


class Denoise:
    """The objective of adaptation: the clean codes of noisy blocks."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        weights: Mapping[str, float] | None = None,
        *,
        max_noisy: int,
    ) -> None:
        self.vocabulary, self.max_noisy = vocabulary, max_noisy
        self.weights = modality_weights(weights or {})

    def prepare(self, rows: Rows, generator: torch.Generator) -> NoisyBatch:
        """Choose and corrupt blocks."""
        joint = corrupt(rows, self.vocabulary, generator=generator, max_noisy=self.max_noisy)
        scored = joint.labels >= 0
        weight = joint.loss_weight * self.weights[joint.modality]
        return NoisyBatch(joint, torch.where(scored, weight, 0.0))

    def losses(self, model: Decoder, batch: NoisyBatch) -> Losses:
        """One joint pass, scored on the noisy positions."""
        hidden = joint_forward(model, batch.joint)
        by_modality = denoising_loss(model, self.vocabulary, batch.joint, hidden)
        total = hidden.new_zeros((), dtype=torch.float32)
        nats, counts = torch.zeros(2, len(Modality), dtype=torch.float64, device=hidden.device)
        for modality, loss in by_modality.items():
            total = total + self.weights[modality].to(hidden.device) * loss.nats
            nats[modality], counts[modality] = loss.nats.detach(), loss.weight
        return Losses(total, nats, counts)
