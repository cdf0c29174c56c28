"""The training loop: batches -> gradients -> weights, resumable at every checkpoint.

One loop serves every objective. A run killed anywhere goes on from its last checkpoint and ends
bit-equal to one that was not: the loader's order, the noise and the rates are functions of the seed
and the step, and everything else is in the checkpoint. SIGINT and SIGTERM finish the step, write a
checkpoint and return.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmpt.config import UserError
from mmpt.data.loader import Loader
from mmpt.data.order import mix_keys
from mmpt.model.codes import initialise_codes
from mmpt.model.transformer import Decoder
from mmpt.process import StopRequest, pick_device
from mmpt.tokenizers import load as load_codec
from mmpt.train.checkpoint import (
    begun_with,
    find_processor,
    latest,
    load_checkpoint,
    save_checkpoint,
)
from mmpt.train.loss import Losses, NextToken, Objective
from mmpt.train.metrics import (
    Metrics,
    by_modality,
    finite_or_none,
    forget_after,
    last_line,
    summary,
)
from mmpt.train.optim import (
    build_optimizer,
    clip_gradients,
    initialise_mup,
    learning_rate,
    set_learning_rate,
)
from mmpt.train.recipe import RunRecipe, TrainRecipe, keep_recipe, load_run_recipe
from mmpt.vocab import Vocabulary

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """How far a run is, over all its parts; saved in the checkpoint."""

    step: int = 0
    tokens: int = 0  # ids read, without padding
    seconds: float = 0.0  # spent in steps
    bad_steps: int = 0  # skipped because the loss or a gradient was not finite
    bad_in_a_row: int = 0


@dataclass
class TrainResult:
    """How a run ended; `checkpoint` is also a model folder."""

    finished: bool
    checkpoint: Path
    counters: Counters
    last: Metrics = field(default_factory=dict)  # of the last step
    data: dict[str, Any] = field(default_factory=dict)  # fill, cuts, shares, epochs

    def to_json(self) -> dict[str, Any]:
        """Plain values; an interrupted run has exit status 130."""
        return {
            "finished": self.finished,
            "checkpoint": str(self.checkpoint),
            **asdict(self.counters),
            "last": self.last,
            "data": self.data,
            "exit_status": 0 if self.finished else 130,
        }


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


def pretrainer(recipe: TrainRecipe, run: str | Path, *, vocabulary: Vocabulary) -> "Trainer":
    """What `train` runs."""
    vocabulary = begun_with(checkpoints_of(run), vocabulary)
    vocabulary.check(recipe.model.vocabulary, what="the recipe's model")
    model = Decoder.from_config(recipe.model, seed=recipe.seed)
    initialise_mup(model, recipe.optim)
    generator = torch.Generator().manual_seed(recipe.seed)
    for codec in map(load_codec, recipe.codes_from):
        if vocabulary.fingerprint_of(codec.modality) != codec.fingerprint:
            raise UserError(
                f"codes_from: the vocabulary has no ids of {codec.name} {codec.fingerprint}; "
                "name the tokenizers that encoded the data"
            )
        ranges, latents = vocabulary.ranges_of(codec.modality), codec.code_latents()
        for code_range, book in zip(ranges, latents if len(ranges) > 1 else [latents], strict=True):
            initialise_codes(model, code_range, book, generator)
    objective = NextToken(recipe.loss_weights, z_loss=recipe.z_loss, noise=recipe.noise)
    return Trainer(recipe, run, model=model, vocabulary=vocabulary, objective=objective)


def checkpoints_of(run: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run) / "checkpoints"


class Trainer:
    """A model, its optimiser, its rows, and a run folder to go on from.

    start: the folder of the model, where it is no fresh one.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        run: str | Path,
        *,
        model: Decoder,
        vocabulary: Vocabulary,
        objective: Objective,
        start: Path | None = None,
    ) -> None:
        self.recipe, self.folder, self.vocabulary = recipe, Path(run), vocabulary
        self.objective = objective
        self.device = pick_device(recipe.device)
        self.model = model.to(self.device).train()
        self.loader = Loader(
            recipe.data,
            vocabulary,
            seed=recipe.seed,
            total_rows=recipe.steps * recipe.accumulate * recipe.data.rows,
        )
        self.optimizer = build_optimizer(self.model, recipe.optim)
        self.counters = Counters()
        encoded = Path(recipe.vocabulary).parent if recipe.vocabulary else None
        self.processor = find_processor(latest(self.checkpoints), start, encoded)
        self._resume()

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return checkpoints_of(self.folder)

    def run(
        self, *, progress: bool = True, on_step: Callable[[Metrics], None] | None = None
    ) -> TrainResult:
        """Train until the recipe's last step, or until asked to stop."""
        recipe, counters = self.recipe, self.counters
        saved = latest(self.checkpoints) if counters.step else None
        path = self.folder / "metrics.jsonl"
        metrics = last_line(path)
        with (
            path.open("a") as sink,
            closing(self.loader),
            StopRequest() as stop,
            _bar(recipe, counters, progress) as bar,
        ):
            while counters.step < recipe.steps and not stop.asked:
                metrics = self.step()
                sink.write(json.dumps(metrics) + "\n")
                sink.flush()
                bar.update()
                bar.set_postfix_str(summary(metrics))
                if on_step is not None:
                    on_step(metrics)
                saved = self.save() if counters.step % recipe.checkpoint_every == 0 else None
            saved = saved or self.save()
        finished = counters.step >= recipe.steps
        if not finished:
            log.warning(
                "stopped at step %d of %d; the same command goes on from %s",
                counters.step,
                recipe.steps,
                saved,
            )
        return TrainResult(finished, saved, counters, metrics, self.loader.summary())

    def step(self) -> Metrics:
        """One update from `accumulate` batches; skipped when anything in it is not finite."""
        start, counters = time.monotonic(), self.counters
        generator = torch.Generator().manual_seed(mix_keys(self.recipe.seed, counters.step) >> 1)
        batches, num_tokens = self._read(generator)
        read = time.monotonic()
        rate = learning_rate(counters.step, self.recipe.steps, self.recipe.optim)
        weight = math.fsum(float(batch.weight.sum(dtype=torch.float64)) for batch in batches)
        losses = [self._backward(batch, weight) for batch in batches] if weight else []
        norm = float(clip_gradients(self.model, self.recipe.optim.clip)) if losses else 0.0
        loss = sum(float(each.total.detach()) for each in losses) / (weight or 1.0)
        good = math.isfinite(loss) and math.isfinite(norm)
        loads = self._update(rate if good and losses else 0.0)
        self._count_bad(good, rate)
        counters.step += 1
        counters.tokens += num_tokens
        counters.seconds += time.monotonic() - start
        return {
            "step": counters.step,
            "seconds": round(counters.seconds, 3),
            "data_seconds": round(read - start, 4),
            "tokens": counters.tokens,
            "step_tokens": num_tokens,
            "step_seconds": round(time.monotonic() - start, 4),
            "lr": rate,
            "grad_norm": finite_or_none(norm),
            "loss": finite_or_none(loss),
            "modality": by_modality(losses),
            "load": loads,
            "sources": {name: round(share, 4) for name, share in self.loader.mix().items()},
            "bad_steps": counters.bad_steps,
        }

    def time_step(self, *, repeats: int = 3) -> float:
        """Seconds of a step on this machine, to choose `steps` by; takes real steps, saves none."""
        seconds = [self.step()["step_seconds"] for _ in range(repeats + 1)]
        return sorted(seconds[1:])[repeats // 2]  # the first one warms up

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        return save_checkpoint(
            self.checkpoints,
            self.counters.step,
            model=self.model,
            optimizer=self.optimizer,
            vocabulary=self.vocabulary,
            state={"counters": asdict(self.counters), "loader": self.loader.state_dict()},
            processor=self.processor,
            keep=self.recipe.keep,
        )

    def _resume(self) -> None:
        path = latest(self.checkpoints)
        keep_recipe(self.folder, self.recipe, resumed=path is not None)
        if path is not None:
            state = load_checkpoint(path, model=self.model, optimizer=self.optimizer)
            self.counters = Counters(**state["counters"])
            self.loader.load_state_dict(state["loader"])
        forget_after(self.folder / "metrics.jsonl", self.counters.step)

    def _read(self, generator: torch.Generator) -> tuple[list[Any], int]:
        rows = list(islice(self.loader, self.recipe.accumulate))
        if not rows:
            raise UserError(
                f"the data ended after step {self.counters.step} of {self.recipe.steps}, which is "
                f"saved at {self.save()}: every source was read as often as its max_epochs says; "
                "raise one of them, or lower steps"
            )
        num_tokens = sum(int((each.document >= 0).sum()) for each in rows)
        batches = [self.objective.prepare(each, generator) for each in rows]
        return [batch.to(self.device) for batch in batches], num_tokens

    def _backward(self, batch: Any, weight: float) -> Losses:
        enabled = self.recipe.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            losses = self.objective.losses(self.model, batch)
        (losses.total / weight).backward()
        return losses

    def _update(self, rate: float) -> dict[str, list[list[int]]]:
        """Apply the gradients unless the rate is 0; returns the experts' loads of this step."""
        loads = {name: load.int().tolist() for name, load in self.model.expert_loads().items()}
        if rate:
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.model.update_balance()
        else:
            self.model.update_balance(0.0)
        self.optimizer.zero_grad()
        return loads

    def _count_bad(self, good: bool, rate: float) -> None:
        counters = self.counters
        counters.bad_steps += not good
        counters.bad_in_a_row = 0 if good else counters.bad_in_a_row + 1
        if counters.bad_in_a_row >= self.recipe.max_bad_steps:
            raise UserError(
                f"the loss was not finite in {counters.bad_in_a_row} steps in a row, up to step "
                f"{counters.step + 1}; lower optim.lr (now {rate:.2g}) and run again: the last "
                f"good checkpoint is {latest(self.checkpoints)}"
            )


def _bar(recipe: RunRecipe, counters: Counters, progress: bool) -> Any:
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 10.0  # a log file gets few lines
    return tqdm(
        total=recipe.steps,
        initial=counters.step,
        unit="step",
        desc="train",
        disable=not progress,
        mininterval=interval,
        dynamic_ncols=True,
    )
