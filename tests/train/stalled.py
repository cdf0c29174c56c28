"""Two ranks, one of which sleeps in its objective: `python tests/train/stalled.py RECIPE OUT`.

OUT/log is what the first rank logs. The sleeper is the last rank.
"""

import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from forked import fork, joined

from mmpt.config import load_recipe
from mmpt.train.guard import GuardConfig
from mmpt.train.pretrain import pretrainer
from mmpt.train.recipe import TrainRecipe
from mmpt.vocab import Vocabulary

STALL = 0.5


def run(rank: int, count: int, recipe: TrainRecipe, out: Path) -> None:
    """Three steps; the last rank falls asleep in the second."""
    if rank == 0:
        logging.basicConfig(filename=out / "log", level=logging.WARNING, force=True)
    with joined(rank, count):
        trainer = pretrainer(recipe, out / "run", vocabulary=Vocabulary.load(recipe.vocabulary))
        losses = trainer.objective.losses

        def sleep_and_score(model, batch):
            if rank == count - 1 and trainer.counters.step == 1:
                (out / "pid").write_text(str(os.getpid()))
                time.sleep(4 * STALL)
            return losses(model, batch)

        trainer.objective.losses = sleep_and_score
        trainer.run(progress=False)


def main() -> None:
    recipe, out = load_recipe(TrainRecipe, sys.argv[1]), Path(sys.argv[2])
    out.mkdir()
    fork(run, 2, replace(recipe, steps=3, guard=GuardConfig(stall=STALL)), out)


if __name__ == "__main__":
    main()
