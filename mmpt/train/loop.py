"""The training loop: batches -> gradients -> weights, resumable at every checkpoint.

One loop serves every objective. A run killed anywhere goes on from its last checkpoint and ends
bit-equal to one that was not: the loader's order, the noise and the rates are functions of the seed
and the step, and everything else is in the checkpoint. SIGINT and SIGTERM finish the step, write a
checkpoint and return.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmpt.config import UserError
from mmpt.data.loader import Loader
from mmpt.data.order import mix_keys
from mmpt.model.backends import check_backend
from mmpt.model.float8 import check_float8, float8_linear
from mmpt.model.transformer import Decoder
from mmpt.process import StopRequest, requeue
from mmpt.train.checkpoint import Checkpoints, Moment, checkpoints_of, find_processor, latest
from mmpt.train.clock import Laps
from mmpt.train.ema import Average
from mmpt.train.flops import Flops, count_ids, measure_peak
from mmpt.train.guard import Guard
from mmpt.train.loss import Losses, Objective
from mmpt.train.metrics import (
    Metrics,
    by_modality,
    finite_or_none,
    forget_after,
    last_line,
    progress_bar,
    shares,
    speed,
    summary,
)
from mmpt.train.optim import build_optimizer, learning_rate, set_learning_rate
from mmpt.train.parallel import Ranks, clip_gradients
from mmpt.train.recipe import RunRecipe, keep_recipe
from mmpt.train.restore import load_checkpoint
from mmpt.train.result import Counters, TrainResult
from mmpt.train.routing import Routing, router_gradients
from mmpt.train.stages import NewRowsFirst
from mmpt.train.stall import Pulse
from mmpt.train.track import check_installed
from mmpt.train.watching import Watching
from mmpt.vocab import Modality, Vocabulary

BALANCE = 1e-3  # rate of the routers' biases

log = logging.getLogger(__name__)


class Trainer:
    """A model, its optimiser, its rows, and a run folder to go on from.

    build: gives the model, on the device of the context it is called in. initialise: writes the
    weights of a model that was built on the meta device, once it is spread over the ranks; without
    it, `build` gives them. start: the folder of the model, where it is no fresh one.
    new_rows_first: steps that train the rows of new ids alone, see `NewRowsFirst`.
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
        new_rows_first: int = 0,
    ) -> None:
        self.recipe, self.folder, self.vocabulary = recipe, Path(run), vocabulary
        self.objective = objective
        check_installed(recipe.track)
        self.ranks = Ranks(recipe.parallel, recipe.device)
        self.device = self.ranks.device
        check_backend(recipe.attention, self.device)
        if recipe.precision == "fp8":
            check_float8(self.device)
        self.model = self._build(build, initialise).train()
        self.model.backend = recipe.attention
        if recipe.precision == "fp8":
            self.model.multiply_by(float8_linear())
        self.loader = Loader(
            recipe.data,
            vocabulary,
            seed=recipe.seed,
            rank=self.ranks.data_rank,
            num_ranks=self.ranks.num_data,
            total_rows=recipe.steps * recipe.accumulate * recipe.data.rows,
        )
        self.optimizer = build_optimizer(self.model, recipe.optim)
        self.stage = NewRowsFirst(
            self.model, self.optimizer, num_old=vocabulary.num_text, steps=new_rows_first
        )
        self.average = Average(self.model, recipe.ema) if recipe.ema else None
        self.counters, self.guard = Counters(), Guard(recipe.guard)
        self.flops, self.routing = Flops(self.model), Routing()
        self.pulse = Pulse()
        self.peak: float | None = None  # operations a second of all ranks, once a run has begun
        self.saved = Checkpoints(
            self.checkpoints,
            keep=recipe.keep,
            keep_every=recipe.keep_every,
            device=self.device.type,
        )
        self._waited = 0.0  # seconds for checkpoints that rows have told of
        encoded = Path(recipe.vocabulary).parent if recipe.vocabulary else None
        self.processor = find_processor(latest(self.checkpoints), start, encoded)
        self._resume()
        self.watching = Watching(
            recipe,
            self.folder,
            vocabulary=vocabulary,
            encoded=encoded,
            processor=self.processor,
            ranks=self.ranks,
            pulse=self.pulse,
            step=self.counters.step,
        )

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
        self.peak = self._measure_peak()
        metrics = last_line(self.folder / "metrics.jsonl")
        last = latest(self.checkpoints) if counters.step else None
        progress = progress and self.ranks.first
        with (
            closing(self),
            self.watching as watching,
            StopRequest() as stop,
            progress_bar(recipe.steps, done=counters.step, shown=progress) as bar,
        ):
            while counters.step < recipe.steps and not self._stops(stop):
                watching.before(counters.step + 1)
                metrics = watching.after(self.step(), self.model)
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
        self.pulse.step = counters.step + 1
        laps = Laps(self.device, self.pulse.begin)
        laps.begin("data")
        batches, read = self._read()
        laps.begin("ranks")
        rate = learning_rate(counters.step, self.recipe.steps, self.recipe.optim)
        weight = math.fsum(float(batch.weight.sum(dtype=torch.float64)) for batch in batches)
        weight = self.ranks.sum(torch.tensor(weight, dtype=torch.float64)).item()
        losses = [self._backward(batch, weight, laps) for batch in batches] if weight else []
        if counters.step and counters.step == self.stage.steps:
            self.guard.forget()
        self.stage.apply(counters.step)
        laps.begin("ranks")
        routers = router_gradients(self.model)
        norm = clip_gradients(self.model.parameters(), self.recipe.optim.clip).item()
        total, sums = self._sum(losses, read)
        nats, counts, *noisy = sums[:4].tolist()
        read, num_noisy = sums[4:6], sums[6]
        self.ranks.sum_loads(self.model)
        laps.begin("optimizer")
        loss = total / (weight or 1.0)
        reason = self._judge(loss, norm, nats, counts)
        loads, routing = self._update(rate if losses and not reason else 0.0, routers)
        num_tokens, flops = int(read[0].sum()), self.flops.of_step(read, num_noisy)
        counters.step += 1
        counters.tokens += num_tokens
        for name, number in flops.items():
            counters.flops[name] = counters.flops.get(name, 0) + number
        counters.bad_steps += reason is not None
        counters.seconds += time.monotonic() - start
        self._stop_if_hopeless(reason, rate)
        seconds = time.monotonic() - start
        waited, self._waited = self.saved.seconds - self._waited, self.saved.seconds
        return {
            "step": counters.step,
            "seconds": round(counters.seconds, 3),
            "tokens": counters.tokens,
            "step_tokens": num_tokens,
            "step_seconds": round(seconds, 4),
            "laps": laps.seconds() | {"checkpoint": round(waited, 4)},
            "speed": speed(num_tokens, sum(flops.values()), seconds, self.peak),
            "lr": rate,
            "grad_norm": finite_or_none(norm),
            "loss": finite_or_none(loss),
            "modality": by_modality(nats, counts),
            "noisy": by_modality(noisy[0], noisy[1]),
            "share": shares(read[0].tolist()),
            "step_flops": flops,
            "flops": dict(counters.flops),
            "load": loads,
            "router": routing,
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
        self.pulse.begin("checkpoint")
        return self.saved.save(self.model, self.optimizer, self._moment())

    def _begin_save(self) -> Path:
        self.pulse.begin("checkpoint")
        return self.saved.begin(self.model, self.optimizer, self._moment())

    def _moment(self) -> Moment:
        return Moment(
            step=self.counters.step,
            state={
                "counters": asdict(self.counters),
                "guard": self.guard.state_dict(),
                "routing": self.routing.state_dict(),
            },
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
            known = {each.name for each in fields(Counters)}  # older ones had others
            counters = {name: n for name, n in state["counters"].items() if name in known}
            self.counters = Counters(**counters)
            self.loader.load_state_dict(state["loader"])
            if "guard" in state:  # which older ones have not
                self.guard.load_state_dict(state["guard"])
            self.routing.load_state_dict(state.get("routing", {}))
        if self.ranks.first:
            forget_after(self.folder / "metrics.jsonl", self.counters.step)

    def _measure_peak(self) -> float:
        dtype = torch.float32 if self.recipe.precision == "fp32" else torch.bfloat16
        peak = torch.tensor(measure_peak(self.device, dtype), dtype=torch.float64)
        return self.ranks.sum(peak).item() * self.recipe.parallel.tensor

    def _stops(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop; all must know after the same step."""
        if self.ranks.count == 1:
            return stop.asked
        return bool(self.ranks.sum(torch.tensor(float(stop.asked))).item())

    def _read(self) -> tuple[list[Any], torch.Tensor]:
        """Batches of this rank on its device, and what `count_ids` says of them."""
        rows = list(islice(self.loader, self.recipe.accumulate))
        read = count_ids(rows)
        if not self.ranks.sum(read[0].sum()).item():
            raise UserError(
                f"the data ended after step {self.counters.step} of {self.recipe.steps}, which is "
                f"saved at {self.save()}: every source was read as often as its max_epochs says; "
                "raise one of them, or lower steps"
            )
        if self.ranks.count > 1:  # others wait for this one, though its streams have ended
            rows += [self.loader.padding()] * (self.recipe.accumulate - len(rows))
        key = mix_keys(self.recipe.seed, self.counters.step)
        batches = [
            self.objective.prepare(
                each, self.ranks.generators(mix_keys(key, number), len(each.ids))
            )
            for number, each in enumerate(rows)
        ]
        return [batch.to(self.device) for batch in batches], read

    def _backward(self, batch: Any, weight: float, laps: Laps) -> Losses:
        enabled = self.recipe.precision != "fp32"
        laps.begin("forward")
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            losses = self.objective.losses(self.model, batch)
        laps.begin("backward")
        total, routers = losses.total, self.model.take_router_loss()
        if routers is not None:  # a sum over ids as well; it is no part of the loss that is told
            total = total + routers.sum()
        (total / weight).backward()
        return losses

    def _sum(self, losses: Sequence[Losses], read: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Of all batches and ranks: the weighted loss, and by modality, float64 (7, 4) on the host:

        nats, counts, those two of noisy ids beside them, `read`, and how many noisy ids there are.
        """
        sums = torch.zeros(8, len(Modality), dtype=torch.float64, device=self.device)
        for each in losses:
            sums[0, 0] += each.total.detach()
            sums[1:5] += torch.stack([each.nats, each.counts, *(each.noisy or sums[1:3] * 0)])
            sums[7] += 0 if each.num_noisy is None else each.num_noisy
        sums[5:7] = read.to(self.device)
        sums = self.ranks.sum(sums).cpu()
        return sums[0, 0].item(), sums[1:]

    def _judge(
        self, loss: float, norm: float, nats: Sequence[float], counts: Sequence[float]
    ) -> str | None:
        by_name = {f"the {m.name.lower()} loss": nats[m] / counts[m] for m in Modality if counts[m]}
        reason = self.guard.judge({"the loss": loss, **by_name, "the gradient": norm})
        if reason:
            log.warning("step %d is skipped: %s", self.counters.step + 1, reason)
        return reason

    def _update(
        self, rate: float, routers: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, list[list[int]]], dict[str, Any]]:
        """Apply the gradients unless the rate is 0; returns what experts and routers did."""
        model = self.model
        loads, scores, unserved = (
            {name: each.cpu() for name, each in counted.items()}
            for counted in (model.expert_loads(), model.router_scores(), model.unserved())
        )
        if rate:
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
            self.model.update_balance(0.0 if self.stage.holds(self.counters.step) else BALANCE)
            if self.average:
                self.average.update(self.counters.step)
        else:
            self.model.update_balance(0.0)
        self.optimizer.zero_grad()
        routing = self.routing.look(loads, scores, unserved, routers)
        return {name: load.int().tolist() for name, load in loads.items()}, routing

    def _stop_if_hopeless(self, reason: str | None, rate: float) -> None:
        if self.guard.in_a_row >= self.recipe.max_bad_steps:
            self.saved.wait()
            raise UserError(
                f"{self.guard.in_a_row} steps in a row were skipped ({reason}), up to step "
                f"{self.counters.step}; begin a new run with a lower optim.lr (now {rate:.2g}): "
                f"the last good checkpoint is {latest(self.checkpoints)}"
            )
