"""A pipeline that many threads ask at once, and that answers many requests in shared passes.

    with mmpt.Server(mmpt.load("runs/quickstart/model")) as server:
        [picture] = server("red apple", to="image")  # from any thread

One thread does all the work. What is written one id at a time shares its passes (`decode.pool`),
whatever it is, and a request joins at the next step. What is denoised is gathered: requests with
equal slots that wait when a batch of theirs has ended are the next one. Each gives the ids that it
gives alone.

A kind is the media and decoders of a request's slots. Requests are taken first in first out, but
those of a kind that already has as many as a batch let others pass; and kinds get equal time.
"""

import logging
import time
from collections.abc import Generator, Hashable
from dataclasses import dataclass, field
from threading import Condition, Thread
from threading import Event as Flag
from types import TracebackType
from typing import Any, Self

from mmpt.answer.rows import Tick
from mmpt.config import UserError
from mmpt.decode.pool import Pool
from mmpt.edit import Edit
from mmpt.parts import Video
from mmpt.pipeline import Pipeline
from mmpt.request import Given, Request
from mmpt.results import Cancelled, Event, Medium, Result
from mmpt.serve.ticket import Ticket

log = logging.getLogger(__name__)
LINGER = 0.01  # seconds that a batch waits for those who were answered by the last one


class Server:
    """Answers as its pipeline does, by the same calls. Threads may share it.

    queue: requests that may wait. batch: of one kind that are answered at once; twice as many of
    all kinds. Raises UserError for more than may wait, and behind `close`.
    """

    def __init__(self, pipeline: Pipeline, *, queue: int = 64, batch: int = 16) -> None:
        if queue < 1 or batch < 1:
            raise UserError(f"queue = {queue}, batch = {batch}; use 1 or more")
        self.pipeline, self.queue, self.batch = pipeline, queue, batch
        self._changed = Condition()
        self._waiting: list[Ticket] = []
        self._closed = False
        self._runs: list[_Run] = []  # from here on of the working thread alone
        self._pool = Pool.of(pipeline.model)
        self._spent: dict[Hashable, float] = {}  # seconds of each kind that is answered
        self._resting: dict[Hashable, float] = {}  # until when a batch waits for more
        self._thread = Thread(target=self._work, name="mmpt-serve", daemon=True)
        self._thread.start()

    def __call__(
        self,
        *items: Given,
        to: Medium | None = None,
        begin: Video | None = None,
        edit: Edit | None = None,
        seed: int = 0,
        cancel: Flag | None = None,
        **settings: Any,
    ) -> Result:
        """As that of `Pipeline`; waits for its turn."""
        request = Request.of(items, to=to, begin=begin, edit=edit, seed=seed, settings=settings)
        [result] = self._ask(Ticket(request, show=False, cancel=cancel)).events()
        assert isinstance(result, Result)
        return result

    def stream(
        self,
        *items: Given,
        to: Medium | None = None,
        begin: Video | None = None,
        edit: Edit | None = None,
        seed: int = 0,
        cancel: Flag | None = None,
        **settings: Any,
    ) -> Generator[Event, None, None]:
        """As that of `Pipeline`; it takes its place among those that wait when it is called."""
        request = Request.of(items, to=to, begin=begin, edit=edit, seed=seed, settings=settings)
        return self._ask(Ticket(request, show=True, cancel=cancel)).events()

    def close(self) -> None:
        """End all that is answered, with `Cancelled`; returns when nothing runs any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, ticket: Ticket) -> Ticket:
        with self._changed:
            if self._closed:
                raise UserError("the server is closed")
            # who has gone away, or takes part already, waits no longer
            self._waiting = [other for other in self._waiting if other.check()]
            if len(self._waiting) >= self.queue:
                raise UserError(f"{self.queue} requests wait already; try again in a moment")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def _work(self) -> None:
        try:
            while self._wait():
                self._turn()
        finally:  # also if this has a bug: nobody waits for what never comes
            with self._changed:
                self._closed, waiting = True, self._waiting
                self._waiting = []
            for ticket in [*waiting, *(t for run in self._runs for t in run.tickets)]:
                ticket.end(Cancelled("the server was closed"))
            for run in self._runs:
                run.ticks.close()
            self._runs = []

    def _wait(self) -> bool:
        """Until something can be done; False where nothing is to be done any more."""
        with self._changed:
            while not self._closed:
                self._admit()
                if self._runs:
                    return True
                self._changed.wait(LINGER if self._waiting else None)
        return False

    def _admit(self) -> None:
        """Begin what may begin, first in first out."""
        self._waiting = [ticket for ticket in self._waiting if ticket.check()]
        for ticket in list(self._waiting):
            if ticket not in self._waiting or not self._room(ticket.kind):
                continue
            group = [ticket]
            if self._gathers(ticket):
                group = [t for t in self._waiting if t.likeness == ticket.likeness]
                group = [t for t in group if t.show == ticket.show][: self._room(ticket.kind)]
                full = len(group) == self.batch
                rests = time.monotonic() < self._resting.get(ticket.likeness, 0.0)
                under_way = any(r.tickets[0].likeness == ticket.likeness for r in self._runs)
                if under_way or (rests and not full):
                    continue
            self._waiting = [t for t in self._waiting if t not in group]
            self._begin(group, pool=self._pool)

    def _gathers(self, ticket: Ticket) -> bool:
        return ticket.joins and (self._pool is None or not ticket.steps)

    def _room(self, kind: Hashable) -> int:
        """How many more of a kind may begin."""
        kinds = [ticket.kind for run in self._runs for ticket in run.tickets]
        return min(self.batch - kinds.count(kind), 2 * self.batch - len(kinds))

    def _begin(self, tickets: list[Ticket], *, pool: Pool | None, alone: bool = False) -> None:
        kind = tickets[0].kind
        if kind not in self._spent:
            self._spent[kind] = min(self._spent.values(), default=0.0)
        requests = [ticket.request for ticket in tickets]
        ticks = self.pipeline.ticks(requests, show=tickets[0].show, pool=pool)
        self._runs.append(_Run(tickets, ticks, alone))

    def _turn(self) -> None:
        """A pass of each request of the kind that had the least time."""
        kind = min(self._spent, key=lambda kind: self._spent[kind])
        began = time.monotonic()
        for run in [run for run in self._runs if run.kind == kind]:
            if not any([ticket.check() for ticket in run.tickets]):
                self._end(run)
                continue
            try:
                if not run.tick():
                    self._end(run)
            except Exception as error:
                self._fail(run, error)
        if any(run.kind == kind for run in self._runs):
            self._spent[kind] += time.monotonic() - began
        else:
            del self._spent[kind]

    def _end(self, run: "_Run") -> None:
        run.ticks.close()
        self._runs.remove(run)
        if len(run.tickets) > 1:
            now = time.monotonic()
            self._resting = {like: end for like, end in self._resting.items() if end > now}
            self._resting[run.tickets[0].likeness] = now + LINGER

    def _fail(self, run: "_Run", error: Exception) -> None:
        """It fails alone: what shared passes with others is answered again by itself."""
        self._end(run)
        if run.alone or (len(run.tickets) == 1 and isinstance(error, UserError)):
            for ticket in run.tickets:
                ticket.end(error)
            return
        log.warning("%d requests are answered one by one: %s", len(run.tickets), error)
        for ticket in run.tickets:
            if ticket.check():
                ticket.begin_anew()
                self._begin([ticket], pool=None, alone=True)


@dataclass(eq=False)
class _Run:
    """Requests that are answered together. alone: it shares nothing with others."""

    tickets: list[Ticket]
    ticks: Generator[Tick, None, None]
    alone: bool
    kind: Hashable = field(init=False)

    def __post_init__(self) -> None:
        self.kind = self.tickets[0].kind

    def tick(self) -> bool:
        """Go on to the end of a pass; False behind the last one."""
        for tick in self.ticks:
            if tick is None:
                return True
            number, event = tick
            self.tickets[number].tell(event)
        return False
