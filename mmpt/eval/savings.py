"""`mmpt savings`: how much compute sparse variants save, measured against a dense model.

Every variant and seed is an ordinary run in a folder of its own, so a command that was stopped goes
on where it was. All runs of one seed read the same rows in the same order; the dense ones read
twice as many, so that a saving of up to twice is found without extrapolation. What is compared are
held-out losses, under the router that inference uses; see `savings_curves` for how.
"""

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmpt.config import UserError, write_atomic
from mmpt.data.loader import Loader
from mmpt.doctor import doctor
from mmpt.eval.runs import read_run
from mmpt.eval.savings_curves import Comparison, LossCurve, read_curve, shares_of
from mmpt.eval.savings_page import render_savings
from mmpt.eval.savings_variants import DENSE, VARIANTS, parse_variants, variant_model
from mmpt.train.pretrain import train
from mmpt.train.recipe import TrainRecipe, load_run_recipe
from mmpt.vocab import Vocabulary

LONGER = 2  # steps of a dense run over those of a variant
MOST_READ = 2.0  # times that a source may be read
LOOK_AHEAD = 20_000  # batches that are read to know how often sources will be

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SavingsRecipe(TrainRecipe):
    """A recipe of pretraining, whose steps are those of a variant, and more variants."""

    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name -> key=value, ...


@dataclass(frozen=True)
class Job:
    """A run that is to be done."""

    variant: str
    seed: int
    recipe: TrainRecipe
    folder: Path


def savings_command(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    out: Path,
    variants: str = ",".join(VARIANTS),
    variant: Sequence[str] = (),
    seeds: int = 3,
) -> dict[str, Any]:
    """Train variants of the model of RECIPE and say how much compute they save: eta, which is what
    a dense model needs to reach a variant's held-out loss, over what the variant needed.

    OUT gets a run folder for each variant and seed, savings.html and savings.json; the same command
    goes on where it was stopped. --variants: names, with commas between them; dense is always
    trained, for twice the steps. --variant: more of them, NAME:key=value,... of the model, such as
    wide:like=4t2v2s,expert_hidden=512. --seeds: how many, from the recipe's seed on.

    The learning rate must be constant after its warm-up, and no source be read more than twice.
    """
    resolved, vocabulary = load_run_recipe(SavingsRecipe, recipe, overrides)
    added = parse_variants(variant)
    names = dict.fromkeys([DENSE, *filter(None, variants.split(",")), *added])
    jobs = plan_jobs(resolved, list(names), resolved.variants | added, out, seeds)
    _check_packages()
    check_reuse(jobs[0].recipe, vocabulary)
    command = shlex.join(["mmpt", "savings", str(recipe), *overrides, "--out", str(out)])
    command += f" --variants {','.join(names)} --seeds {seeds}"
    command += f" --variant {shlex.join(variant)}" if variant else ""
    found: dict[str, Any] = {}
    epochs: dict[str, float] = {}
    for number, job in enumerate(jobs):
        log.info("run %d of %d: %s", number + 1, len(jobs), job.folder)
        result = train(job.recipe, job.folder, vocabulary=vocabulary)
        if not result.finished:
            return found | {"finished": False, "exit_status": result.status}
        epochs |= {n: max(e, epochs.get(n, 0.0)) for n, e in result.data["epochs"].items()}
        compared = compare(jobs[: number + 1])
        about = {
            "times that a source was read": {n: round(e, 3) for n, e in epochs.items()},
            "environment": doctor(),
        }
        found = compared.to_json() | about | {"command": command}
        found["finished"] = number + 1 == len(jobs)
        write_atomic(out / "savings.html", render_savings(compared, about, command))
        write_atomic(out / "savings.json", json.dumps(found, indent=1))
    return found | {"page": str(out / "savings.html")}


def plan_jobs(
    recipe: SavingsRecipe,
    names: Sequence[str],
    more: Mapping[str, tuple[str, ...]],
    out: Path,
    seeds: int,
) -> list[Job]:
    """The runs, seed by seed, the dense one first. more: variants that are not known here.

    UserError for a recipe whose runs could not be compared.
    """
    if recipe.optim.schedule != "constant":
        raise UserError(
            f"optim.schedule = {recipe.optim.schedule!r}: the losses of runs of different lengths "
            "are compared while the rate is the same; use optim.schedule=constant"
        )
    if any(stage.unit == "run" for stage in recipe.data.schedule):
        raise UserError(
            'data.schedule: parts of a run are later in one of twice the length; use unit = "rows"'
        )
    if not recipe.evaluate.every:
        raise UserError("evaluate.every is missing; use some 20 steps, with evaluate.growth = 0.1")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: use at least 1, and 3 for intervals")
    base = TrainRecipe(**{each.name: getattr(recipe, each.name) for each in fields(TrainRecipe)})
    models = {name: variant_model(name, recipe.model, more) for name in names}
    return [
        Job(
            name,
            seed,
            replace(
                base,
                model=model,
                seed=seed,
                steps=base.steps * (LONGER if name == DENSE else 1),
            ),
            out / f"{name}-{seed}",
        )
        for seed in range(recipe.seed, recipe.seed + seeds)
        for name, model in models.items()
    ]


def check_reuse(recipe: TrainRecipe, vocabulary: Vocabulary) -> None:
    """UserError where a run of this recipe would read a source more than twice.

    Its rows are packed without a model; of a long run the first ones, from which the rest follows.
    """
    total = recipe.steps * recipe.accumulate
    config = replace(recipe.data, workers=0)
    loader = Loader(config, vocabulary, seed=recipe.seed, total_rows=total * config.rows)
    read = min(total, LOOK_AHEAD)
    middle = loader.epochs()
    for number in tqdm(range(read), desc="how often sources are read", unit="batch"):
        if number == read // 2:  # from here on nothing more waits to be packed
            middle = loader.epochs()
        if next(loader, None) is None:
            raise UserError(f"the sources end after {number} of {total} batches; give more data")
    rest = (total - read) / (read - read // 2)
    epochs = {n: e + rest * (e - middle.get(n, 0.0)) for n, e in loader.epochs().items()}
    name = max(epochs, key=lambda name: epochs[name], default="")
    if name and epochs[name] > MOST_READ:
        weight = recipe.data.sources[name].weight
        raise UserError(
            f"source {name!r} would be read {epochs[name]:.2f} times in the {recipe.steps} steps "
            f"of a dense run, {MOST_READ:g} is the most; encode more documents for it, or use "
            f"fewer steps or a lower data.sources.{name}.weight (now {weight:g})"
        )


def _check_packages() -> None:
    try:
        import scipy  # noqa: F401 # needed once all runs are done
    except ImportError:
        raise UserError("mmpt savings needs scipy: pip install 'mmpt[eval]'") from None


def compare(jobs: Sequence[Job]) -> Comparison:
    """The held-out losses of runs that are done, by variant. The first job is a dense one."""
    runs = [read_run(job.folder) for job in jobs]
    shares = shares_of(runs[0])
    curves: dict[str, list[LossCurve]] = {}
    for job, run in zip(jobs, runs, strict=True):
        curves.setdefault(job.variant, []).append(read_curve(run, shares))
    return Comparison(curves)
