"""Tasks in processes of their own: a worker that dies is replaced, and its task is done again.

Every worker is started anew (not forked, for libraries hold threads), gets one state, and then
takes one task after another. What a task returns must not depend on who does it.
"""

import logging
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from mmpt.config import UserError

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")
# what does a task: (state, task, report of progress) -> result; a function of a module
Work = Callable[[S, T, Callable[[int], None]], R]
MAX_TRIES = 3  # of a task whose worker dies


@dataclass(frozen=True)
class Done(Generic[R]):
    """Task `number` is done."""

    number: int
    result: R


@dataclass(frozen=True)
class Progress:
    """A worker did `count` more of its task."""

    count: int


@dataclass(frozen=True)
class Died:
    """The worker `pid` of task `number` is gone; another one does it again."""

    number: int
    pid: int


def run_tasks(
    work: Work[S, T, R], state: S, tasks: Sequence[T], *, workers: int
) -> Generator[Done[R] | Progress | Died]:
    """Do all tasks, the first first, and say what happens, as it happens.

    A mistake of the user in a task is raised here, others as RuntimeError with their traceback.
    Raises UserError when workers die over one task again and again. When the caller leaves the
    loop, all workers end.
    """
    todo, tries = deque(range(len(tasks))), [0] * len(tasks)
    crew: dict[Connection, _Worker] = {}
    try:
        while todo or any(worker.task is not None for worker in crew.values()):
            while todo and len(crew) < workers:
                worker = _Worker(work, state)
                crew[worker.pipe] = worker
            for worker in crew.values():
                if todo and worker.task is None:
                    number = todo.popleft()
                    tries[number] += 1
                    worker.take(number, tasks[number])
            for pipe in wait(list(crew)):
                worker = crew[pipe]  # type: ignore[index] # only pipes are waited for
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    number, pid, code = worker.buried()
                    del crew[worker.pipe]
                    if number is not None:
                        check_tries(tries[number], tasks[number], f"exit code {code}")
                        todo.appendleft(number)
                        yield Died(number, pid)
                    continue
                if kind == "progress":
                    yield Progress(value)
                elif kind == "done":
                    assert worker.task is not None
                    number, worker.task = worker.task, None
                    yield Done(number, value)
                else:
                    raise UserError(value) if kind == "mistake" else RuntimeError(value)
    finally:
        for worker in crew.values():
            worker.process.terminate()
        for worker in crew.values():
            worker.buried()


def attempt(work: Work[S, T, R], state: S, task: T, send: Callable[[tuple[str, Any]], Any]) -> None:
    """Do a task and send what comes of it.

    ("progress", count) as often as it reports; then ("done", result), or ("mistake", message), or
    ("error", traceback).
    """
    try:
        send(("done", work(state, task, lambda count: send(("progress", count)))))
    except UserError as error:
        send(("mistake", str(error)))
    except Exception:
        send(("error", traceback.format_exc()))


def check_tries(count: int, task: Any, why: str) -> None:
    """Raises UserError when the workers that died over one task are too many."""
    if count >= MAX_TRIES:
        raise UserError(f"{count} workers died over {task} ({why}); see what it holds")
    log.warning("a worker died over %s (%s); it is done again", task, why)


class _Worker:
    """A process, the pipe to it, and the task that it has."""

    def __init__(self, work: Work[S, T, R], state: S) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_live, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.task: int | None = None
        self._send(state)

    def take(self, number: int, task: Any) -> None:
        self.task = number
        self._send(task)

    def buried(self) -> tuple[int | None, int, int | None]:
        """Wait for the end: the task it had, its process id and exit code."""
        self.process.join()
        self.pipe.close()
        return self.task, self.process.pid or 0, self.process.exitcode

    def _send(self, value: Any) -> None:
        # where it died, reading from the pipe says so
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(value)


def _live(pipe: Connection, work: Work[Any, Any, Any]) -> None:
    """The life of a worker: one state, then tasks until the pipe is closed."""
    # the terminal's Ctrl-C goes to all processes; the first one decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    state = pipe.recv()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        attempt(work, state, task, pipe.send)


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # so that what is open is closed and cleaned
