"""What generation takes and gives: settings, typed events, and results with their provenance."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, overload

import numpy as np

from mmpt.config import UserError
from mmpt.decode.passes import Denoising
from mmpt.parts import Part

Medium = Literal["text", "image", "video", "speech"]
Method = Literal["ar", "dida"]


@dataclass(frozen=True, kw_only=True)
class Settings(Denoising):
    """How to generate. Sizes in pixels and frames; `max_ids` bounds text and free continuation.

    What parallel decoding alone needs is `Denoising`.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("height", "width", "frames", "max_ids"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; use 1 or more")
        if self.max_seconds <= 0:
            raise UserError(f"max_seconds = {self.max_seconds}; use more than 0")


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


@dataclass(frozen=True)
class PartDone:
    """A finished part."""

    part: Part


@dataclass(frozen=True)
class Result:
    """The parts of one answer in order, and what is needed to make it again."""

    parts: list[Part]
    seed: int
    settings: Settings
    model: str  # fingerprint
    vocabulary: str  # fingerprint, which stands for the codecs
    ids: np.ndarray = field(repr=False)

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

    def provenance(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "seed": self.seed,
            "settings": asdict(self.settings),
            "model": self.model,
            "vocabulary": self.vocabulary,
        }


Event = TextDelta | Preview | PartDone | Result
