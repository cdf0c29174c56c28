"""`mmpt upcycle`: a trained model with one expert per group goes on with many."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

from mmpt.config import UserError, load_recipe
from mmpt.model.transformer import Decoder
from mmpt.model.upcycle import expand, upcycle, upcycle_config
from mmpt.model.weights import fingerprint
from mmpt.train.checkpoint import Checkpoints, Moment, checkpoints_of, find_model, find_processor
from mmpt.train.recipe import TrainRecipe, keep_recipe
from mmpt.train.restore import load_checkpoint
from mmpt.train.result import Counters
from mmpt.vocab import Vocabulary


def upcycle_command(
    model: Path,
    overrides: Sequence[str] = (),
    *,
    experts: str,
    out: Path,
    active: int = 1,
    schedule: Literal["reset", "keep"] = "reset",
    seed: int = 0,
) -> dict[str, Any]:
    """Grow one expert per group into many, which compute the same until they are trained.

    MODEL is a model folder, and --out gets another; or it is a training run or a checkpoint of one,
    and --out gets a run that `mmpt train OUT/recipe.toml --out OUT` goes on with: the optimiser's
    moments are copied with the experts, and the data go on where they were. --experts: how many
    each group has then, such as text=4,visual=2; --active: how many of them an id takes. --schedule
    reset: the learning rate begins anew and the run takes the recipe's steps again; keep: it goes
    on at its step. OVERRIDES of the run's recipe are key=value, such as steps=2000. --seed is that
    of the new routers.
    """
    folder = find_model(model)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder")
    before = Decoder.load(folder)
    config = upcycle_config(before.config, _counts(experts), active=active)
    after = upcycle(before, config, seed=seed)
    if (folder / "state.json").is_file():
        made = _write_run(folder, overrides, before, after, out, reset=schedule == "reset")
    elif overrides:
        raise UserError(f"{folder} is no run, so it has no recipe that {overrides[0]} could change")
    else:
        made = _write_model(folder, after, out)
    return {
        "model": str(made),
        "from": str(folder),
        "fingerprint": fingerprint(made),
        "parameters": after.num_parameters,
        "parameters_before": before.num_parameters,
        "groups": {name: group.num_experts for name, group in config.groups.items()},
    }


def _counts(text: str) -> dict[str, int]:
    counts = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        if not number.isdecimal() or name in counts:
            raise UserError(f"--experts {text}; use each group once, such as text=4,visual=2")
        counts[name] = int(number)
    return counts


def _write_model(folder: Path, model: Decoder, out: Path) -> Path:
    model.save(out)
    if (folder / "vocabulary.json").is_file():
        shutil.copyfile(folder / "vocabulary.json", out / "vocabulary.json")
    if (settings := find_processor(folder)) is not None:
        settings.save(out)
    return out


def _write_run(
    folder: Path,
    overrides: Sequence[str],
    before: Decoder,
    after: Decoder,
    out: Path,
    *,
    reset: bool,
) -> Path:
    recipe = load_recipe(TrainRecipe, folder.parents[1] / "recipe.toml", overrides)
    if recipe.model != before.config:
        raise UserError("upcycling changes the number of experts alone; leave out model.*")
    state, more = load_checkpoint(folder, model=before, extra=("optimizer", "average"))
    known = {each.name for each in fields(Counters)}
    counters = Counters(**{n: value for n, value in state["counters"].items() if n in known})
    if reset:
        counters.step = 0
        recipe = replace(recipe, new_rows_first=0)
    # its first weights are those of the checkpoint
    recipe = replace(recipe, model=after.config, start="", codes_from=())
    keep_recipe(out, recipe, resumed=False)
    extra = {"optimizer": expand(more.get("optimizer", {}), after)}
    if "average" in more:
        fresh = dict(after.named_parameters())
        extra["average"] = fresh | expand(more["average"], after)
    moment = Moment(
        step=counters.step,
        state={"counters": asdict(counters)},
        loader=state["loader"],
        vocabulary=Vocabulary.load(folder / "vocabulary.json"),
        processor=find_processor(folder),
        extra=extra,
    )
    return Checkpoints(checkpoints_of(out)).save(after, None, moment)
