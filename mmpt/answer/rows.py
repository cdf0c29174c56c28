"""The stream of one request as it grows: what is given, what is made, and what is still seen.

A conversation is `<bod> <user> parts <assistant> parts ...`; without messages there are no turns.
Where a context is set, whole parts fall out, the oldest first; the first part, or message, stays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch

from mmpt.config import UserError
from mmpt.data.layout import write_segments
from mmpt.decode.pool import Pool
from mmpt.decode.sampling import Sampling
from mmpt.model.transformer import Decoder
from mmpt.parts import Message, Part
from mmpt.processor import Processor
from mmpt.request import Generate, Request
from mmpt.results import Event, Settings
from mmpt.stream import StreamBuilder
from mmpt.tokenizers.video import GROUP
from mmpt.vocab import Modality, Vocabulary

Tick = tuple[int, Event] | None
"""An event of a row (by its place in the batch), or None behind a pass that shows nothing."""
Ticks = Iterator[Tick]


class Piece(NamedTuple):
    """One part as ids (n,), the turn that it belongs to, and the slot that made it (-1: given)."""

    ids: np.ndarray
    turn: int
    role: str  # "": outside of a conversation
    slot: int
    is_text: bool


class Window(NamedTuple):
    """What a slot sees: ids (n,), and the same without a condition, for guidance."""

    prompt: np.ndarray
    free: np.ndarray

    def then(self, ids: np.ndarray) -> "Window":
        """Both with more behind them."""
        return Window(np.append(self.prompt, ids), np.append(self.free, ids))


class Row:
    """One request while it is answered. `number`: its place in the batch."""

    def __init__(self, request: Request, processor: Processor, number: int) -> None:
        self.request, self.number = request, number
        self.made: list[Part] = []
        self.counts: list[int] = []
        self.tail = np.zeros(0, dtype=np.int64)  # what ended the last slot
        self.generator = torch.Generator()
        self._processor, self._items = processor, iter(request.items)
        self._pieces: list[Piece] = []
        self._turn, self._role = 0, ""

    def advance(self) -> Generate | None:
        """Take in what is given up to the next slot; None where there is no other."""
        for item in self._items:
            if isinstance(item, Generate):
                self._speak_up()
                slot = len(self.counts)
                self.counts.append(0)
                self.generator.manual_seed(_seed_of(self.request.seed, slot))
                self.tail = self.tail[:0]
                return item
            if isinstance(item, Message):
                self._turn, self._role = self._turn + 1, item.role
                self._give(item.content)
            else:
                self._speak_up()
                self._give([item])
        return None

    @property
    def ends(self) -> tuple[str, ...]:
        """What the model ends an answer by; in a conversation the next turn, too."""
        return ("<eod>", "<user>") if self._role else ("<eod>",)

    def finish(self, part: Part, ids: np.ndarray) -> None:
        """The current slot has made a part, which is these ids of the stream, markers included."""
        self.made.append(part)
        self.counts[-1] += 1
        is_text = not len(ids) or int(ids[0]) < self._processor.vocabulary.num_text
        slot = len(self.counts) - 1
        self._pieces.append(Piece(ids, self._turn, self._role, slot, is_text))

    def window(self, need: int, context: int, pending: np.ndarray | None = None) -> Window:
        """What is seen where `need` more ids are to come, within `context` ids (0: all is seen).

        pending: ids of a part that is not finished.
        """
        pieces, pending = self._pieces, np.zeros(0, np.int64) if pending is None else pending
        if context:
            # room for a long answer is not worth all that was before it
            most = max(context - need, context // 2) - len(pending)
            first = sum(self._is_first(piece) for piece in pieces)
            while len(pieces) > first and len(self._render(pieces)) > most:
                pieces = pieces[:first] + pieces[first + 1 :]
        slot = len(self.counts) - 1
        bare = _structure(self._processor.vocabulary, "<bod>", "<null>")
        own = [piece.ids for piece in pieces if piece.slot == slot]
        prompt = np.append(self._render(pieces), pending)
        return Window(prompt, np.concatenate([bare, *own, pending]))

    @property
    def ids(self) -> np.ndarray:
        """All of the stream, whatever fell out of sight."""
        return np.append(self._render(self._pieces), self.tail)

    def _is_first(self, piece: Piece) -> bool:
        first = self._pieces[0]
        return piece is first or (bool(first.role) and piece.turn == first.turn)

    def _speak_up(self) -> None:
        # what follows a message of the user is the answer
        if self._role == "user":
            self._turn, self._role = self._turn + 1, "assistant"

    def _give(self, parts: Sequence[Part]) -> None:
        for segment in self._processor.encode_parts(parts):
            builder = StreamBuilder(self._processor.vocabulary)
            write_segments(builder, [segment], self._processor.separator)
            is_text = segment.modality == Modality.TEXT
            self._pieces.append(Piece(builder.build().ids, self._turn, self._role, -1, is_text))

    def _render(self, pieces: Sequence[Piece]) -> np.ndarray:
        vocabulary, out = self._processor.vocabulary, []
        turn, follows_text = 0, False
        for piece in pieces:
            if piece.turn != turn:
                out.append(_structure(vocabulary, f"<{piece.role}>"))
                turn, follows_text = piece.turn, False
            if follows_text and piece.is_text and piece.slot < 0:
                out.append(self._processor.separator)
            out.append(piece.ids)
            follows_text = piece.is_text
        if turn != self._turn:
            out.append(_structure(vocabulary, f"<{self._role}>"))
        return np.concatenate([_structure(vocabulary, "<bod>"), *out]).astype(np.int64)


@dataclass(frozen=True)
class Engine:
    """A model and its codecs, which nothing here changes: threads may share them."""

    model: Decoder
    processor: Processor
    pool: Pool | None = None  # of who answers many at once, in one thread

    @property
    def vocabulary(self) -> Vocabulary:
        """That of both."""
        return self.processor.vocabulary

    @property
    def speech_rate(self) -> float:
        """Codes a second, of all codebooks."""
        codec = self.codec(Modality.SPEECH)
        return codec.sample_rate / codec.samples_per_code * codec.num_codebooks

    def max_codes(self, settings: Settings) -> int:
        """Of speech."""
        return max(1, round(settings.max_seconds * self.speech_rate))

    def codec(self, modality: Modality) -> Any:
        """Of a medium. Raises UserError where there is none."""
        codec = self.processor.media.get(modality)
        if codec is None:
            raise UserError(f"this model has no {modality.name.lower()} tokenizer")
        return codec

    def check_adapted(self, settings: Settings) -> None:
        """Refuse to decode in parallel by a model that cannot."""
        adapted = any(group.noisy for group in self.model.config.groups.values())
        if settings.decoder == "dida" and not adapted:
            raise UserError("this model was never adapted; run mmpt adapt, or use decoder='ar'")

    def shape(self, modality: Modality, settings: Settings) -> tuple[int, ...]:
        """Of the ids of a picture or a clip: (height, width) or (frames, height, width)."""
        codec = self.codec(modality)
        factor = codec.factor
        # the last side counts ids: a cell has one of each codebook
        sides = (settings.height // factor, settings.width // factor * codec.num_codebooks)
        if settings.height % factor or settings.width % factor:
            raise UserError(
                f"{settings.height} x {settings.width} pixels; use multiples of {factor}"
            )
        if modality == Modality.IMAGE:
            return sides
        if (settings.frames - 1) % GROUP:
            raise UserError(f"frames = {settings.frames}; use 1 + {GROUP} n, such as 17")
        return (1 + (settings.frames - 1) // GROUP, *sides)

    def header(self, modality: Modality, shape: Sequence[int]) -> np.ndarray:
        """Ids that begin a span."""
        return StreamBuilder(self.vocabulary).header(modality, shape).build().ids


def sampling_of(settings: Settings) -> Sampling:
    """How to draw."""
    return Sampling(
        temperature=settings.temperature, top_p=settings.top_p, guidance=settings.guidance
    )


def unconditional(windows: Sequence[Window], settings: Settings) -> list[np.ndarray] | None:
    """The other branch of guidance, where it is on."""
    return None if settings.guidance == 1 else [window.free for window in windows]


def _structure(vocabulary: Vocabulary, *names: str) -> np.ndarray:
    return np.array([vocabulary.structure_id(name) for name in names], dtype=np.int64)


def _seed_of(seed: int, slot: int) -> int:
    """Each slot has noise of its own: how long the one before it became changes nothing."""
    if not slot:
        return seed
    return int.from_bytes(sha256(f"{seed} {slot}".encode()).digest()[:7], "big")
