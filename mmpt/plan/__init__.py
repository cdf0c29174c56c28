"""What a run will need and what its numbers should be, before it is begun: `mmpt plan`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpt.config import UserError, load_recipe

if TYPE_CHECKING:
    from mmpt.train.recipe import TrainRecipe
    from mmpt.vocab import Modality


def plan(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    gpus: int = 0,
    device: str = "h100",
    node: int = 0,
    mix: Sequence[str] = (),
    measure: bool = False,
    suggest: bool = False,
    mup_check: bool = False,
) -> dict[str, Any]:
    """Look at a training recipe before it is run; reads no data, and needs none of its GPUs.

    Without flags: parameters and operations. --gpus: what every layout of so many would hold, send
    and take a step, by the model of mmpt/plan/timing.py, and the fastest that fits; --device is
    a100, h100, h200, b200, or cpu (which measures this machine), --node the GPUs of a node, --mix
    the shares of tokens (text=3 image=1; equal ones unless given). --measure: the same predicted
    for 1, 2 and 4 processes of this machine, beside what their steps took and sent.

    --suggest: the learning rate and the batch that Step Law gives for the recipe's size and tokens,
    beside what it has. --mup-check: whether rates hold at other widths: models of its shape at four
    small widths take ten steps, and what their layers put out must not grow with the width; the
    exit status is 1 where it does, as it must without optim.mup_base_width.
    """
    if suggest or mup_check:
        return _hyperparameters(recipe, overrides, suggest=suggest, mup_check=mup_check)
    from mmpt.plan.report import of_layouts, of_model
    from mmpt.plan.workload import Workload

    if gpus < 0 or node < 0:
        raise UserError(f"--gpus {gpus} --node {node}: use at least 1")
    resolved = _sized(recipe, overrides)
    if measure:
        from mmpt.plan.measure import compare

        return compare(resolved)
    work = Workload.of(resolved, _mix(mix))
    if not gpus:
        return of_model(work)
    from dataclasses import replace

    from mmpt.plan.layouts import survey
    from mmpt.plan.machines import find_machine

    if device == "cpu":
        from mmpt.plan.calibrate import this_machine

        machine = this_machine(work)
    else:
        machine = find_machine(device)
    machine = replace(machine, node=node or machine.node)
    return of_layouts(work, survey(work, gpus, machine), gpus, machine)


def _hyperparameters(
    recipe: Path, overrides: Sequence[str], *, suggest: bool, mup_check: bool
) -> dict[str, Any]:
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


def _sized(path: Path, overrides: Sequence[str]) -> "TrainRecipe":
    """The recipe; its vocabulary is that of the file that it names, unless its size is given."""
    from mmpt.train.recipe import TrainRecipe, load_run_recipe

    if any(each.split("=")[0].strip() == "model.vocab_size" for each in overrides):
        return load_recipe(TrainRecipe, path, overrides)
    try:
        return load_run_recipe(TrainRecipe, path, overrides)[0]
    except UserError as error:
        raise UserError(f"{error}; or give its size: model.vocab_size=65536") from None


def _mix(shares: Sequence[str]) -> "Mapping[Modality, float] | None":
    from mmpt.vocab import Modality

    if not shares:
        return None
    given = {}
    for each in shares:
        name, _, value = each.partition("=")
        try:
            given[Modality[name.upper()]] = float(value)
        except (KeyError, ValueError):
            known = ", ".join(modality.name.lower() for modality in Modality)
            raise UserError(f"--mix {each}: use MODALITY=SHARE, of {known}") from None
    total = sum(given.values())
    if total <= 0 or min(given.values()) < 0:
        raise UserError(f"--mix {' '.join(shares)}: use shares of at least 0, not all 0")
    return {modality: given.get(modality, 0.0) / total for modality in Modality}
