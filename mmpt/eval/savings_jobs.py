"""The runs behind `mmpt savings`: what is trained for each variant and seed, one after another.

Where inference cannot route as training did, as with expert choice, the causality gap is measured:
held-out loss under the router of inference less that under the router of training, on equal rows.
Auxiliary routers, which MoMa trains for inference on the frozen model, are a second run.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from mmpt.config import UserError, write_atomic
from mmpt.eval.savings_variants import DENSE, variant_model
from mmpt.stream import Rows, Stream
from mmpt.train.loop import Trainer
from mmpt.train.loss import NextToken
from mmpt.train.pretrain import pretrainer
from mmpt.train.recipe import TrainRecipe
from mmpt.train.result import TrainResult
from mmpt.vocab import Modality, Vocabulary

LONGER = 2  # steps of a dense run over those of a variant
ROUTERS = 0.1  # steps of auxiliary routers over those of the run; MoMa's took 0.06 to 0.08
GAP = "router_gap.json"


@dataclass(frozen=True)
class Stage:
    """A run of training."""

    recipe: TrainRecipe
    folder: Path


@dataclass(frozen=True)
class Job:
    """What is trained for a variant and a seed: a run, and one of its auxiliary routers if any."""

    variant: str
    stages: tuple[Stage, ...]

    @property
    def folder(self) -> Path:
        """Of the first run."""
        return self.stages[0].folder

    def run(self, vocabulary: Vocabulary) -> TrainResult:
        """Train what is not done yet; returns how the last run ended that was begun."""
        result, trainer = self._train(self.stages[0], vocabulary)
        for stage in self.stages[1:]:
            if result.finished:
                result, trainer = self._train(stage, vocabulary)
        groups = self.stages[0].recipe.model.groups.values()
        differ = any(group.router == "expert_choice" for group in groups)
        if result.finished and differ and not (self.folder / GAP).is_file():
            write_atomic(self.folder / GAP, json.dumps(router_gap(trainer)))
        return result

    def gap(self) -> dict[str, float]:
        """Medium -> nats, of a job that is done; empty where routers are the same."""
        path = self.folder / GAP
        return json.loads(path.read_text()) if path.is_file() else {}

    def _train(self, stage: Stage, vocabulary: Vocabulary) -> tuple[TrainResult, Trainer]:
        trainer = pretrainer(stage.recipe, stage.folder, vocabulary=vocabulary)
        return trainer.run(), trainer


def plan_jobs(
    recipe: TrainRecipe,
    names: Sequence[str],
    more: Mapping[str, tuple[str, ...]],
    out: Path,
    seeds: int,
) -> list[Job]:
    """What is to be trained, seed by seed, the dense one first. more: variants not known here.

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
    models = {name: variant_model(name, base.model, more) for name in names}
    return [
        Job(name, _stages(replace(base, model=model, seed=seed), out / f"{name}-{seed}", name))
        for seed in range(base.seed, base.seed + seeds)
        for name, model in models.items()
    ]


def _stages(recipe: TrainRecipe, folder: Path, variant: str) -> tuple[Stage, ...]:
    if variant == DENSE:
        recipe = replace(recipe, steps=LONGER * recipe.steps)
    if all(group.causal != "auxiliary" for group in recipe.model.groups.values()):
        return (Stage(recipe, folder),)
    blind = replace(recipe, evaluate=replace(recipe.evaluate, every=0))  # its routers know nothing
    routers = replace(
        recipe,
        steps=math.ceil(ROUTERS * recipe.steps),
        objective="routers",
        start=str(folder),
        codes_from=(),
    )
    return Stage(blind, folder), Stage(routers, folder.with_name(f"{folder.name}-routers"))


def router_gap(trainer: Trainer) -> dict[str, float]:
    """Medium -> held-out nats under the routers of inference, less those under training's.

    Held-out streams are packed into batches as large as those of training, because in training ids
    compete within a batch. No noise is drawn.
    """
    evaluation = trainer.watching.evaluation
    assert evaluation is not None, "runs that are compared are evaluated"
    streams = [stream for *_, stream in evaluation.streams()]
    pad, data = trainer.vocabulary.structure_id("<pad>"), trainer.recipe.data
    sums = torch.zeros(3, len(Modality), dtype=torch.float64)
    for rows in _pack(streams, data.length, data.rows, pad):
        for number, training in enumerate((False, True)):
            nats, counts = _nats(trainer, rows, training=training)
            sums[number] += nats
        sums[2] += counts
    inference, training, counts = sums
    means = (inference - training) / counts
    return {m.name.lower(): round(float(means[m]), 5) for m in Modality if counts[m]}


def _nats(trainer: Trainer, rows: Rows, *, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (4,) on the host: summed nats by medium, and ids."""
    objective, bf16 = NextToken(), trainer.recipe.precision == "bf16"
    trainer.model.train(training)  # with gradients, which routers take as a sign of training
    with torch.autocast(trainer.device.type, dtype=torch.bfloat16, enabled=bf16):
        losses = objective.losses(trainer.model, objective.prepare(rows, []).to(trainer.device))
    trainer.model.take_router_loss()
    return losses.nats.cpu(), losses.counts.cpu()


def _pack(streams: Sequence[Stream], length: int, rows: int, pad: int) -> list[Rows]:
    """Batches of rows, in an order that mixes sources."""
    length = max([length, *map(len, streams)])
    packed: list[list[Stream]] = [[]]
    for number in np.random.default_rng(0).permutation(len(streams)):
        if sum(map(len, packed[-1])) + len(streams[number]) > length:
            packed.append([])
        packed[-1].append(streams[number])
    return [Rows.pack(packed[n : n + rows], length, pad) for n in range(0, len(packed), rows)]
