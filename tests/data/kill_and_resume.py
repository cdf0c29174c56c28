"""A loader is killed with SIGKILL at random points and goes on with other ranks and workers.

    python tests/data/kill_and_resume.py --points 50

Its rows must equal those of a loader that nobody killed, byte for byte. Rows are compared by their
sha256, which the loader's process writes down before it saves the state that follows them.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmpt.config import write_atomic
from mmpt.data.loader import DataConfig, Loader, SourceConfig, Stage, merge_states
from mmpt.data.tokens import EncodedDocument, ShardWriter
from mmpt.stream import Rows, Segment
from mmpt.vocab import Modality, Vocabulary

SEED = 7
FIELDS = ("ids", "modality", "document", "position", "loss_weight")
RANKS, WORKERS = (1, 2, 3, 4), (0, 1, 2, 3)
SAVE_EVERY = 3  # batches


def make_data(folder: Path) -> tuple[DataConfig, Vocabulary]:
    """Two sources of random documents of text, pictures and speech."""
    vocabulary = Vocabulary.build(
        num_text=300,
        text_fingerprint="text",
        codebooks=[
            ("visual", 64, {"image": "image"}, None),
            ("speech", 512, {"speech": "speech"}, None),
        ],
    )
    rng = np.random.default_rng(SEED)
    for name, number in (("a-0", 150), ("a-1", 60), ("b-0", 90)):
        path = folder / f"{name}.tokens.tar"
        with ShardWriter(path, vocabulary, separator=[10], documents_per_block=32) as writer:
            for index in range(number):
                key = f"{name}-{index}"
                writer.add(EncodedDocument(key, key, "any", list(_segments(rng))))
            writer.finish()
    sources = {
        "a": SourceConfig(shards=(str(folder / "a-*.tokens.tar"),), weight=2.0),
        "b": SourceConfig(shards=(str(folder / "b-0.tokens.tar"),)),
    }
    ramp = Stage(start=0, ramp=600, unit="rows", weights={"b": 3.0})
    config = DataConfig(
        sources=sources, schedule=(ramp,), rows=12, length=128, buffer=24, streams=12
    )
    return config, vocabulary


def _segments(rng: np.random.Generator) -> Iterator[Segment]:
    for _ in range(rng.integers(1, 5)):
        yield Segment(Modality.TEXT, rng.integers(0, 300, rng.integers(1, 60)))
        yield Segment(Modality.IMAGE, rng.integers(0, 64, (4, 4)))
        yield Segment(Modality.SPEECH, rng.integers(0, 512, rng.integers(1, 70)))


def hashes(batch: Rows) -> list[str]:
    """sha256 of each row: all its fields, and its part of the span table."""
    out = []
    for row in range(len(batch.ids)):
        spans = batch.spans[batch.spans[:, 0] == row, 1:]
        parts = [getattr(batch, name)[row] for name in FIELDS]
        payload = b"".join(part.numpy().tobytes() for part in [*parts, spans])
        out.append(hashlib.sha256(payload).hexdigest())
    return out


def open_ranks(
    config: DataConfig, vocabulary: Vocabulary, ranks: int, state: dict | None
) -> list[Loader]:
    """A loader a rank, gone on from a state of all."""
    loaders = [
        Loader(config, vocabulary, seed=SEED, rank=rank, num_ranks=ranks) for rank in range(ranks)
    ]
    for loader in loaders if state else ():
        loader.load_state_dict(state or {})
    return loaders


def global_rows(loaders: Sequence[Loader]) -> list[str]:
    """The hashes of the next batch's rows in the order of the run: rank r has every W-th."""
    parts = [hashes(next(loader)) for loader in loaders]
    return [row for together in zip(*parts, strict=True) for row in together]


def read_on(folder: Path, config: DataConfig, vocabulary: Vocabulary, ranks: int) -> None:
    """Read for ever from the last saved state, writing down rows and states."""
    saved = folder / "state.json"
    state = json.loads(saved.read_text()) if saved.exists() else None
    loaders = open_ranks(config, vocabulary, ranks, state)
    log = folder / "rows.txt"
    kept = log.read_text().splitlines(keepends=True)[: state["rows"] if state else 0]
    log.write_text("".join(kept))
    with log.open("a") as sink:
        for batch in range(1, 1 << 30):
            sink.write("".join(f"{row}\n" for row in global_rows(loaders)))
            sink.flush()
            if batch % SAVE_EVERY == 0:
                state = merge_states([loader.state_dict() for loader in loaders])
                write_atomic(saved, json.dumps(state))


def kill_and_resume(
    folder: Path, plans: Sequence[tuple[int, int]], *, seed: int = 0
) -> Iterator[tuple[int, int]]:
    """Read by each (ranks, workers) of `plans` until killed; then compare all rows.

    Yields (rows, wrong rows) that were written down when each was killed.
    """
    config, vocabulary = make_data(folder)
    [whole] = open_ranks(config, vocabulary, 1, None)
    truth: list[str] = []
    random_points = random.Random(seed)
    log = folder / "rows.txt"
    log.write_text("")
    context = multiprocessing.get_context("fork")
    for ranks, workers in plans:
        more = replace(config, workers=workers)
        reader = context.Process(target=read_on, args=(folder, more, vocabulary, ranks))
        begun = log.stat().st_size
        reader.start()
        wanted = begun + 65 * config.rows * random_points.randint(1, 3 * SAVE_EVERY)
        while log.stat().st_size < wanted and reader.is_alive():
            time.sleep(0.002)
        time.sleep(random_points.random() * 0.02)
        assert reader.is_alive(), f"the loader ended by itself: {reader.exitcode}"
        reader.kill()
        reader.join()
        rows = log.read_text().splitlines()
        if rows and len(rows[-1]) < 64:
            rows.pop()  # killed in the middle of a line
        while len(truth) < len(rows):
            truth += global_rows([whole])
        yield len(rows), sum(a != b for a, b in zip(rows, truth, strict=False))


def main() -> int:
    """Exit status 1 when a row differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--points", type=int, default=50, help="how often it is killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    plans: list[tuple[int, int]] = []
    while len(plans) < options.points:
        plan = rng.choice(RANKS), rng.choice(WORKERS)
        if not plans or (plan[0] != plans[-1][0] and plan[1] != plans[-1][1]):
            plans.append(plan)
    with tempfile.TemporaryDirectory() as folder:
        total = 0
        results = kill_and_resume(Path(folder), plans, seed=options.seed)
        for point, (ranks, workers) in enumerate(plans, start=1):
            rows, wrong = next(results)
            total += wrong
            print(f"{point}: {ranks} ranks x {workers} workers, {rows} rows, {wrong} differ")
    return 1 if total else 0


if __name__ == "__main__":
    raise SystemExit(main())
