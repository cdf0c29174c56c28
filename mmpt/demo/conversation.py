"""What one visitor said, and how it is answered: turns of parts, event by event.

A turn is answered by one decoder, or by both, one after the other, from the same seed. It changes
while it is answered; whoever shows it looks at it again after each event.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Event as Flag
from threading import Lock
from typing import Any, Literal, Protocol

import numpy as np

from mmpt.config import UserError
from mmpt.demo.limits import Limits
from mmpt.edit import Edit
from mmpt.parts import Audio, Image, Message, Part, Text, Video, no_note
from mmpt.request import Generate
from mmpt.results import (
    AudioChunk,
    Cancelled,
    Event,
    FramesChunk,
    Medium,
    Method,
    PartDone,
    PartStart,
    Preview,
    Result,
    TextDelta,
)

log = logging.getLogger(__name__)
Form = Literal["conversation", "document"]


class Answers(Protocol):
    """What answers: a `Pipeline`, or whatever answers many requests of the same signature."""

    def stream(
        self, *items: Any, seed: int = 0, cancel: Flag | None = None, **settings: Any
    ) -> Iterator[Event]:
        """Events, the last one the Result."""
        ...


@dataclass(kw_only=True)
class Answer:
    """What one decoder made: finished parts, and while it works `live`, the next one so far."""

    decoder: Method
    parts: list[Part] = field(default_factory=list)
    medium: Medium | None = None  # of the part that is being made
    live: Part | None = None
    progress: tuple[int, int] = (0, 0)  # passes done, of how many
    first: float = 0.0  # seconds until something was there
    seconds: float = 0.0
    note: str = ""  # why it ended before its end
    done: bool = False
    result: Result | None = None


@dataclass(kw_only=True)
class Turn:
    """What was asked, how, and the answers. html: of parts that are finished, by their places."""

    number: int
    asked: list[Part]
    to: Medium | None
    seed: int
    form: Form
    settings: Mapping[str, Any]
    edit: Edit | None = None
    answers: list[Answer] = field(default_factory=list)
    html: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of its media."""
        return sum(
            _bytes_of(part)
            for parts in (self.asked, *(answer.parts for answer in self.answers))
            for part in parts
        )


@dataclass(kw_only=True)
class Conversation:
    """Of one visitor. `cancel` is there while a turn is answered."""

    turns: list[Turn] = field(default_factory=list)
    count: int = 0
    cancel: Flag | None = None
    lock: Any = field(default_factory=Lock, repr=False)

    def answer(
        self, model: Answers, turn: Turn, decoders: Sequence[Method], limits: Limits
    ) -> Iterator[Event]:
        """Answer a turn; it stands at the end of the conversation, and grows with each event.

        Raises UserError where another turn is still being answered.
        """
        with self.lock:
            if self.cancel is not None:
                raise UserError("the last message is still being answered; stop that first")
            self.cancel = cancel = Flag()
        before = self.turns[-limits.turns + 1 :]
        while before and sum(each.bytes for each in (*before, turn)) > limits.kept:
            before = before[1:]
        self.count += 1
        turn.number = self.count
        self.turns = [*before, turn]
        try:
            for decoder in decoders:
                answer = Answer(decoder=decoder)
                turn.answers.append(answer)
                yield from _answer(model, before, turn, answer, cancel)
                if cancel.is_set():
                    break
        finally:
            cancel.set()  # the page may have gone away in the middle
            self.cancel = None

    def stop(self) -> None:
        """End what is being answered; what was made by then stays."""
        if self.cancel is not None:
            self.cancel.set()

    def find(self, number: int, answer: int = 0) -> Answer:
        """Raises UserError where it was forgotten."""
        for turn in self.turns:
            if turn.number == number and 0 <= answer < len(turn.answers):
                return turn.answers[answer]
        raise UserError("this answer was forgotten; look at a later one")

    def find_part(self, number: int, answer: int, part: int) -> Part:
        """What was asked (answer -1), or a part of an answer."""
        asked = [turn.asked for turn in self.turns if turn.number == number and answer < 0]
        parts = asked[0] if asked else self.find(number, answer).parts
        if not 0 <= part < len(parts):
            raise UserError("this part was forgotten; look at a later one")
        return parts[part]


class Visitors:
    """Conversations by session; the one that was silent for longest is forgotten first."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._lock = limits, Lock()
        self._known: OrderedDict[str, Conversation] = OrderedDict()

    def find(self, session: str) -> Conversation:
        """That of a session, which is new where nothing was said."""
        with self._lock:
            known = self._known.setdefault(session, Conversation())
            self._known.move_to_end(session)
            while len(self._known) > self._limits.visitors:
                _, oldest = self._known.popitem(last=False)
                oldest.stop()
            return known

    def forget(self, session: str) -> None:
        """The visitor left, or begins anew: what is being answered ends."""
        with self._lock:
            known = self._known.pop(session, None)
        if known is not None:
            known.stop()


def _answer(
    model: Answers, before: Sequence[Turn], turn: Turn, answer: Answer, cancel: Flag
) -> Iterator[Event]:
    began, shown = time.perf_counter(), 0.0
    try:
        slot = Generate(turn.to, edit=turn.edit, **{**turn.settings, "decoder": answer.decoder})
        events = model.stream(*_items(before, turn), slot, seed=turn.seed, cancel=cancel)
        for event in events:
            _take(answer, event)
            now = time.perf_counter()
            answer.seconds = now - began - shown
            if not answer.first and not isinstance(event, PartStart):
                answer.first = answer.seconds
            yield event
            shown += time.perf_counter() - now  # what showing it takes is no work of the model
    except Cancelled:
        answer.note = "stopped"
    except UserError as error:
        answer.note = str(error)
    except Exception:
        # the conversation, and those of others, go on
        log.exception("turn %d could not be answered", turn.number)
        answer.note = "this went wrong, which is no fault of yours; the log of the demo says more"
    finally:
        if answer.live is not None:  # stopped in the middle of it
            answer.parts.append(answer.live)
        answer.done, answer.medium, answer.live = True, None, None


def _items(before: Sequence[Turn], turn: Turn) -> list[Any]:
    """All that was said before, and what is asked now."""
    if turn.form == "document":
        said = [part for each in before for part in (*each.asked, *_said(each))]
        return [*map(_plain, said), *turn.asked]
    items: list[Any] = []
    for each in before:
        answered = _said(each)
        items += [Message("user", tuple(each.asked))] if each.asked else []
        items += [Message("assistant", tuple(map(_plain, answered)))] if answered else []
    return [*items, *([Message("user", tuple(turn.asked))] if turn.asked else [])]


def _said(turn: Turn) -> list[Part]:
    # of two answers side by side the conversation goes on with the first
    return turn.answers[0].parts if turn.answers else []


def _bytes_of(part: Part) -> int:
    if isinstance(part, Text):
        return len(part.text)
    if isinstance(part, Image):
        return part.pixels.nbytes
    return part.frames.nbytes if isinstance(part, Video) else part.wave.nbytes


def _plain(part: Part) -> Part:
    # as given: a record of what this one was made from would hold all records before it
    return replace(part, provenance=no_note)


def _take(answer: Answer, event: Event) -> None:
    """The parts so far, behind an event."""
    live = answer.live
    if isinstance(event, PartStart):
        answer.medium, answer.live, answer.progress = event.medium, None, (0, 0)
    elif isinstance(event, TextDelta):
        answer.live = Text(live.text + event.text if isinstance(live, Text) else event.text)
    elif isinstance(event, Preview):
        answer.live, answer.progress = event.part, (event.done, event.total)
    elif isinstance(event, AudioChunk):
        heard = [live.wave, event.wave] if isinstance(live, Audio) else [event.wave]
        answer.live = Audio(np.concatenate(heard), event.sample_rate)
    elif isinstance(event, FramesChunk) and not answer.progress[1]:  # previews show more
        seen = [live.frames, event.frames] if isinstance(live, Video) else [event.frames]
        answer.live = Video(np.concatenate(seen), event.fps)
    elif isinstance(event, PartDone):
        answer.parts.append(event.part)
        answer.medium, answer.live = None, None
    elif isinstance(event, Result):
        answer.result, answer.parts = event, list(event.parts)
