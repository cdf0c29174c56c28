"""`mmpt.data.workers` on a cluster: tasks in Ray actors, each of which holds the state.

A task runs in a thread of its actor, which hands on what the task reports as it comes. Functions
are found by name, so every machine needs mmpt, and the same folders.
"""

import logging
import os
import socket
import textwrap
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any

from mmpt.config import UserError
from mmpt.data.workers import Died, Done, Progress, R, S, T, Work, attempt, check_tries


def run_tasks(
    work: Work[S, T, R],
    state: S,
    tasks: Sequence[T],
    *,
    workers: int,
    address: str,
    device: str = "cpu",
) -> Generator[Done[R] | Progress | Died]:
    """`mmpt.data.workers.run_tasks` by up to `workers` actors of a core each.

    device: "cpu"; others: the actors share the cluster's cards evenly.

    address: "local" starts a Ray of so many cores on this machine, for as long as this takes; else
    a cluster's head, HOST:PORT, or "auto". A process that is connected already stays so. When the
    caller leaves the loop, all actors are killed: what they were writing stays behind.
    """
    todo, tries, unborn = deque(range(len(tasks))), [0] * len(tasks), 0
    crew: list[_Worker] = []
    with _connected(address, workers) as ray:
        kept = ray.put((work, state))  # each machine gets it once
        part = 0.0 if device == "cpu" else _part_of_card(ray, workers, device)
        try:
            while todo or any(worker.task is not None for worker in crew):
                while todo and len(crew) < workers:
                    crew.append(_Worker(ray, kept, part))
                for worker in crew:
                    if todo and worker.events is None:
                        number = todo.popleft()
                        tries[number] += 1
                        worker.take(number, tasks[number])
                worker = _first_to_tell(ray, crew)
                try:
                    kind, value = ray.get(next(worker.events))
                except ray.exceptions.RayActorError as error:
                    crew.remove(worker)
                    why = textwrap.shorten(str(error), 400)
                    if worker.task is None:
                        unborn += 1
                        check_tries(unborn, "their start", why)
                    else:
                        check_tries(tries[worker.task], tasks[worker.task], why)
                        todo.appendleft(worker.task)
                        yield Died(worker.task, worker.pid)
                    continue
                if kind == "progress":
                    yield Progress(value)
                elif kind == "ready":
                    worker.events, worker.pid, unborn = None, value, 0
                elif kind == "done":
                    assert worker.task is not None
                    number, worker.events, worker.task = worker.task, None, None
                    yield Done(number, value)
                else:
                    raise UserError(value) if kind == "mistake" else RuntimeError(value)
        finally:
            for worker in crew:
                ray.kill(worker.actor)


class _Worker:
    """An actor, what it will tell (None: it waits for a task), and the task that it has."""

    def __init__(self, ray: Any, kept: Any, part: float) -> None:
        self.actor = ray.remote(num_cpus=1, num_gpus=part)(_Life).remote(kept)
        self.events: Any = self.actor.greet.remote()
        self.task: int | None = None
        self.pid = 0

    def take(self, number: int, task: Any) -> None:
        self.task, self.events = number, self.actor.do.remote(task)


def _part_of_card(ray: Any, workers: int, device: str) -> float:
    """Of a card, for each actor; 0 where the cluster has none and need not."""
    cards = int(ray.cluster_resources().get("GPU", 0))
    if not cards and device != "auto":
        raise UserError(f"device = {device!r}: this Ray has no GPUs; use cpu, or give it some")
    return 1 / -(-workers // cards) if cards else 0.0


def _first_to_tell(ray: Any, crew: Sequence[_Worker]) -> _Worker:
    """Waits; an actor that has no place on the cluster yet tells nothing."""
    waited = {worker.events: worker for worker in crew if worker.events is not None}
    ready, _ = ray.wait(list(waited), num_returns=1)
    return waited[ready[0]]


class _Life:
    """What an actor does: (kind, value) as `attempt` sends them."""

    def __init__(self, kept: tuple[Work[Any, Any, Any], Any]) -> None:
        self._work, self._state = kept

    def greet(self) -> Iterator[tuple[str, Any]]:
        yield "ready", os.getpid()

    def do(self, task: Any) -> Iterator[tuple[str, Any]]:
        events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        Thread(target=self._attempt, args=(task, events), daemon=True).start()
        kind = "progress"
        while kind == "progress":
            kind, value = events.get()
            yield kind, value

    def _attempt(self, task: Any, events: SimpleQueue[tuple[str, Any]]) -> None:
        try:
            attempt(self._work, self._state, task, events.put)
        except BaseException:  # what ends a process: nobody would hear of the end of a thread
            os._exit(1)


@contextmanager
def _connected(address: str, workers: int) -> Iterator[Any]:
    """The ray module, connected; sends no statistics of use, and starts no dashboard."""
    if address.startswith("ray://"):
        raise UserError(f"ray = {address!r}: Ray's client cannot do it; use HOST:PORT of the head")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("Ray is not installed; run `pip install 'mmpt[ray]'`") from None

    ours = not ray.is_initialized()
    if ours:
        new = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {}
        try:
            _reach(address)
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **new)
        except (OSError, ValueError, RuntimeError) as error:
            why = textwrap.shorten(str(error), 200)
            raise UserError(f"no Ray at {address!r} ({why}); use HOST:PORT or local") from None
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError where nothing answers at HOST:PORT; Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
