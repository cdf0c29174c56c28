"""The training loop: batches -> gradients -> weights, resumable at every checkpoint.

One loop serves every objective. A run killed anywhere goes on from its last checkpoint and ends
bit-equal to one that was not: the loader's order, the noise and the rates are functions of the seed
and the step, and everything else is in the checkpoint. SIGINT and SIGTERM finish the step, write a
checkpoint and return.
"""

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
from mmpt.process import StopRequest, requeue
from mmpt.tokenizers import load as load_codec
from mmpt.train.checkpoint import (
    Checkpoints,
    Moment,
    begun_with,
    checkpoints_of,
    find_model,
    find_processor,
    latest,
    load_checkpoint,
)
from mmpt.train.clock import Laps
from mmpt.train.ema import Average
from mmpt.train.guard import Guard
from mmpt.train.loss import Losses, NextToken, Objective
from mmpt.train.memory import keep_freed
from mmpt.train.metrics import (
    Log,
    Metrics,
    by_modality,
    finite_or_none,
    forget_after,
    last_line,
    summary,
)
from mmpt.train.optim import (
    build_optimizer,
    initialise_mup,
    learning_rate,
    set_learning_rate,
)
from mmpt.train.parallel import Ranks, clip_gradients
from mmpt.train.recipe import RunRecipe, TrainRecipe, keep_recipe, load_run_recipe
from mmpt.vocab import Modality, Vocabulary

log = logging.getLogger(__name__)


@dataclass
class Counters:
    """How far a run is, over all its parts; saved in the checkpoint."""

    step: int = 0
    tokens: int = 0  # ids read, without padding
    seconds: float = 0.0  # spent in steps
    bad_steps: int = 0  # that were skipped


@dataclass
class TrainResult:
    """How a run ended; `checkpoint` is also a model folder."""

    finished: bool
    checkpoint: Path
    counters: Counters
    last: Metrics = field(default_factory=dict)  # of the last step
    data: dict[str, Any] = field(default_factory=dict)  # fill, cuts, shares, epochs
    status: int = 0  # exit status of a command that was asked to stop

    def to_json(self) -> dict[str, Any]:
        """Plain values; of a run that was interrupted at the terminal, exit status 130."""
        return {
            "finished": self.finished,
            "checkpoint": str(self.checkpoint),
            **asdict(self.counters),
            "last": self.last,
            "data": self.data,
            "exit_status": self.status,
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
    codecs = [load_codec(name) for name in recipe.codes_from]
    for codec in codecs:
        if vocabulary.fingerprint_of(codec.modality) != codec.fingerprint:
            raise UserError(
                f"codes_from: the vocabulary has no ids of {codec.name} {codec.fingerprint}; "
                "name the tokenizers that encoded the data"
            )

    start = find_model(recipe.start) if recipe.start else None
    if start is not None and recipe.codes_from:
        raise UserError("start and codes_from both say what the first weights are; leave one out")

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
        build=lambda: Decoder(recipe.model),
        initialise=initialise,
        start=start,
        vocabulary=vocabulary,
        objective=NextToken(recipe.loss_weights, z_loss=recipe.z_loss, noise=recipe.noise),
    )


class Trainer:
    """A model, its optimiser, its rows, and a run folder to go on from.

    build: gives the model, on the device of the context it is called in. initialise: writes the
    weights of a model that was built on the meta device, once it is spread over the ranks; without
    it, `build` gives them. start: the folder of the model, where it is no fresh one.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        run: str | Path,
        *,
        build: Callable[[], Decoder],
        vocabulary: Vocabulary,
        objective: Objective,
        initialise: Callable[[Decoder], None] | None = None,
        start: Path | None = None,
    ) -> None:
        self.recipe, self.folder, self.vocabulary = recipe, Path(run), vocabulary
        self.objective = objective
        self.ranks = Ranks(recipe.parallel, recipe.device)
        self.device = self.ranks.device
        if self.device.type == "cpu":
            keep_freed()
        self.model = self._build(build, initialise).train()
        self.loader = Loader(
            recipe.data,
            vocabulary,
            seed=recipe.seed,
            rank=self.ranks.data_rank,
            num_ranks=self.ranks.num_data,
            total_rows=recipe.steps * recipe.accumulate * recipe.data.rows,
        )
        self.optimizer = build_optimizer(self.model, recipe.optim)
        self.average = Average(self.model, recipe.ema) if recipe.ema else None
        self.counters, self.guard = Counters(), Guard(recipe.guard)
        self.saved = Checkpoints(
            self.checkpoints,
            keep=recipe.keep,
            keep_every=recipe.keep_every,
            device=self.device.type,
        )
        encoded = Path(recipe.vocabulary).parent if recipe.vocabulary else None
        self.processor = find_processor(latest(self.checkpoints), start, encoded)
        self._resume()

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return checkpoints_of(self.folder)

    def close(self) -> None:
        """End what works beside training: data workers, the writer of checkpoints, the ranks."""
        self.loader.close()
        self.saved.wait()
        self.ranks.close()

    def run(
        self, *, progress: bool = True, on_step: Callable[[Metrics], None] | None = None
    ) -> TrainResult:
        """Train until the recipe's last step, or until asked to stop."""
        recipe, counters = self.recipe, self.counters
        path = self.folder / "metrics.jsonl"
        metrics = last_line(path)
        last = latest(self.checkpoints) if counters.step else None
        progress = progress and self.ranks.first
        with (
            closing(self),
            Log(path if self.ranks.first else None) as sink,
            StopRequest() as stop,
            _bar(recipe, counters, progress) as bar,
        ):
            while counters.step < recipe.steps and not self._stops(stop):
                metrics = self.step()
                sink.write(metrics)
                bar.update()
                bar.set_postfix_str(summary(metrics))
                if on_step is not None:
                    on_step(metrics)
                last = self._begin_save() if counters.step % recipe.checkpoint_every == 0 else None
            if self.saved.wait() or last is None:
                last = self.save()
            data = self.loader.summary()
            if stop.requeue and self.ranks.first:
                requeue()
        finished = counters.step >= recipe.steps
        if not finished:
            log.warning(
                "stopped at step %d of %d; the same command goes on from %s",
                counters.step,
                recipe.steps,
                last,
            )
        return TrainResult(finished, last, counters, metrics, data, stop.status)

    def step(self) -> Metrics:
        """One update from `accumulate` batches; skipped when anything in it is bad."""
        start, counters = time.monotonic(), self.counters
        laps = Laps(self.device)
        batches, num_tokens = self._read()
        laps.lap("data")
        rate = learning_rate(counters.step, self.recipe.steps, self.recipe.optim)
        weight = math.fsum(float(batch.weight.sum(dtype=torch.float64)) for batch in batches)
        weight = self.ranks.sum(torch.tensor(weight, dtype=torch.float64)).item()
        laps.lap("ranks")
        losses = [self._backward(batch, weight, laps) for batch in batches] if weight else []
        norm = clip_gradients(self.model.parameters(), self.recipe.optim.clip).item()
        total, num_tokens, nats, counts, noisy = self._sum(losses, num_tokens)
        self.ranks.sum_loads(self.model)
        laps.lap("ranks")
        loss = total / (weight or 1.0)
        reason = self._judge(loss, norm, nats, counts)
        loads = self._update(rate if losses and not reason else 0.0)
        laps.lap("optimizer")
        counters.step += 1
        counters.tokens += num_tokens
        counters.bad_steps += reason is not None
        counters.seconds += time.monotonic() - start
        self._stop_if_hopeless(reason, rate)
        return {
            "step": counters.step,
            "seconds": round(counters.seconds, 3),
            "tokens": counters.tokens,
            "step_tokens": num_tokens,
            "step_seconds": round(time.monotonic() - start, 4),
            "laps": laps.seconds(),
            "lr": rate,
            "grad_norm": finite_or_none(norm),
            "loss": finite_or_none(loss),
            "modality": by_modality(nats, counts),
            "noisy": by_modality(*noisy),
            "load": loads,
            "sources": {name: round(share, 4) for name, share in self.loader.mix().items()},
            "bad_steps": counters.bad_steps,
            "skipped": reason,
            "failed_checkpoints": self.saved.failed,
        }

    def time_step(self, *, repeats: int = 3) -> float:
        """Seconds of a step on this machine, to choose `steps` by; takes real steps, saves none."""
        seconds = [self.step()["step_seconds"] for _ in range(repeats + 1)]
        return sorted(seconds[1:])[repeats // 2]  # the first one warms up

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        return self.saved.save(self.model, self.optimizer, self._moment())

    def _begin_save(self) -> Path:
        return self.saved.begin(self.model, self.optimizer, self._moment())

    def _moment(self) -> Moment:
        return Moment(
            step=self.counters.step,
            state={"counters": asdict(self.counters), "guard": self.guard.state_dict()},
            loader=self.loader.state_dict(),
            vocabulary=self.vocabulary,
            processor=self.processor,
            extra={"average": self.average.state_dict()} if self.average else {},
        )

    def _build(
        self, build: Callable[[], Decoder], initialise: Callable[[Decoder], None] | None
    ) -> Decoder:
        if self.ranks.mesh is None or initialise is None:
            model = build()
            if initialise is not None:
                initialise(model)
            return self.ranks.spread(model)
        with torch.device("meta"):
            model = build()
        model = self.ranks.spread(model).to_empty(device=self.device)
        initialise(model)
        return model

    def _resume(self) -> None:
        path = latest(self.checkpoints)
        keep_recipe(self.folder, self.recipe, resumed=path is not None, write=self.ranks.first)
        if path is not None:
            state, more = load_checkpoint(
                path, model=self.model, optimizer=self.optimizer, extra=("average",)
            )
            if self.average:
                self.average.load_state_dict(more["average"])
            self.counters = Counters(**state["counters"])
            self.loader.load_state_dict(state["loader"])
            if "guard" in state:  # which older ones have not
                self.guard.load_state_dict(state["guard"])
        if self.ranks.first:
            forget_after(self.folder / "metrics.jsonl", self.counters.step)

    def _stops(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop; all must know after the same step."""
        if self.ranks.count == 1:
            return stop.asked
        return bool(self.ranks.sum(torch.tensor(float(stop.asked))).item())

    def _read(self) -> tuple[list[Any], int]:
        """Batches of this rank on its device, and how many ids they have."""
        rows = list(islice(self.loader, self.recipe.accumulate))
        num_tokens = sum(int((each.document >= 0).sum()) for each in rows)
        if not self.ranks.sum(torch.tensor(float(num_tokens))).item():
            raise UserError(
                f"the data ended after step {self.counters.step} of {self.recipe.steps}, which is "
                f"saved at {self.save()}: every source was read as often as its max_epochs says; "
                "raise one of them, or lower steps"
            )
        if self.ranks.count > 1:  # others wait for this one, though its streams have ended
            rows += [self.loader.padding()] * (self.recipe.accumulate - len(rows))
        batches = [
            self.objective.prepare(each, self._generators(number, len(each.ids)))
            for number, each in enumerate(rows)
        ]
        return [batch.to(self.device) for batch in batches], num_tokens

    def _generators(self, batch: int, rows: int) -> list[torch.Generator]:
        """One for each of this rank's rows of a batch, by its number among those of all ranks."""
        key = mix_keys(mix_keys(self.recipe.seed, self.counters.step), batch)
        numbers = range(self.ranks.data_rank, rows * self.ranks.num_data, self.ranks.num_data)
        seeds = [mix_keys(key, number) >> 1 for number in numbers]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def _backward(self, batch: Any, weight: float, laps: Laps) -> Losses:
        enabled = self.recipe.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            losses = self.objective.losses(self.model, batch)
        laps.lap("forward")
        (losses.total / weight).backward()
        laps.lap("backward")
        return losses

    def _sum(
        self, losses: Sequence[Losses], num_tokens: int
    ) -> tuple[float, int, list[float], list[float], tuple[list[float], list[float]]]:
        """Of all batches and ranks: weighted loss, ids, nats and counts by modality, noisy ones."""
        sums = torch.zeros(5, len(Modality), dtype=torch.float64, device=self.device)
        sums[0, 1] = num_tokens
        for each in losses:
            sums[0, 0] += each.total.detach()
            sums[1:] += torch.stack([each.nats, each.counts, *(each.noisy or sums[1:3] * 0)])
        (total, num, *_), nats, counts, *noisy = self.ranks.sum(sums).tolist()
        return total, int(num), nats, counts, (noisy[0], noisy[1])

    def _judge(
        self, loss: float, norm: float, nats: Sequence[float], counts: Sequence[float]
    ) -> str | None:
        by_name = {f"the {m.name.lower()} loss": nats[m] / counts[m] for m in Modality if counts[m]}
        reason = self.guard.judge({"the loss": loss, **by_name, "the gradient": norm})
        if reason:
            log.warning("step %d is skipped: %s", self.counters.step + 1, reason)
        return reason

    def _update(self, rate: float) -> dict[str, list[list[int]]]:
        """Apply the gradients unless the rate is 0; returns the experts' loads of this step."""
        loads = {name: load.int().tolist() for name, load in self.model.expert_loads().items()}
        if rate:
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.model.update_balance()
            if self.average:
                self.average.update(self.counters.step)
        else:
            self.model.update_balance(0.0)
        self.optimizer.zero_grad()
        return loads

    def _stop_if_hopeless(self, reason: str | None, rate: float) -> None:
        if self.guard.in_a_row >= self.recipe.max_bad_steps:
            self.saved.wait()
            raise UserError(
                f"{self.guard.in_a_row} steps in a row were skipped ({reason}), up to step "
                f"{self.counters.step}; begin a new run with a lower optim.lr (now {rate:.2g}): "
                f"the last good checkpoint is {latest(self.checkpoints)}"
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
