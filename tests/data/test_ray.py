"""Tasks in Ray actors: done as in processes, and token shards are the same bytes."""

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data.ray_workers import run_tasks
from mmpt.data.workers import Died, Done, Progress

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    yield "auto"
    ray.shutdown()


def add(state: int, task: int, report: Callable[[int], None]) -> tuple[int, int]:
    report(1)
    report(2)
    return state + task, os.getpid()


def die_once(folder: str, task: int, report: Callable[[int], None]) -> int:
    mark = Path(folder) / f"tried-{task}"
    if task == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def fail(state: type[BaseException], task: str, report: Callable[[int], None]) -> None:
    raise state(f"no {task}")


def linger(folder: str, task: int, report: Callable[[int], None]) -> None:
    (Path(folder) / str(os.getpid())).touch()
    report(1)
    time.sleep(60)


class FragileProcessor:
    """Encodes as another one does; the first process that gets to its second batch dies."""

    def __init__(self, inner: Any, folder: Path) -> None:
        self.vocabulary, self.separator = inner.vocabulary, inner.separator
        self.max_side, self._inner, self._mark = inner.max_side, inner, folder / "died"
        self._calls = 0

    def to(self, device: str) -> None:
        self._inner.to(device)

    def encode_batch(self, documents: Sequence[Any]) -> list[Any]:
        self._calls += 1
        if self._calls == 2 and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._inner.encode_batch(documents)


def run(address: str, *job: Any, workers: int = 2) -> list[Any]:
    return list(run_tasks(*job, workers=workers, address=address))


@pytest.mark.parametrize(
    ("where", "why"),
    [("ray://host:10001", "use HOST:PORT"), ("127.0.0.1:1", "no Ray at"), ("host", "no Ray at")],
)
def test_an_address_without_a_cluster_is_one_line(where: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        run(where, add, 100, [1])


def test_every_task_is_done_once_by_few_actors(address: str) -> None:
    events = run(address, add, 100, list(range(9)))
    done = [event for event in events if isinstance(event, Done)]
    assert sorted(event.number for event in done) == list(range(9))
    assert all(event.result[0] == 100 + event.number for event in done)
    assert 1 <= len({event.result[1] for event in done} - {os.getpid()}) <= 2
    assert sum(event.count for event in events if isinstance(event, Progress)) == 27
    assert run(address, add, 100, []) == []


def test_an_actor_that_dies_is_replaced_and_its_task_is_done_again(
    address: str, tmp_path: Path
) -> None:
    events = run(address, die_once, str(tmp_path), [0, 1, 2])
    [died] = [event for event in events if isinstance(event, Died)]
    assert died.number == 1
    assert died.pid > 0
    assert Counter(event.result for event in events if isinstance(event, Done)) == {
        0: 1,
        1: 1,
        2: 1,
    }


def test_a_task_that_ends_every_actor_is_named(address: str) -> None:
    with pytest.raises(UserError, match=r"3 workers died over raw\.tar \(.*actor died"):
        run(address, fail, SystemExit, ["raw.tar"], workers=1)


def test_errors_of_a_task_come_out_here(address: str) -> None:
    with pytest.raises(UserError, match="no luck"):
        run(address, fail, UserError, ["luck"], workers=1)
    with pytest.raises(RuntimeError, match="ZeroDivisionError: no luck"):
        run(address, fail, ZeroDivisionError, ["luck"], workers=1)


def test_no_actor_outlives_the_caller(address: str, tmp_path: Path) -> None:
    events = run_tasks(linger, str(tmp_path), [0, 1], workers=2, address=address)
    for _ in range(2):  # both have begun
        next(events)
    pids = {int(path.name) for path in tmp_path.iterdir()}
    assert len(pids) == 2
    events.close()
    until = time.monotonic() + 10
    while pids and time.monotonic() < until:
        pids = {pid for pid in pids if Path(f"/proc/{pid}").exists()}
    assert not pids


def test_actors_write_what_processes_write_and_one_may_die(
    address: str, zoo: Path, tmp_path: Path
) -> None:
    # here, because actors import this module, and those above need none of it
    from mmpt.data.encode import encode_shards
    from mmpt.data.shards import Document, write_shard
    from mmpt.parts import Image, Text
    from mmpt.processor import Processor

    rng = np.random.default_rng(0)
    raws = [tmp_path / f"raw-{number}.tar" for number in (6, 4)]
    for raw, number in zip(raws, (6, 4), strict=True):
        pixels = rng.integers(0, 256, (number, 8, 8, 3), dtype=np.uint8)
        documents = [
            Document(f"d-{n}", f"d-{n}", "any", [Text(f"a red {n}"), Image(pixels[n])])
            for n in range(number)
        ]
        write_shard(raw, documents)
    processor = Processor.load([str(zoo / name) for name in ("text", "image")], max_side=16)
    options: dict[str, Any] = {"augment": True, "progress": False, "batch": 2}
    alone = encode_shards(raws, tmp_path / "alone", processor, **options)
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "raw-6.tokens.tar.1.tmp").touch()  # of a command that was killed
    fragile = FragileProcessor(processor, tmp_path)
    apart = encode_shards(raws, tmp_path / "apart", fragile, workers=2, ray=address, **options)
    assert (tmp_path / "died").exists()
    assert (apart.workers, apart.documents) == (2, 10)
    files = {path.name: path.read_bytes() for path in (tmp_path / "apart").iterdir()}
    assert files == {path.name: path.read_bytes() for path in alone.shards}
