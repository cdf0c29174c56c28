"""Tasks in processes: all are done once, the dead are replaced, and nothing outlives the caller."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mmpt.config import UserError
from mmpt.data.workers import Died, Done, Progress, run_tasks


def add(state: int, task: int, report: Callable[[int], None]) -> tuple[int, int]:
    report(1)
    report(2)
    return state + task, os.getpid()


def die_once(folder: str, task: int, report: Callable[[int], None]) -> int:
    mark = Path(folder) / f"tried-{task}"
    if task % 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def die(state: None, task: str, report: Callable[[int], None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(state: type[Exception], task: str, report: Callable[[int], None]) -> None:
    raise state(f"no {task}")


def linger(folder: str, task: int, report: Callable[[int], None]) -> None:
    path = Path(folder) / str(os.getpid())
    path.touch()
    try:
        report(1)
        time.sleep(60)
    finally:
        path.unlink()


def test_every_task_is_done_once_by_few_processes() -> None:
    events = list(run_tasks(add, 100, list(range(9)), workers=2))
    done = [event for event in events if isinstance(event, Done)]
    assert sorted(event.number for event in done) == list(range(9))
    assert all(event.result[0] == 100 + event.number for event in done)
    assert len({event.result[1] for event in done} - {os.getpid()}) == 2
    assert sum(event.count for event in events if isinstance(event, Progress)) == 27
    assert list(run_tasks(add, 100, [], workers=2)) == []


def test_a_worker_that_dies_is_replaced_and_its_task_is_done_again(tmp_path: Path) -> None:
    events = list(run_tasks(die_once, str(tmp_path), list(range(5)), workers=2))
    assert Counter(e.number for e in events if isinstance(e, Died)) == {1: 1, 3: 1}
    assert sorted(e.result for e in events if isinstance(e, Done)) == list(range(5))


def test_a_task_that_kills_every_worker_is_named() -> None:
    with pytest.raises(UserError, match=r"3 workers died over raw\.tar \(exit code -9\)"):
        list(run_tasks(die, None, ["raw.tar"], workers=1))


def test_errors_of_a_task_come_out_here() -> None:
    with pytest.raises(UserError, match="no luck"):
        list(run_tasks(fail, UserError, ["luck"], workers=1))
    with pytest.raises(RuntimeError, match="ZeroDivisionError: no luck"):
        list(run_tasks(fail, ZeroDivisionError, ["luck"], workers=1))


def test_no_worker_outlives_the_caller_and_each_cleans_up(tmp_path: Path) -> None:
    events = run_tasks(linger, str(tmp_path), [0, 1], workers=2)
    for _ in range(2):  # both have begun
        next(events)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    events.close()
    assert not list(tmp_path.iterdir())
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
