"""What `mmpt data interleave` makes, as a TOML recipe or as key=value."""

import typing
from dataclasses import dataclass, field
from typing import Literal

from mmpt.config import UserError
from mmpt.data.align import MIN_SCORE

Name = Literal[
    "speech-text-spans",
    "streaming",
    "recognition",
    "synthesis",
    "captions-before",
    "captions-after",
    "frames-with-transcript",
    "infilling",
]
NAMES: tuple[str, ...] = typing.get_args(Name)


@dataclass(frozen=True, kw_only=True)
class InterleaveRecipe:
    """Templates by weight: each document becomes one of those that fit it, drawn by its key.

    ratio of the words is heard, in runs of `mean_words` on average (speech-text-spans; 10 and 0.3
    are those of arXiv 2411.17607). text_ids and sound_codes stand in turn (streaming). min_score in
    nats a letter: below it a sound and its text do not belong together. text and speech are codecs.
    """

    templates: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    ratio: float = 0.3
    mean_words: float = 10.0
    text_ids: int = 13
    sound_codes: int = 26
    frames: Literal["pictures", "clips"] = "pictures"
    min_score: float = MIN_SCORE
    text: str = "text-2k"
    speech: str = "speech-12hz"

    def __post_init__(self) -> None:
        for name in self.templates:
            if name not in NAMES:
                raise UserError(f"no template {name!r}; choose one of {', '.join(NAMES)}")
        weights = self.templates.values()
        if not weights or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise UserError(
                f"templates = {self.templates}; give --template NAME, or weights from 0 on of "
                f"{', '.join(NAMES)}"
            )
        if not 0 < self.ratio <= 1:
            raise UserError(f"ratio = {self.ratio}; use a share of the words, above 0 and up to 1")
        for name in ("mean_words", "text_ids", "sound_codes"):
            if not 0 < getattr(self, name) <= 10_000:
                raise UserError(f"{name} = {getattr(self, name)}; use 1 to 10,000")
