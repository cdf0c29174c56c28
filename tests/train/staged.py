"""Two steps of a staged run on one rank, then on two: `python staged.py RECIPE OUT`.

Writes `OUT/RANKS.pt`: the weights before and after, whole.
"""

import sys
from pathlib import Path

import torch
from forked import fork, joined

from mmpt.config import load_recipe
from mmpt.model.collectives import whole
from mmpt.train.pretrain import pretrainer
from mmpt.train.recipe import TrainRecipe
from mmpt.vocab import Vocabulary


def run(rank: int, count: int, recipe: TrainRecipe, out: Path) -> None:
    """As one of the ranks."""
    with joined(rank, count):
        vocabulary = Vocabulary.load(recipe.vocabulary)
        trainer = pretrainer(recipe, out / f"run-{count}", vocabulary=vocabulary)
        named = dict(trainer.model.named_parameters())
        moments = [{n: whole(p.detach()).clone() for n, p in named.items()}]
        for _ in range(2):
            trainer.step()
        moments.append({n: whole(p.detach()).clone() for n, p in named.items()})
        trainer.loader.close()
        if not rank:
            torch.save(moments, out / f"{count}.pt")


if __name__ == "__main__":
    recipe, out = load_recipe(TrainRecipe, sys.argv[1]), Path(sys.argv[2])
    for count in (1, 2):
        fork(run, count, recipe, out)
