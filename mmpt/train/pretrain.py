"""Pretraining: a fresh model, or one that starts from others' weights, predicts next ids.

Afterwards, with `objective = "routers"`, its auxiliary routers learn which ids expert choice took.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmpt.config import UserError
from mmpt.model.codes import initialise_codes
from mmpt.model.config import ModelConfig
from mmpt.model.transformer import Decoder
from mmpt.tokenizers import load as load_codec
from mmpt.train.causal import CausalRouters
from mmpt.train.checkpoint import begun_with, checkpoints_of, find_model
from mmpt.train.loop import Trainer
from mmpt.train.loss import NextToken
from mmpt.train.metrics import Metrics
from mmpt.train.optim import initialise_mup
from mmpt.train.recipe import TrainRecipe, load_run_recipe
from mmpt.train.result import TrainResult
from mmpt.vocab import Vocabulary

USEFUL_RATES = 0.15, 0.48  # of activation, at 2 billion weights; the best was 0.2

log = logging.getLogger(__name__)


def train_command(recipe: Path, overrides: Sequence[str] = (), *, out: Path) -> dict[str, Any]:
    """Pretrain a model from a recipe; the same command goes on where an interrupted run stopped.

    Overrides are key=value, such as steps=500 or optim.lr=1e-3. The folder gets metrics.jsonl, the
    resolved recipe and checkpoints, each of which is a model folder.
    """
    resolved, vocabulary = load_run_recipe(TrainRecipe, recipe, overrides)
    return train(resolved, out, vocabulary=vocabulary).to_json()


def train(
    recipe: TrainRecipe,
    run: str | Path,
    *,
    vocabulary: Vocabulary,
    progress: bool = True,
    on_step: Callable[[Metrics], None] | None = None,
) -> TrainResult:
    """Pretrain a fresh model, or go on with the run in the folder `run`."""
    trainer = pretrainer(recipe, run, vocabulary=vocabulary)
    return trainer.run(progress=progress, on_step=on_step)


def pretrainer(recipe: TrainRecipe, run: str | Path, *, vocabulary: Vocabulary) -> Trainer:
    """What `train` runs."""
    vocabulary = begun_with(checkpoints_of(run), vocabulary)
    vocabulary.check(recipe.model.vocabulary, what="the recipe's model")
    codecs = [load_codec(name) for name in recipe.codes_from]
    for codec in codecs:
        if vocabulary.fingerprint_of(codec.modality) != codec.fingerprint:
            raise UserError(
                f"codes_from: the vocabulary has no ids of {codec.name} {codec.fingerprint}; "
                "name the tokenizers that encoded the data"
            )

    routers = recipe.objective == "routers"
    if routers and not recipe.start:
        raise UserError("objective = routers trains those of a trained model; name it by start")
    if unlikely := unusual_rates(recipe.model):
        log.warning(unlikely)
    start = find_model(recipe.start) if recipe.start else None
    if start is not None and recipe.codes_from:
        raise UserError("start and codes_from both say what the first weights are; leave one out")

    def build() -> Decoder:
        model = Decoder(recipe.model)
        if routers:
            model.freeze_for_routers()
        return model

    def initialise(model: Decoder) -> None:
        model.initialise(recipe.seed)
        initialise_mup(model, recipe.optim)
        if start is not None:
            model.fill(start)
        generator = torch.Generator().manual_seed(recipe.seed)
        for codec in codecs:
            ranges, latents = vocabulary.ranges_of(codec.modality), codec.code_latents()
            books = latents if len(ranges) > 1 else [latents]
            for code_range, book in zip(ranges, books, strict=True):
                initialise_codes(model, code_range, book, generator)

    return Trainer(
        recipe,
        run,
        build=build,
        initialise=initialise,
        start=start,
        vocabulary=vocabulary,
        new_rows_first=recipe.new_rows_first,
        objective=CausalRouters()
        if routers
        else NextToken(recipe.loss_weights, z_loss=recipe.z_loss, noise=recipe.noise),
    )


def unusual_rates(model: ModelConfig) -> str | None:
    """Says where an id meets so small or large a share of the experts that it rarely pays."""
    if sum(group.num_experts for group in model.groups.values() if not group.noisy) == 1:
        return None  # dense, on purpose
    low, high = USEFUL_RATES
    rates = [f"{n} {r:.0%}" for n, r in model.activation_rates.items() if not low <= r <= high]
    if not rates:
        return None
    return (
        f"the share of a layer's weights that an id meets is {', '.join(rates)}; {low:.0%} to "
        f"{high:.0%} paid in arXiv 2506.12119: change num_experts, num_active or expert_hidden"
    ).replace("%", " %")
