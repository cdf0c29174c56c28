"""Step Law (arXiv 2503.04715): the learning rate and batch size of N weights and D tokens.

Fitted on 3,700 runs of AdamW at widths of language models; Muon's steps are as long as AdamW's, so
its rates are alike. Far smaller runs extrapolate: take it for a place to begin.
"""

from typing import Any

from mmpt.model.transformer import Decoder
from mmpt.train.recipe import TrainRecipe
from mmpt.vocab import Modality


def best_rate(parameters: int, tokens: int) -> float:
    """The highest learning rate of a run, of N weights outside of embedding and head."""
    return 1.79 * parameters**-0.713 * tokens**0.307


def best_batch(tokens: int) -> float:
    """Tokens a step; it does not depend on the model's size."""
    return 0.58 * tokens**0.571


def suggestion(recipe: TrainRecipe) -> dict[str, Any]:
    """What Step Law gives for the recipe's tokens, and what the recipe has.

    N counts what one id multiplies with, of the modality where that is most, without embedding and
    head: of experts, the active ones.
    """
    config, model = recipe.model, Decoder(recipe.model)
    active = max(model.num_active_parameters(modality) for modality in Modality)
    parameters = active - config.width * config.vocab_size
    batch = recipe.accumulate * recipe.data.rows * recipe.data.length
    tokens = recipe.steps * batch
    suggested = best_batch(tokens)
    return {
        "active parameters without embedding and head": parameters,
        "tokens": tokens,
        "step law": {
            "lr": float(f"{best_rate(parameters, tokens):.2g}"),
            "batch_tokens": round(suggested),
            "steps": round(tokens / suggested),
        },
        "recipe": {"lr": recipe.optim.lr, "batch_tokens": batch, "steps": recipe.steps},
    }
