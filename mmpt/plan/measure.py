"""The plan beside what happens: the recipe's model on 1, 2 and 4 processes of this machine.

Rows are random documents of all media; the model, the optimiser and the loop are the real ones.
"""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

from mmpt.data.loader import SourceConfig
from mmpt.data.tokens import EncodedDocument, ShardWriter
from mmpt.plan.calibrate import quiet, start, this_machine
from mmpt.plan.memory import memory
from mmpt.plan.report import Report
from mmpt.plan.timing import seconds
from mmpt.plan.traffic import Layout, messages
from mmpt.plan.workload import Workload
from mmpt.process import one_thread
from mmpt.stream import Segment
from mmpt.train.loop import pretrainer
from mmpt.train.recipe import TrainRecipe, fit_model
from mmpt.vocab import MEDIA, Modality, Vocabulary

CASES: tuple[tuple[int, dict[str, int]], ...] = ((1, {}), (2, {}), (2, {"expert": 2}), (4, {}))
RANKS = 4  # at most; rows and streams are multiples of it
STEPS = 6  # of which the best counts; two more warm up
NUMBERS = 4096  # bytes: what is smaller are single numbers, of which the plan says nothing
# collectives of torch -> kind, and the argument whose bytes count
COUNTED = {
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::alltoall_base_": ("all-to-all", 1),
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
            if kind != "all-reduce" or size > NUMBERS:
                self.bytes[kind] += size
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Measured:
    """Of one case. seconds: the best step. bytes: of the tensors of collectives, over all ranks.

    memory: bytes by which the first rank grew at its fullest. mix: of the counted step, shares of
    all ids; the rest are pads.
    """

    seconds: float
    bytes: dict[str, int]
    memory: int
    mix: dict[Modality, float]


def compare(recipe: TrainRecipe, cases: Sequence[tuple[int, dict[str, int]]] = CASES) -> Report:
    """Predicted and measured steps of every case that the model can be divided into."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, quiet(), one_thread():
        recipe = prepare(recipe, Path(folder))
        for count, sides in cases:
            rows.append(_compare(recipe, count, sides, Path(folder) / f"case-{len(rows)}"))
    lines = [
        f"{'ranks':14}{'step s':>9}{'planned':>9}{'ratio':>7}{'memory GB':>11}{'planned':>9}"
        f"{'sent and received, MB':>24}{'planned':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row['layout']:14}{row['seconds']:>9.3g}{row['planned seconds']:>9.3g}"
            f"{row['planned seconds'] / row['seconds']:>7.2f}"
            f"{row['memory'] / 1e9:>11.3g}{row['planned memory'] / 1e9:>9.3g}"
            f"{sum(row['bytes'].values()) / 1e6:>24.6g}"
            f"{sum(row['planned bytes'].values()) / 1e6:>9.6g}"
        )
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


def measure(recipe: TrainRecipe, count: int, folder: Path) -> Measured:
    """Run the recipe's layout of so many processes."""
    folder.mkdir(parents=True)
    start(_train, count, recipe, folder)
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    total: dict[str, int] = defaultdict(int)
    for rank in ranks:
        for kind, size in rank["bytes"].items():
            total[kind] += size
    ids = recipe.accumulate * recipe.data.rows * recipe.data.length
    counts = np.sum([rank["counts"] for rank in ranks], axis=0)
    mix = {m: counts[m] / ids for m in Modality}
    return Measured(min(ranks[0]["seconds"]), dict(total), ranks[0]["memory"], mix)


def planned_bytes(work: Workload, layout: Layout) -> dict[str, float]:
    """As `Measured.bytes`."""
    total: dict[str, float] = defaultdict(float)
    for message in messages(work, layout):
        total[message.kind] += message.count * message.bytes
    return {kind: size * layout.num_data * layout.tensor for kind, size in total.items()}


def _compare(
    recipe: TrainRecipe, count: int, sides: dict[str, int], folder: Path
) -> dict[str, Any]:
    recipe = replace(recipe, parallel=replace(recipe.parallel, **sides))
    layout = Layout.of(recipe.parallel, count)
    found = measure(recipe, count, folder)
    work = Workload.of(recipe, found.mix)
    planned = seconds(work, layout, this_machine(work, processes=count))
    return {
        "layout": f"{count}" + "".join(f" {name} {size}" for name, size in sides.items()),
        "seconds": found.seconds,
        "planned seconds": planned.step,
        "planned parts": planned.rounded(),
        "memory": found.memory,
        "planned memory": memory(work, layout).peak,
        "bytes": found.bytes,
        "planned bytes": planned_bytes(work, layout),
    }


def _train(recipe: TrainRecipe, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    before = _reset_peak()
    trainer = pretrainer(recipe, folder / "run", vocabulary=Vocabulary.load(recipe.vocabulary))
    times = [trainer.step()["step_seconds"] for _ in range(STEPS + 2)]
    peak = _memory("VmHWM")
    counts = np.zeros(len(Modality), dtype=np.int64)
    prepare = trainer.objective.prepare

    def count(rows: Any, generators: Any) -> Any:
        there = rows.modality[rows.document >= 0]
        counts[:] += np.bincount(there.flatten().numpy(), minlength=len(counts))
        return prepare(rows, generators)

    trainer.objective.prepare = count  # type: ignore[method-assign] # to see what it is given
    with Counted() as counted:
        trainer.step()
    trainer.loader.close()
    result = {
        "seconds": times[2:],
        "bytes": counted.bytes,
        "memory": peak - before,
        "counts": counts.tolist(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))


def _reset_peak() -> int:
    """Bytes that this process holds now, from which its peak is counted on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is that of the process so far
        pass
    return _memory("VmRSS")


def _memory(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


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
