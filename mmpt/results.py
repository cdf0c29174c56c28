"""What generation gives: settings, typed events, and results with all that makes them again."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from mmpt.config import UserError
from mmpt.decode.passes import Denoising
from mmpt.parts import Message, Part

if TYPE_CHECKING:
    from mmpt.provenance import Circumstances
    from mmpt.request import Request

Medium = Literal["text", "image", "video", "speech"]
Method = Literal["ar", "dida"]


@dataclass(frozen=True, kw_only=True)
class Settings(Denoising):
    """How to generate. Sizes in pixels and frames; what parallel decoding alone needs: `Denoising`.

    `max_ids` bounds text, and all that the model writes where it decides itself what comes;
    `max_seconds` speech, `max_parts` the parts of an answer that the model decides (0: any number).
    """

    decoder: Method = "ar"
    temperature: float = 1.0
    top_p: float = 0.95
    guidance: float = 1.0
    height: int = 64
    width: int = 64
    frames: int = 17
    max_seconds: float = 6.0
    max_ids: int = 96
    max_parts: int = 0
    stop: tuple[str, ...] = ()  # text ends before the first of these
    context: int = 0  # ids that the model sees at most: the oldest parts fall out; 0: all of them

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("height", "width", "frames", "max_ids"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; use 1 or more")
        for name in ("max_parts", "context"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)}; use 1 or more, or 0 for no limit")
        if self.max_seconds <= 0:
            raise UserError(f"max_seconds = {self.max_seconds}; use more than 0")
        if not all(self.stop):
            raise UserError("stop holds an empty text, which stands everywhere; leave it out")


class Cancelled(Exception):
    """It was asked to stop, and did."""


@dataclass(frozen=True)
class PartStart:
    """A part of this medium begins."""

    medium: Medium


@dataclass(frozen=True)
class TextDelta:
    """A piece of text, as it is written."""

    text: str


@dataclass(frozen=True)
class Preview:
    """The part so far, after denoising pass `done` of `total`."""

    part: Part
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class AudioChunk:
    """The next piece of a sound, float32 (num_samples,); all of them together are the part."""

    wave: np.ndarray = field(repr=False)
    sample_rate: int


@dataclass(frozen=True, eq=False)
class FramesChunk:
    """The next frames of a clip, uint8 (num_frames, height, width, 3); together they are it."""

    frames: np.ndarray = field(repr=False)
    fps: float


@dataclass(frozen=True)
class PartDone:
    """A finished part."""

    part: Part


@dataclass(frozen=True)
class Result:
    """The parts that one answer is made of, in order, and what is needed to make them again.

    settings: those of the last slot; `request` has those of all. ids: the whole stream, int64 (n,),
    prompt and answer; where the answer is one picture or clip, it ends with the last code.
    """

    parts: list[Part]
    seed: int
    settings: Settings
    model: str  # fingerprint
    vocabulary: str  # fingerprint, which stands for the codecs
    ids: np.ndarray = field(repr=False)
    request: "Request" = field(repr=False)
    counts: tuple[int, ...] = (1,)  # how many of the parts each slot gave
    place: tuple[int, int] = (0, 1)  # which of how many that were answered together
    circumstances: "Circumstances | None" = field(repr=False, default=None)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    @overload
    def __getitem__(self, index: int) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> list[Part]: ...
    def __getitem__(self, index: int | slice) -> Part | list[Part]:
        return self.parts[index]

    @property
    def document(self) -> list[Part]:
        """What was given and what was made, in the order in which it stands."""
        return self.request.filled(self.parts, self.counts)

    @property
    def message(self) -> Message:
        """The answer as a message, so that a conversation can go on with it."""
        return Message("assistant", tuple(self.parts))

    def save(self, path: str | Path) -> list[Path]:
        """Write the parts into a folder, beside result.json, which holds all; or one file.

        A .json is the whole result; any other suffix is of the only part. Returns what was written.
        `mmpt replay` makes any of the files again, but for texts and formats without metadata.
        """
        from mmpt.provenance import save_result

        return save_result(self, path)

    def provenance(self) -> dict[str, Any]:
        """What made it, as plain values; what it was made from is in `record`."""
        return {
            "seed": self.seed,
            "settings": asdict(self.settings),
            "model": self.model,
            "vocabulary": self.vocabulary,
        }

    def record(self) -> dict[str, Any]:
        """All that is needed to make it again, as plain values for JSON; media are content."""
        return {
            "request": self.request.to_json(),
            "place": list(self.place),
            "model": self.model,
            "vocabulary": self.vocabulary,
        }


Event = PartStart | TextDelta | Preview | AudioChunk | FramesChunk | PartDone | Result
