"""Train a codec from its recipe: `mmpt tokenizer train tokenizers/<name>/recipe.toml`.

One loop for every medium; what differs is the objective. Batch and randomness of a step are a pure
function of (seed, step), so a killed run that resumes from its last checkpoint equals one that was
never killed. The exponential average of the weights is what is saved. torchrun shares the batch
among processes.
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmpt.config import UserError, to_toml, write_atomic
from mmpt.parts import Text
from mmpt.process import StopRequest
from mmpt.progress import Bar
from mmpt.tokenizers.base import Codec, load_codec
from mmpt.tokenizers.checkpoint import State
from mmpt.tokenizers.health import Unhealthy
from mmpt.tokenizers.losses import PICTURE_TERMS, LossConfig
from mmpt.tokenizers.objectives import OBJECTIVES, Objective
from mmpt.tokenizers.processes import Processes
from mmpt.tokenizers.recipe import CodecRecipe, load_codec_recipe, read_parts, read_split
from mmpt.tokenizers.samples import Samples
from mmpt.tokenizers.text import TextCodec
from mmpt.tokenizers.video import VideoCodec

log = logging.getLogger(__name__)


def train(recipe: Path, overrides: Sequence[str] = (), *, out: Path | None = None) -> dict:
    """Train the codec of RECIPE into OUT (default: build/ and the name of the recipe's folder).

    The same command goes on after an interruption. OUT also gets train.jsonl, pictures of what is
    rebuilt (samples/), and the resolved recipe, unless it is the recipe's own folder. On several
    GPUs: torchrun --nproc-per-node 8 -m mmpt tokenizer train RECIPE.
    """
    settings = load_codec_recipe(recipe, overrides)
    home = Path(recipe).resolve().parent
    out = out or Path("build") / home.name  # never the shipped codec
    resolved = out / "recipe.toml" if out.resolve() != home else None
    if settings.kind == "text":
        result = _train_text(settings, out)
        if resolved:
            write_atomic(resolved, to_toml(settings))
        return result
    with Processes(settings.device) as processes:
        gpus = [processes.device] if processes.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):  # the caller's go on as they were
            training = Training(settings, out, processes)
            if resolved and processes.first:
                write_atomic(resolved, to_toml(settings))
            return training.run()


def _train_text(recipe: CodecRecipe, out: Path) -> dict[str, Any]:
    parts = [part for parts in read_parts(recipe.shards, heldout=False) for part in parts]
    texts = [part.text for part in parts if isinstance(part, Text)]
    codec = TextCodec.train_on(texts, num_text=recipe.num_text)
    codec.save(out)
    return _result(codec, out, 0.0)


def _result(codec: Codec, out: Path, seconds: float) -> dict[str, Any]:
    return {"tokenizer": str(out), "fingerprint": codec.fingerprint, "seconds": round(seconds, 1)}


class Training:
    """An objective, the state of its training, and the folder that it is written to."""

    def __init__(self, recipe: CodecRecipe, out: Path, processes: Processes) -> None:
        self.recipe, self.out, self.processes = recipe, out, processes
        torch.manual_seed(recipe.seed)  # the initial weights; every step has its own randomness
        documents, heldout = read_split(recipe.shards)
        self.objective = OBJECTIVES[recipe.kind](recipe, documents)
        if recipe.start:
            _go_on_from(recipe.start, self.objective)
        if recipe.kind == "speech":
            _warn_of_picture_losses(recipe.loss)
        self.objective.to(processes.device)
        self.state = State(recipe, self.objective)
        self.samples = Samples(self.objective.codec, heldout, documents)
        self.checkpoint = out / "checkpoint.safetensors"
        self.first_step, self.seconds_before = 0, 0.0
        if self.checkpoint.is_file():
            self.first_step, self.seconds_before = self.state.load(self.checkpoint)
        if not processes.first:  # counts that processes add up
            self.objective.infeasible = 0

    def run(self) -> dict[str, Any]:
        """Train to the last step, or until asked to stop; what the command line prints."""
        recipe, logs, began = self.recipe, self.out / "train.jsonl", time.monotonic()
        if self.processes.first:
            _forget_from(logs, self.first_step)
        with StopRequest() as stop, self._bar() as bar:
            for step in range(self.first_step, recipe.steps):
                row = self._healthy_step(step)
                bar.update()
                done, seconds = step + 1, self.seconds_before + time.monotonic() - began
                if step % recipe.log_every == 0 or done == recipe.steps:
                    bar.set_postfix(loss=row["loss"], used=row["used"])
                    self._write(logs, row)
                if recipe.samples_every and done % recipe.samples_every == 0:
                    self._draw(done)
                stopped = self.processes.any(stop.asked) and done < recipe.steps
                if stopped or (done % recipe.checkpoint_every == 0 and done < recipe.steps):
                    self._save(done, seconds)
                if stopped:
                    return self._stopped(done, seconds)
        return self._finish(self.seconds_before + time.monotonic() - began)

    def step(self, step: int) -> dict[str, Any]:
        """One step; returns its row of the log. Raises Unhealthy when it should be the last."""
        recipe, state, objective = self.recipe, self.state, self.objective
        lr = _learning_rate(recipe, step)
        state.optimizer.param_groups[0]["lr"] = lr
        torch.manual_seed(hash((recipe.seed, step)) % 2**31)  # restarts of dead codes draw from it
        drawn = objective.batch(np.random.default_rng((recipe.seed, 2, step)), recipe.batch)
        batch, share = self.processes.share_of(drawn)
        buffers = [buffer.clone() for buffer in state.module.buffers()]
        with state.health.listening(), self._autocast():
            loss, metrics = objective.loss(batch, step)
        norm = self._gradients(loss * share)
        row = self.processes.metrics({"loss": float(loss.detach()), **metrics}, share)
        good = math.isfinite(row["loss"]) and math.isfinite(norm)
        if good:
            state.optimizer.step()
            row |= self._update_adversary(step, share)
        else:  # what it left in moving averages goes, too
            for buffer, before in zip(state.module.buffers(), buffers, strict=True):
                buffer.copy_(before)
        self.processes.same_buffers(state.module)
        state.update_average(min(recipe.ema, (1 + step) / (10 + step)))
        if "infeasible" in row:
            objective.infeasible = row["infeasible"] if self.processes.first else 0
        row |= state.health.update(self.processes, step)
        bad_steps = state.bad_steps.update(step, lr, good=good)
        row = {"step": step, **row, "norm": norm, "bad_steps": bad_steps}
        return {name: _finite_or_none(value) for name, value in row.items()}

    def _gradients(self, loss: torch.Tensor) -> float:
        parameters = list(self.state.module.parameters())
        self.state.optimizer.zero_grad()
        loss.backward()
        self.processes.average_gradients(parameters)
        return float(nn.utils.clip_grad_norm_(parameters, 1.0))

    def _update_adversary(self, step: int, share: float) -> dict[str, float]:
        adversary = self.objective.adversary
        if adversary is None or not adversary.active(step):
            return {}
        with self._autocast():
            return adversary.update(self.processes, share)

    def _autocast(self) -> torch.autocast:
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=enabled)

    def _healthy_step(self, step: int) -> dict[str, Any]:
        try:
            return self.step(step)
        except Unhealthy as error:
            kept = f"{self.checkpoint} stays" if self.checkpoint.is_file() else "no checkpoint yet"
            raise UserError(f"{error} ({kept})") from None

    def _write(self, logs: Path, row: dict[str, Any]) -> None:
        if self.processes.first:
            with logs.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _draw(self, done: int) -> None:
        if self.processes.first:
            with self.state.averaged():
                self.samples.draw(self.out / "samples" / f"step-{done:06d}.png")

    def _save(self, done: int, seconds: float) -> None:
        if self.processes.first:
            self.state.save(self.checkpoint, done, seconds)

    def _stopped(self, done: int, seconds: float) -> dict[str, Any]:
        if self.processes.first:
            log.warning(
                "stopped at step %d of %d; the same command goes on from %s",
                done,
                self.recipe.steps,
                self.checkpoint,
            )
        return {
            "tokenizer": str(self.out),
            "finished": False,
            "step": done,
            "seconds": round(seconds, 1),
            "exit_status": 130,
        }

    def _finish(self, seconds: float) -> dict[str, Any]:
        self.state.module.load_state_dict(self.state.average.state_dict())
        codec = self.objective.codec.eval()
        if self.processes.first:
            codec.save(self.out)
            self.checkpoint.unlink(missing_ok=True)
        return _result(codec, self.out, seconds)

    def _bar(self) -> Bar:
        return Bar(
            total=self.recipe.steps,
            initial=self.first_step,
            desc=f"train {self.out.name}",
            unit="step",
            disable=not self.processes.first,
        )


def _warn_of_picture_losses(loss: LossConfig) -> None:
    """Frames of sound are compared in one way only."""
    given = [name for name in PICTURE_TERMS if getattr(loss, name) != getattr(LossConfig(), name)]
    if given:
        names = ", ".join(f"loss.{name}" for name in given)
        log.warning("%s: no effect on speech codecs, these are of pictures", names)


def _go_on_from(start: str, objective: Objective) -> None:
    """Copy the weights of a trained codec; refuses one of another shape or image codec."""
    codec = objective.codec
    try:
        codec.load_state_dict(load_codec(start).state_dict())
    except RuntimeError:
        raise UserError(f"start = {start!r} has another shape than this recipe") from None
    if isinstance(codec, VideoCodec) and codec.image.fingerprint != codec.config.image_fingerprint:
        raise UserError(f"start = {start!r} extends another image codec than base")


def _learning_rate(recipe: CodecRecipe, step: int) -> float:
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


def _forget_from(logs: Path, step: int) -> None:
    """Drop the rows of steps that will be done again; the last may be half a row."""
    rows = logs.read_text().splitlines(keepends=True) if logs.is_file() else []
    kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] < step]
    write_atomic(logs, "".join(kept))


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
