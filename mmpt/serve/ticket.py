"""One request on its way through a server: how it waits, what comes of it, how it is given up."""

from collections.abc import Generator, Hashable
from queue import SimpleQueue
from threading import Event as Flag

from mmpt.pipeline import likeness
from mmpt.request import Request
from mmpt.results import Cancelled, Event, Result


class Ticket:
    """Of one request. show: all events are told, else only the Result."""

    def __init__(self, request: Request, *, show: bool, cancel: Flag | None = None) -> None:
        self.request, self.show = request, show
        slots = [(slot.medium, slot.chosen.decoder) for slot in request.slots]
        self.kind: Hashable = tuple(slots)
        self.likeness = likeness(request)
        # written row by row where one slot is speech, or is what the model decides
        media = {medium for medium, _ in slots}
        self.joins = self.likeness is not None and media <= {"text", "image", "video"}
        self.steps = all(decoder == "ar" for _, decoder in slots)
        self.over = False
        self._cancel, self._left = cancel, Flag()
        self._told: SimpleQueue[Event | BaseException] = SimpleQueue()
        self._count = self._skip = 0

    def tell(self, event: Event) -> None:
        """Hand an event to whoever waits for it."""
        self._count += 1
        if self.over or self._count <= self._skip:
            return
        self.over = isinstance(event, Result)
        if self.show or self.over:
            self._told.put(event)

    def end(self, error: BaseException) -> None:
        """It failed, or was cancelled."""
        if not self.over:
            self.over = True
            self._told.put(error)

    def begin_anew(self) -> None:
        """The same events come again; those that were told are not told twice."""
        self._skip, self._count = max(self._skip, self._count), 0

    def check(self) -> bool:
        """Whether somebody still wants it."""
        if self._left.is_set() or (self._cancel is not None and self._cancel.is_set()):
            self.end(Cancelled("stopped, as was asked"))
        return not self.over

    def events(self) -> Generator[Event, None, None]:
        """Until the Result; raises what ended it instead. Who leaves before cancels it."""
        try:
            while True:
                told = self._told.get()
                if isinstance(told, BaseException):
                    raise told
                yield told
                if isinstance(told, Result):
                    return
        finally:
            self._left.set()
