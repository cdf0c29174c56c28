"""What ranks of several layouts find when they evaluate, and how they train on after it.

`python evaluated.py RECIPE OUT` writes `OUT/NAME-RANK.json`: the findings, and the loss after.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from forked import fork, joined

from mmpt.config import load_recipe
from mmpt.train.parallel import ParallelConfig
from mmpt.train.pretrain import pretrainer
from mmpt.train.recipe import TrainRecipe
from mmpt.vocab import Vocabulary

LAYOUTS = {1: {"one": {}}, 2: {"two": {}, "experts": {"expert": 2}, "tensors": {"tensor": 2}}}


def run(rank: int, count: int, recipe: TrainRecipe, out: Path) -> None:
    with joined(rank, count):
        for name, layout in LAYOUTS[count].items():
            laid_out = replace(recipe, parallel=ParallelConfig(**layout))
            vocabulary = Vocabulary.load(recipe.vocabulary)
            trainer = pretrainer(laid_out, out / name, vocabulary=vocabulary)
            trainer.step()
            assert trainer.watching.evaluation is not None
            found = trainer.watching.evaluation.measure(trainer.model)
            after = trainer.step()
            trainer.loader.close()
            result = {"found": found, "loss": after["loss"], "load": after["load"]}
            (out / f"{name}-{rank}.json").write_text(json.dumps(result))


def main() -> None:
    recipe, out = load_recipe(TrainRecipe, sys.argv[1]), Path(sys.argv[2])
    for count in LAYOUTS:
        fork(run, count, recipe, out)


if __name__ == "__main__":
    main()
