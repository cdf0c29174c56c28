"""`mmpt savings`: how much compute sparse variants save, measured against a dense model.

Every variant and seed is an ordinary run in a folder of its own, so a command that was stopped goes
on where it was. All runs of one seed read the same rows in the same order; the dense ones read
twice as many, so that a saving of up to twice is found without extrapolation. What is compared are
held-out losses, under the router that inference uses; see `savings_curves` for how.
"""

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmpt.config import UserError, write_atomic
from mmpt.data.loader import Loader
from mmpt.doctor import doctor
from mmpt.eval.runs import read_run
from mmpt.eval.savings_curves import Comparison, LossCurve, read_curve, shares_of
from mmpt.eval.savings_jobs import Job, plan_jobs
from mmpt.eval.savings_page import render_savings
from mmpt.eval.savings_variants import DENSE, VARIANTS, parse_variants
from mmpt.progress import Bar
from mmpt.train.recipe import TrainRecipe, load_run_recipe
from mmpt.vocab import Vocabulary

MOST_READ = 2.0  # times that a source may be read
LOOK_AHEAD = 20_000  # batches that are read to know how often sources will be

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SavingsRecipe(TrainRecipe):
    """A recipe of pretraining, whose steps are those of a variant, and more variants."""

    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name -> key=value, ...


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
    check_reuse(jobs[0].stages[0].recipe, vocabulary)
    command = shlex.join(["mmpt", "savings", str(recipe), *overrides, "--out", str(out)])
    command += f" --variants {','.join(names)} --seeds {seeds}"
    command += f" --variant {shlex.join(variant)}" if variant else ""
    found: dict[str, Any] = {}
    epochs: dict[str, float] = {}
    for number, job in enumerate(jobs):
        log.info("run %d of %d: %s", number + 1, len(jobs), job.folder)
        result = job.run(vocabulary)
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


def check_reuse(recipe: TrainRecipe, vocabulary: Vocabulary) -> None:
    """UserError where a run of this recipe would read a source more than twice.

    Its rows are packed without a model; of a long run the first ones, from which the rest follows.
    """
    total = recipe.steps * recipe.accumulate
    config = replace(recipe.data, workers=0)
    loader = Loader(config, vocabulary, seed=recipe.seed, total_rows=total * config.rows)
    read = min(total, LOOK_AHEAD)
    middle = loader.epochs()
    for number in Bar(range(read), desc="how often sources are read", unit="batch"):
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
    """The held-out losses of jobs that are done, by variant. The first one is a dense one."""
    runs = [[read_run(stage.folder) for stage in job.stages] for job in jobs]
    shares = shares_of(runs[0][0])
    curves: dict[str, list[LossCurve]] = {}
    for job, stages in zip(jobs, runs, strict=True):
        curves.setdefault(job.variant, []).append(read_curve(stages, shares, job.gap()))
    return Comparison(curves)
