"""Kill a training of two ranks at random steps with SIGKILL, resume it, and compare.

`python tests/train/kill_and_resume.py RECIPE OUT --points 5` (a small model, data.streams = 4):
resumed on two ranks, the weights must be bit-equal to those of a run that was not killed; on one
and on four, the rows byte-equal and the losses within 1e-5. Then experts go from 4 ranks to 1 to 2.
"""

import argparse
import json
import os
import random
import signal
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from forked import fork, joined

from mmpt.config import load_recipe
from mmpt.model.collectives import whole
from mmpt.train.checkpoint import flatten, latest
from mmpt.train.loop import Trainer
from mmpt.train.parallel import ParallelConfig
from mmpt.train.pretrain import pretrainer
from mmpt.train.recipe import TrainRecipe
from mmpt.vocab import Vocabulary


def open_run(recipe: TrainRecipe, folder: Path) -> Trainer:
    """A run whose ranks write the checksums of their rows, step by step."""
    trainer = pretrainer(recipe, folder, vocabulary=Vocabulary.load(recipe.vocabulary))
    prepare, ranks = trainer.objective.prepare, trainer.ranks
    path = folder / f"rows-{ranks.count}-{ranks.rank}.jsonl"
    path.unlink(missing_ok=True)

    def prepare_and_note(rows, generators):
        fields = (rows.ids, rows.modality, rows.document, rows.position, rows.loss_weight)
        sums = [
            zlib.crc32(b"".join(f.numpy().tobytes() for f in row))
            for row in zip(*fields, strict=True)
        ]
        with path.open("a") as file:
            file.write(json.dumps({"step": trainer.counters.step, "rows": sums}) + "\n")
        return prepare(rows, generators)

    trainer.objective.prepare = prepare_and_note
    return trainer


def train(rank: int, count: int, recipe: TrainRecipe, folder: Path, victim: int, at: int) -> None:
    """As one of the ranks; the victim is killed after step `at`."""
    folder.mkdir(parents=True, exist_ok=True)

    def kill(metrics):
        if rank == victim and metrics["step"] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    with joined(rank, count):
        open_run(recipe, folder).run(progress=False, on_step=kill)


def keep(rank: int, count: int, recipe: TrainRecipe, folder: Path, out: Path, steps: int) -> None:
    """Take steps in `folder`, and keep all weights and moments whole."""
    with joined(rank, count):
        trainer = pretrainer(recipe, folder, vocabulary=Vocabulary.load(recipe.vocabulary))
        for _ in range(steps):
            trainer.step()
        tensors = dict(trainer.model.named_parameters())
        tensors |= flatten(trainer.model, trainer.optimizer)
        kept = {name: whole(tensor.detach()).clone() for name, tensor in tensors.items()}
        trainer.save()
        if rank == 0:
            torch.save(kept, out)
        trainer.loader.close()


def rows_of(folder: Path, count: int) -> dict[int, list[list[int]]]:
    """Step -> checksums of its rows, batch by batch, in the order of the run."""
    by_rank = []
    for rank in range(count):
        steps: dict[int, list[list[int]]] = {}
        for line in (folder / f"rows-{count}-{rank}.jsonl").read_text().splitlines():
            steps.setdefault(json.loads(line)["step"], []).append(json.loads(line)["rows"])
        by_rank.append(steps)
    whole_steps = set.intersection(*map(set, by_rank))
    return {
        step: [
            [row for rows in zip(*batch, strict=True) for row in rows]
            for batch in zip(*(steps[step] for steps in by_rank), strict=True)
        ]
        for step in sorted(whole_steps)
    }


def losses_of(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def kill_and_resume(recipe: TrainRecipe, out: Path, points: int, seed: int) -> None:
    """Raises AssertionError where anything differs."""
    fork(train, 2, recipe, out / "whole", -1, 0)
    expected, rows = losses_of(out / "whole"), rows_of(out / "whole", 2)
    draw = random.Random(seed)
    for point in range(points):
        at, victim, then = draw.randrange(1, recipe.steps), draw.randrange(2), (2, 1, 4)[point % 3]
        folder = out / f"point-{point}"
        killed = fork(train, 2, recipe, folder, victim, at, check=False)
        assert killed == 2, "a rank outlived the other"
        seen = rows_of(folder, 2)
        fork(train, then, recipe, folder, -1, 0)
        same = same_tensors(latest(folder / "checkpoints"), latest(out / "whole" / "checkpoints"))
        print(f"point {point}: rank {victim} killed after step {at}, on {then} ranks: equal {same}")
        seen |= rows_of(folder, then)
        assert seen == rows
        if then == 2:
            assert same
            assert losses_of(folder) == expected
        else:
            worst = max(abs(a / b - 1) for a, b in zip(losses_of(folder), expected, strict=True))
            assert worst < 1e-5, worst


def same_tensors(one: Path, other: Path) -> bool:
    """Whether the weights and the optimisers of two checkpoints are bit-equal."""
    from mmpt.model.weights import read_tensors

    pairs = [[read_tensors(path, name) for path in (one, other)] for name in ("model", "optimizer")]
    return all(
        ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
        for ours, theirs in pairs
    )


def reshard(recipe: TrainRecipe, out: Path) -> None:
    """Experts on four ranks, then one, then two."""
    apart = replace(recipe, parallel=ParallelConfig(expert=2))
    fork(keep, 4, apart, out / "run", out / "4.pt", 3)
    fork(keep, 1, recipe, out / "run", out / "1.pt", 0)
    fork(keep, 2, apart, out / "run", out / "2.pt", 0)
    kept = [torch.load(out / f"{count}.pt", weights_only=True) for count in (4, 1, 2)]
    for other in kept[1:]:
        assert kept[0].keys() == other.keys()
        different = [key for key in other if not torch.equal(kept[0][key], other[key])]
        assert not different, different
    print(f"4 -> 1 -> 2 ranks: {len(kept[0])} tensors are bit-equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    recipe = load_recipe(TrainRecipe, arguments.recipe)
    kill_and_resume(recipe, arguments.out, arguments.points, arguments.seed)
    reshard(recipe, arguments.out / "reshard")


if __name__ == "__main__":
    sys.exit(main())
