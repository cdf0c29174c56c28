"""Train a codec from its recipe: `mmpt tokenizer train tokenizers/<name>/recipe.toml`.

One loop for every medium; what differs is the objective (`ImageObjective` and its kin): it draws a
batch as a pure function of (seed, step) and turns it into a loss. The exponential average of the
weights is what is saved. A killed run resumes from its last checkpoint.
"""

import copy
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from mmpt import hub
from mmpt.config import UserError, load_recipe, to_toml, write_atomic
from mmpt.data.shards import Quarantine, read_documents
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.tokenizers.base import Codec, load_codec
from mmpt.tokenizers.image import ImageCodec, ImageCodecConfig
from mmpt.tokenizers.losses import mel_loss, pixel_loss
from mmpt.tokenizers.speech import CHARACTERS, SpeechCodec, SpeechCodecConfig, log_mel
from mmpt.tokenizers.text import TextCodec
from mmpt.tokenizers.video import GROUP, VideoCodec, VideoCodecConfig

log = logging.getLogger(__name__)

MAX_BLOCKS = 6  # of 0.8 s, that one training utterance may take


def train(recipe: Path, overrides: Sequence[str] = (), *, out: Path | None = None) -> dict:
    """Train the codec of RECIPE into `out` (the recipe's folder by default); resumes by itself."""
    settings = load_recipe(CodecRecipe, recipe, overrides)
    out = out or Path(recipe).parent
    documents = read_parts(settings.shards)
    if settings.kind == "text":
        codec: Codec = TextCodec.train_on(
            [part.text for parts in documents for part in parts if isinstance(part, Text)],
            num_text=settings.num_text,
        )
        codec.save(out)
        seconds = 0.0
    else:
        codec, seconds = _train_network(settings, documents, out)
    write_atomic(out / "recipe.toml", to_toml(settings))
    return {"tokenizer": str(out), "fingerprint": codec.fingerprint, "seconds": round(seconds, 1)}


def _learning_rate(recipe: CodecRecipe, step: int) -> float:
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    share = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2)


def _train_network(
    recipe: CodecRecipe, documents: list[list[Part]], out: Path
) -> tuple[Codec, float]:
    if recipe.kind not in OBJECTIVES:
        raise UserError(f"kind = {recipe.kind!r}; choose text, {', '.join(OBJECTIVES)}")
    torch.manual_seed(recipe.seed)  # the initial weights; everything later has its own generator
    objective = OBJECTIVES[recipe.kind](recipe, documents)
    module = objective.trained().train()
    average = copy.deepcopy(module).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    state_file = out / "checkpoint.safetensors"
    start, before = _restore(state_file, module, average, optimizer)
    began, logs = time.monotonic(), (out / "train.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=recipe.steps, initial=start, desc=f"train {out.name}", mininterval=5) as bar:
        for step in range(start, recipe.steps):
            optimizer.param_groups[0]["lr"] = _learning_rate(recipe, step)
            torch.manual_seed(
                hash((recipe.seed, step)) % 2**31
            )  # restarts of dead codes draw from it
            batch = objective.batch(np.random.default_rng((recipe.seed, 2, step)), recipe.batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss, metrics = objective.loss(batch, step)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            if torch.isfinite(norm):
                optimizer.step()
            _update_average(average, module, min(recipe.ema, (1 + step) / (10 + step)))
            bar.update()
            if step % 50 == 0 or step + 1 == recipe.steps:
                row = {"step": step, "loss": float(loss.detach()), "norm": float(norm), **metrics}
                with logs.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                bar.set_postfix(loss=f"{row['loss']:.4f}", used=metrics["used"])
            seconds = before + time.monotonic() - began
            if (step + 1) % recipe.checkpoint_every == 0 and step + 1 < recipe.steps:
                _checkpoint(state_file, step + 1, seconds, module, average, optimizer)
    module.load_state_dict(average.state_dict())
    objective.codec.eval().save(out)
    state_file.unlink(missing_ok=True)
    return objective.codec, before + time.monotonic() - began


@torch.no_grad()
def _update_average(average: torch.nn.Module, module: torch.nn.Module, decay: float) -> None:
    for mean, now in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(now, 1 - decay)
    for mean, now in zip(average.buffers(), module.buffers(), strict=True):
        mean.copy_(now)


def _checkpoint(
    path: Path,
    step: int,
    seconds: float,
    module: torch.nn.Module,
    average: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    meta = {"step": str(step), "seconds": str(seconds)}
    write_atomic(path, safetensors.torch.save(tensors, metadata=meta))


def _restore(
    path: Path,
    module: torch.nn.Module,
    average: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    if not path.is_file():
        return 0, 0.0
    with safetensors.safe_open(path, "pt") as file:
        meta = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    try:
        for prefix, target in (("module.", module), ("average.", average)):
            part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            target.load_state_dict(part)
    except RuntimeError:
        raise UserError(f"{path} belongs to another recipe; remove it to start anew") from None
    saved = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            saved["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(saved)
    return int(meta["step"]), float(meta["seconds"])
