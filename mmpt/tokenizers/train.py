"""Train a codec from its recipe: `mmpt tokenizer train tokenizers/<name>/recipe.toml`.

One loop for every medium; what differs is the objective. Batch and randomness of a step are a pure
function of (seed, step), so a killed run that resumes from its last checkpoint equals one that was
never killed. The exponential average of the weights is what is saved.
"""

import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from tqdm import tqdm

from mmpt.config import UserError, load_recipe, to_toml, write_atomic
from mmpt.parts import Part, Text
from mmpt.tokenizers.base import Codec, config_hash, load_codec
from mmpt.tokenizers.objectives import OBJECTIVES, Objective
from mmpt.tokenizers.recipe import CodecRecipe, read_parts
from mmpt.tokenizers.text import TextCodec
from mmpt.tokenizers.video import VideoCodec


def train(recipe: Path, overrides: Sequence[str] = (), *, out: Path | None = None) -> dict:
    """Train the codec of RECIPE into OUT (default: build/ and the name of the recipe's folder).

    The same command goes on after an interruption. The resolved recipe is written beside the codec,
    unless OUT is the recipe's own folder.
    """
    settings = load_recipe(CodecRecipe, recipe, overrides)
    home = Path(recipe).resolve().parent
    out = out or Path("build") / home.name  # never the shipped codec
    documents = read_parts(settings.shards, heldout=False)
    if settings.kind == "text":
        codec: Codec = TextCodec.train_on(
            [part.text for parts in documents for part in parts if isinstance(part, Text)],
            num_text=settings.num_text,
        )
        codec.save(out)
        seconds = 0.0
    else:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers go on as they were
            codec, seconds = _train_network(settings, documents, out)
    if out.resolve() != home:
        write_atomic(out / "recipe.toml", to_toml(settings))
    return {"tokenizer": str(out), "fingerprint": codec.fingerprint, "seconds": round(seconds, 1)}


def _train_network(
    recipe: CodecRecipe, documents: list[list[Part]], out: Path
) -> tuple[Codec, float]:
    torch.manual_seed(recipe.seed)  # the initial weights; everything later has its own generator
    objective = OBJECTIVES[recipe.kind](recipe, documents)
    if recipe.start:
        _go_on_from(recipe.start, objective)
    state = _State(recipe, objective)
    state_file, logs = out / "checkpoint.safetensors", out / "train.jsonl"
    start, before = state.load(state_file) if state_file.is_file() else (0, 0.0)
    _forget_from(logs, start)
    began = time.monotonic()
    with tqdm(total=recipe.steps, initial=start, desc=f"train {out.name}", mininterval=5) as bar:
        for step in range(start, recipe.steps):
            row = _step(recipe, objective, state, step)
            bar.update()
            if step % 50 == 0 or step + 1 == recipe.steps:
                with logs.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                bar.set_postfix(loss=f"{row['loss']:.4f}", used=row["used"])
            if (step + 1) % recipe.checkpoint_every == 0 and step + 1 < recipe.steps:
                state.save(state_file, step + 1, before + time.monotonic() - began)
    state.module.load_state_dict(state.average.state_dict())
    objective.codec.eval().save(out)
    state_file.unlink(missing_ok=True)
    return objective.codec, before + time.monotonic() - began


def _go_on_from(start: str, objective: Objective) -> None:
    """Copy the weights of a trained codec; refuses one of another shape or image codec."""
    codec = objective.codec
    try:
        codec.load_state_dict(load_codec(start).state_dict())
    except RuntimeError:
        raise UserError(f"start = {start!r} has another shape than this recipe") from None
    if isinstance(codec, VideoCodec) and codec.image.fingerprint != codec.config.image_fingerprint:
        raise UserError(f"start = {start!r} extends another image codec than base")


def _step(recipe: CodecRecipe, objective: Objective, state: "_State", step: int) -> dict:
    """One step of training; returns its row of the log."""
    state.optimizer.param_groups[0]["lr"] = _learning_rate(recipe, step)
    torch.manual_seed(hash((recipe.seed, step)) % 2**31)  # restarts of dead codes draw from it
    batch = objective.batch(np.random.default_rng((recipe.seed, 2, step)), recipe.batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
        loss, metrics = objective.loss(batch, step)
    state.optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.module.parameters(), 1.0)
    if torch.isfinite(norm):
        state.optimizer.step()
    state.update_average(min(recipe.ema, (1 + step) / (10 + step)))
    return {"step": step, "loss": float(loss.detach()), "norm": float(norm), **metrics}


def _learning_rate(recipe: CodecRecipe, step: int) -> float:
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


class _State:
    """What a checkpoint holds: the module, its average, the optimizer, and counts."""

    def __init__(self, recipe: CodecRecipe, objective: Objective) -> None:
        self.recipe, self.objective = recipe, objective
        self.module = objective.trained().train()
        self.average = copy.deepcopy(self.module).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=recipe.lr,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
        )

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the average towards the module; buffers are copied."""
        for mean, now in zip(self.average.parameters(), self.module.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
        for mean, now in zip(self.average.buffers(), self.module.buffers(), strict=True):
            mean.copy_(now)

    def save(self, path: Path, step: int, seconds: float) -> None:
        """Write a checkpoint, atomically."""
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        meta = {
            "step": str(step),
            "seconds": str(seconds),
            "infeasible": str(self.objective.infeasible),
            "recipe": config_hash(self.recipe),
        }
        write_atomic(path, safetensors.torch.save(tensors, metadata=meta))

    def load(self, path: Path) -> tuple[int, float]:
        """Read what `save` wrote: steps done and the seconds that they took."""
        another = UserError(f"{path} belongs to another recipe; remove it to start anew")
        try:
            with safetensors.safe_open(path, "pt") as file:
                meta = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); remove it to start anew") from None
        if meta.get("recipe", config_hash(self.recipe)) != config_hash(self.recipe):
            raise another
        try:
            for prefix, target in (("module.", self.module), ("average.", self.average)):
                target.load_state_dict(_below(prefix, tensors))
        except RuntimeError:
            raise another from None
        saved = self.optimizer.state_dict()
        for key, value in _below("optimizer.", tensors).items():
            index, name = key.split(".", 1)
            saved["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(saved)
        self.objective.infeasible = int(meta.get("infeasible", 0))
        return int(meta["step"]), float(meta["seconds"])


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _forget_from(logs: Path, step: int) -> None:
    """Drop the rows of steps that will be done again; the last may be half a row."""
    rows = logs.read_text().splitlines(keepends=True) if logs.is_file() else []
    kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] < step]
    write_atomic(logs, "".join(kept))
