"""Three steps of a small model as one rank of several, by layouts that so many ranks can have.

`python golden.py RECIPE OUT CASES.json` writes `OUT/LAYOUT-RANKS-OPTIMISER-RANK.pt` for each:
losses and the gradients of the first step, whole, and which media each rank saw.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forked import fork, joined

from mmpt.config import load_recipe
from mmpt.model.collectives import whole
from mmpt.model.transformer import Decoder
from mmpt.train.adapt import adapter
from mmpt.train.loop import Trainer
from mmpt.train.parallel import ParallelConfig
from mmpt.train.pretrain import pretrainer
from mmpt.train.recipe import AdaptRecipe, TrainRecipe
from mmpt.vocab import Vocabulary

STEPS = 3
SHARED = ("data", "steps", "vocabulary", "optim", "loss_weights", "accumulate", "seed", "parallel")


def open_run(recipe: TrainRecipe, folder: Path, kind: str) -> Trainer:
    """Pretraining, or one of the two kinds of adaptation."""
    vocabulary = Vocabulary.load(recipe.vocabulary)
    if kind in ("sgd", "adamw"):
        return pretrainer(recipe, folder, vocabulary=vocabulary)
    shared = {name: getattr(recipe, name) for name in SHARED}
    weight = 0.5 if kind == "joint" else 0.0
    start = str(folder.parent / "model")
    adapting = AdaptRecipe(**shared, start=start, max_noisy=24, autoregressive=weight)
    return adapter(adapting, folder, vocabulary=vocabulary)


def three_steps(recipe: TrainRecipe, folder: Path, kind: str) -> dict[str, object]:
    """What they gave."""
    trainer = open_run(recipe, folder, kind)
    if kind != "adamw":
        trainer.optimizer = torch.optim.SGD(
            [{"params": trainer.model.parameters()}], lr=1.0, foreach=False
        )
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        if not gradients:
            for name, parameter in trainer.model.named_parameters():
                if not parameter.requires_grad:
                    continue
                assert parameter.grad is not None, name
                gradients[name] = whole(parameter.grad).clone()

    trainer.optimizer.register_step_pre_hook(keep)
    media, losses, norms = [], [], []
    prepare = trainer.objective.prepare

    def prepare_and_note(rows, generators):
        media.append(sorted(set(rows.modality[rows.document >= 0].tolist())))
        return prepare(rows, generators)

    trainer.objective.prepare = prepare_and_note
    for _ in range(STEPS):
        row = trainer.step()
        media_losses = (
            row["modality"] | {f"noisy {m}": v for m, v in row["noisy"].items()}
        ).values()
        losses.append([row["loss"], *(medium["loss"] for medium in media_losses)])
        norms.append(row["grad_norm"])
    weights = {name: whole(p.detach()).clone() for name, p in trainer.model.named_parameters()}
    trainer.loader.close()
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "weights": weights,
        "media": media,
        **{name: row[name] for name in ("load", "share", "flops", "router")},
    }


def run(
    rank: int,
    count: int,
    cases: list[tuple[str, dict[str, Any], int, str]],
    recipe: TrainRecipe,
    out: Path,
) -> None:
    """The cases of `count` ranks, as one of them."""
    with joined(rank, count):
        for name, layout, _, kind in cases:
            laid_out = replace(recipe, parallel=ParallelConfig(**layout))
            result = three_steps(laid_out, out / f"{name}-{count}-{kind}", kind)
            torch.save(result, out / f"{name}-{count}-{kind}-{rank}.pt")


def main() -> None:
    recipe, out = load_recipe(TrainRecipe, sys.argv[1]), Path(sys.argv[2])
    cases = json.loads(Path(sys.argv[3]).read_text())
    Decoder.from_config(recipe.model, seed=recipe.seed).save(out / "model")
    for count in sorted({case[2] for case in cases}):
        fork(run, count, [case for case in cases if case[2] == count], recipe, out)


if __name__ == "__main__":
    main()
