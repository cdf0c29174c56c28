"""`mmpt bench serve MODEL`: the same requests brought to a `Server` by one client, by 4 and by 16.

Each client asks for its share of sixteen requests, one behind the other; so all clients together
take the seconds of the same work, and a ratio of throughputs is a ratio of times. Before anything
is timed it is shown that the server writes the ids that the pipeline alone writes.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mmpt.bench import harness
from mmpt.bench.harness import PARTS, Row, run_rows
from mmpt.config import UserError
from mmpt.parts import Audio
from mmpt.pipeline import Pipeline
from mmpt.results import AudioChunk, Medium, Result, TextDelta
from mmpt.serve import Server
from mmpt.vocab import Modality

CLIENTS = (1, 4, 16)
REQUESTS = 16
LIMIT = 1.0  # seconds until the first of an answer is there, of a client alone
WORDS = ("red apple", "sun", "a cat that smiles", "a blue house by the sea")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked for. unit: of throughput; first: what a client waits for."""

    name: str
    to: Medium
    unit: str
    first: str
    settings: dict[str, Any]

    def amount(self, result: Result, given: int) -> float:
        """How much an answer is, in `unit` seconds; given: ids of its prompt."""
        if self.to == "speech":
            return sum(p.wave.size / p.sample_rate for p in result.parts if isinstance(p, Audio))
        return 1.0 if self.to == "image" else float(len(result.ids) - given)


TASKS = (
    Task(name="text", to="text", unit="ids/s", first="first id", settings={"max_ids": 96}),
    Task(name="pictures", to="image", unit="pictures/s", first="picture", settings={}),
    Task(
        name="pictures in parallel",
        to="image",
        unit="pictures/s",
        first="picture",
        settings={"decoder": "dida"},
    ),
    Task(
        name="speech",
        to="speech",
        unit="s/s",
        first="first sound",
        settings={"max_seconds": 2.0},
    ),
)


@dataclass(frozen=True)
class Load:
    """One round: seconds of all requests, of each until what is waited for came."""

    seconds: float
    waits: list[float]


def serve(device: str, model: Path | None) -> list[Row]:
    """All rows of a model folder or a run, on a device."""
    if model is None:
        raise UserError("serving needs a model: mmpt bench serve runs/quickstart/model")
    pipeline = Pipeline.load(model, device=device)
    adapted = any(group.noisy for group in pipeline.model.config.groups.values())
    known = pipeline.processor.vocabulary
    chosen = [
        task
        for task in TASKS
        if (adapted or "decoder" not in task.settings) and known.has(Modality[task.to.upper()])
    ]
    with Server(pipeline) as server:
        return run_rows(row for task in chosen for row in measure(server, task, device))


def measure(server: Server, task: Task, device: str) -> Iterator[Row]:
    """Rows of a task: throughput, what a client waits for, and how evenly they wait."""
    amount = _show_equal(server, task)
    loads: dict[int, list[Load]] = {clients: [] for clients in CLIENTS}
    for number in range(harness.REPETITIONS):
        for clients in CLIENTS if number % 2 else CLIENTS[::-1]:
            loads[clients].append(_load(server, task, clients))

    def row(what: str, unit: str, ours: float, peer: float, name: str, ratios: list[float]) -> Row:
        dtype = {"float32": "fp32", "bfloat16": "bf16"}
        weights = str(server.pipeline.model.embedding.dtype).removeprefix("torch.")
        return Row(
            case=what,
            device=device,
            dtype=dtype.get(weights, weights),
            unit=unit,
            ours=ours,
            peer=peer,
            peer_name=name,
            ratio=ratios[0],
            low=min(ratios),
            high=max(ratios),
        )

    def best(clients: int, of: Any) -> list[float]:
        """The best of all rounds, and of each of their parts."""
        values = [of(load) for load in loads[clients]]
        return [min(values), *(min(values[i::PARTS] or values) for i in range(PARTS))]

    alone = best(1, lambda load: load.seconds)
    waited = best(1, lambda load: median(load.waits))
    for clients in CLIENTS:
        case = f"{task.name}, {clients} clients" if clients > 1 else f"{task.name}, 1 client"
        taken = best(clients, lambda load: load.seconds)
        waits = best(clients, lambda load: median(load.waits))
        if clients == 1:
            yield row(
                f"{case}, {task.first}",
                "s",
                waits[0],
                LIMIT,
                "limit",
                _over([LIMIT] * len(waits), waits),
            )
            continue
        ours, peer = amount / taken[0], amount / alone[0]
        yield row(case, task.unit, ours, peer, "1 client", _over(alone, taken))
        yield row(
            f"{case}, {task.first}", "s", waits[0], waited[0], "1 client", _over(waited, waits)
        )
        uneven = best(clients, lambda load: max(load.waits) / median(load.waits))
        what = f"{case}, longest wait over median"
        yield row(what, "-", uneven[0], 1.0, "all wait alike", _over([1.0] * len(uneven), uneven))


def _over(peers: Sequence[float], ours: Sequence[float]) -> list[float]:
    return [theirs / own for theirs, own in zip(peers, ours, strict=True)]


def _asked(task: Task, number: int) -> tuple[str, dict[str, Any]]:
    return WORDS[number % len(WORDS)], {"to": task.to, "seed": number} | task.settings


def _show_equal(server: Server, task: Task) -> float:
    """Raises RuntimeError where the server writes other ids; how much all requests are."""
    total = 0.0
    with ThreadPoolExecutor(REQUESTS) as threads:

        def ask(number: int) -> Result:
            items, options = _asked(task, number)
            return server(items, **options)

        found = list(threads.map(ask, range(REQUESTS)))
    for number, result in enumerate(found):
        items, options = _asked(task, number)
        alone = server.pipeline(items, **options)
        if not np.array_equal(alone.ids, result.ids):
            raise RuntimeError(f"{task.name}: request {number} has other ids than alone")
        given = server.pipeline.processor.text.encode(items)
        total += task.amount(result, 1 + len(given))
    return total


def _load(server: Server, task: Task, clients: int) -> Load:
    waits: list[float] = []

    def client(place: int) -> None:
        for number in range(place, REQUESTS, clients):
            items, options = _asked(task, number)
            begun, first = time.perf_counter(), None
            # pictures are waited for as a whole: previews would have to be decoded
            events = [server(items, **options)] if task.to == "image" else None
            for event in events or server.stream(items, **options):
                if first is None and isinstance(event, TextDelta | AudioChunk | Result):
                    first = time.perf_counter() - begun
            assert first is not None  # the last event is the result
            waits.append(first)

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients)))
    return Load(time.perf_counter() - began, waits)
