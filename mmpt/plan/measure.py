"""The plan beside what happens: the recipe's model on 1, 2 and 4 processes of this machine.

Rows are random documents of all media; the model, the optimiser and the loop are the real ones.
"""

import json
import os
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from mmpt.config import UserError
from mmpt.data.loader import SourceConfig
from mmpt.data.tokens import EncodedDocument, ShardWriter
from mmpt.model.collectives import local
from mmpt.plan.calibrate import core_share, quiet, start, this_machine
from mmpt.plan.memory import gb, memory
from mmpt.plan.report import Report
from mmpt.plan.timing import seconds
from mmpt.plan.traffic import Layout, messages
from mmpt.plan.workload import Workload
from mmpt.process import one_thread
from mmpt.stream import Segment
from mmpt.train.loop import Trainer
from mmpt.train.pretrain import pretrainer
from mmpt.train.recipe import TrainRecipe, fit_model
from mmpt.vocab import MEDIA, Modality, Vocabulary

CASES: tuple[tuple[int, dict[str, int]], ...] = ((1, {}), (2, {}), (2, {"expert": 2}), (4, {}))
RANKS = 4  # at most; rows and streams are multiples of it
WARM, STEPS = 1, 6  # steps before, and those of which the best counts
NUMBERS = 4096  # bytes: what is smaller are single numbers, of which the plan says nothing
# collectives of torch -> kind, and the argument whose bytes count
COUNTED = {
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::alltoall_base_": ("all-to-all", 1),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", 0),  # of what each rank has
}


class Counted(TorchDispatchMode):
    """Bytes of the collectives that this process enters, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if found := COUNTED.get(func.name().split(".")[0]):
            kind, place = found
            tensors = args[place] if isinstance(args[place], list | tuple) else [args[place]]
            size = sum(tensor.nbytes for tensor in tensors)
            size *= args[1] if func.namespace == "_c10d_functional" else 1
            if kind != "all-reduce" or size > NUMBERS:
                self.bytes[kind] += size
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Measured:
    """Of one case. bytes: of the tensors of collectives, over all ranks.

    seconds: the best step by the clock on the wall, work_seconds: by that of the first rank's
    process, which stands still while others use the core. memory: bytes of its tensors at the
    fullest moment. mix: of the counted step, shares of all ids; the rest are pads.
    """

    seconds: float
    work_seconds: float
    bytes: dict[str, int]
    memory: int
    mix: dict[Modality, float]


def compare(recipe: TrainRecipe, cases: Sequence[tuple[int, dict[str, int]]] = CASES) -> Report:
    """Predicted and measured steps; UserError where they cannot be run here."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, quiet(), one_thread():
        recipe = prepare(recipe, Path(folder))
        for count, sides in cases:
            rows.append(_compare(recipe, count, sides, Path(folder) / f"case-{len(rows)}"))
    pairs = {"work s": "work seconds", "step s": "seconds", "memory GB": "memory"}
    head = "".join(f"{name:>10}{'planned':>9}" for name in [*pairs, "sent MB"])
    lines = [f"{'ranks':12}{head}"]
    for row in rows:
        scale = {"memory": 1e9}
        values = [
            (row[n] / scale.get(n, 1), row[f"planned {n}"] / scale.get(n, 1))
            for n in pairs.values()
        ]
        sent = [sum(row[name].values()) / 1e6 for name in ("bytes", "planned bytes")]
        values.append((sent[0], sent[1]))
        lines.append(f"{row['layout']:12}" + "".join(f"{x:>10.4g}{y:>9.4g}" for x, y in values))
    return Report({"cases": rows}, lines)


def prepare(recipe: TrainRecipe, folder: Path) -> TrainRecipe:
    """The recipe on random documents, with a vocabulary of the same size, for processes here."""
    size = max(recipe.model.vocab_size, 2048)
    vocabulary = _vocabulary(size - len(_vocabulary(1)) + 1)
    path = folder / "vocabulary.json"
    vocabulary.save(path)
    shard = folder / "random.tokens.tar"
    with ShardWriter(shard, vocabulary) as writer:
        for document in _documents(512, vocabulary):
            writer.add(document)
        writer.finish()
    rows = -(-recipe.data.rows // RANKS) * RANKS
    sources = {"random": SourceConfig(shards=(str(shard),))}
    data = replace(recipe.data, rows=rows, streams=RANKS, sources=sources, workers=0)
    return replace(
        recipe,
        data=data,
        vocabulary=str(path),
        model=fit_model(recipe.model, vocabulary),
        steps=10_000,
        checkpoint_every=10_000,
        device="cpu",
        codes_from=(),
        start="",
    )


def measure(recipe: TrainRecipe, count: int, folder: Path, *, steps: int = STEPS) -> Measured:
    """Run the recipe's layout of so many processes; the best of so many steps counts."""
    folder.mkdir(parents=True)
    start(_train, count, recipe, folder, steps)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    total: dict[str, int] = defaultdict(int)
    for rank in ranks:
        for kind, size in rank["bytes"].items():
            total[kind] += size
    # ranks that share tensors read the same rows
    ids = recipe.accumulate * recipe.data.rows * recipe.data.length * recipe.parallel.tensor
    counts = np.sum([rank["counts"] for rank in ranks], axis=0)
    mix = {m: counts[m] / ids for m in Modality}
    best, working = (min(ranks[0][name]) for name in ("seconds", "work_seconds"))
    return Measured(best, working, dict(total), ranks[0]["memory"], mix)


def planned_bytes(work: Workload, layout: Layout) -> dict[str, float]:
    """As `Measured.bytes`."""
    total: dict[str, float] = defaultdict(float)
    for message in messages(work, layout):
        if message.kind != "all-reduce" or message.bytes > NUMBERS:
            total[message.kind] += message.count * message.bytes
    return {kind: size * layout.num_data * layout.tensor for kind, size in total.items()}


def _compare(
    recipe: TrainRecipe, count: int, sides: dict[str, int], folder: Path
) -> dict[str, Any]:
    whole = {"replicate": 1, "expert": 1, "tensor": 1}
    recipe = replace(recipe, parallel=replace(recipe.parallel, **whole | sides))
    recipe.parallel.check(recipe.model, count)
    layout = Layout.of(recipe.parallel, count)
    _check_room(recipe, layout, count)
    found = measure(recipe, count, folder)
    work = Workload.of(recipe, found.mix)
    planned = seconds(work, layout, this_machine(work, processes=count))
    return {
        "layout": f"{count}" + "".join(f" {name} {size}" for name, size in sides.items()),
        "seconds": found.seconds,
        "planned seconds": planned.step,
        "work seconds": found.work_seconds,
        "planned work seconds": (planned.compute + planned.optimizer) * core_share(count),
        "planned parts": planned.rounded(),
        "memory": found.memory,
        "planned memory": memory(work, layout).peak,
        "bytes": found.bytes,
        "planned bytes": planned_bytes(work, layout),
    }


def _check_room(recipe: TrainRecipe, layout: Layout, count: int) -> None:
    needed = count * memory(Workload.of(recipe), layout).peak
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * needed > there:
        raise UserError(
            f"{count} processes of this recipe take {gb(needed)} GB, of {gb(there)} here; make it "
            "smaller by overrides, such as model.num_layers=2 data.rows=4"
        )


def _train(recipe: TrainRecipe, folder: Path, steps: int) -> None:
    vocabulary = Vocabulary.load(recipe.vocabulary)
    trainer = pretrainer(recipe, folder / "run", vocabulary=vocabulary)
    times, working = [], []
    for _ in range(WARM + steps):
        began = time.process_time()
        times.append(trainer.step()["step_seconds"])
        working.append(time.process_time() - began)
    counts = np.zeros(len(Modality), dtype=np.int64)
    prepare = trainer.objective.prepare

    def count(rows: Any, generators: Any) -> Any:
        there = rows.modality[rows.document >= 0]
        counts[:] += np.bincount(there.flatten().numpy(), minlength=len(counts))
        return prepare(rows, generators)

    trainer.objective.prepare = count  # type: ignore[method-assign] # to see what it is given
    with Counted() as counted:
        trainer.step()
    trainer.objective.prepare = prepare  # type: ignore[method-assign]
    result = {
        "seconds": times[WARM:],
        "work_seconds": working[WARM:],
        "bytes": counted.bytes,
        "memory": _fullest(trainer),
        "counts": counts.tolist(),
    }
    trainer.loader.close()
    (folder / f"{trainer.ranks.rank}.json").write_text(json.dumps(result))


def _fullest(trainer: Trainer) -> int:
    """Bytes of tensors at the fullest moment of a step: what stays, and what comes and goes."""
    states = (value for each in trainer.optimizer.state.values() for value in each.values())
    average = trainer.average.state_dict().values() if trainer.average else ()
    tensors = [*trainer.model.parameters(), *states, *average]
    stays = sum(local(tensor).nbytes for tensor in tensors)
    os.environ["KINETO_LOG_LEVEL"] = "9"  # of machines without a GPU it says so
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.step()
    results: Any = profiler.profiler and profiler.profiler.kineto_results  # hardly typed
    events = (event for event in results.events() if event.name() == "[memory]")
    changes = sorted((event.start_ns(), event.nbytes()) for event in events)
    return stays + max(accumulate(change for _, change in changes))


def _vocabulary(num_text: int) -> Vocabulary:
    books = [
        ("visual", 64, {"image": "random", "video": "random-video"}, None),
        ("speech", 64, {"speech": "random"}, None),
    ]
    return Vocabulary.build(num_text=num_text, text_fingerprint="random", codebooks=books)


def _documents(number: int, vocabulary: Vocabulary) -> list[EncodedDocument]:
    """Each of one medium, of about a hundred codes."""
    draw = np.random.default_rng(0)
    shapes = {
        Modality.TEXT: (120,),
        Modality.IMAGE: (8, 8),
        Modality.VIDEO: (2, 6, 6),
        Modality.SPEECH: (100,),
    }
    num_text = len(vocabulary) - len(_vocabulary(1)) + 1
    documents = []
    for index in range(number):
        modality = Modality(index % len(Modality))
        highest = 64 if modality in MEDIA else num_text
        codes = draw.integers(0, highest, shapes[modality])
        segments = [Segment(modality, codes)]
        documents.append(EncodedDocument(f"{index}", f"{index}", "fixed", segments))
    return documents
