"""What a run will need and what its numbers should be, before it is begun: `mmpt plan`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpt.config import UserError, load_recipe


def plan(
    recipe: Path, overrides: Sequence[str] = (), *, suggest: bool = False, mup_check: bool = False
) -> dict[str, Any]:
    """Look at a training recipe before it is run; reads no data.

    --suggest: the learning rate and the batch that Step Law gives for the recipe's size and tokens,
    beside what it has. --mup-check: whether rates hold at other widths: models of its shape at four
    small widths take ten steps, and what their layers put out must not grow with the width; the
    exit status is 1 where it does, as it must without optim.mup_base_width.
    """
    if not (suggest or mup_check):
        raise UserError("nothing to plan; give --suggest or --mup-check")
    from mmpt.train.recipe import TrainRecipe  # which loads torch

    # neither counts the vocabulary, so that none has to be there yet
    resolved = load_recipe(TrainRecipe, recipe, ["model.vocab_size=1", *overrides])
    result: dict[str, Any] = {}
    if suggest:
        from mmpt.plan.steplaw import suggestion

        result |= suggestion(resolved)
    if mup_check:
        from mmpt.plan.mup import check_coordinates

        result["mup"] = check_coordinates(resolved.model, resolved.optim, seed=resolved.seed)
        result["exit_status"] = 0 if result["mup"]["passed"] else 1
    return result
