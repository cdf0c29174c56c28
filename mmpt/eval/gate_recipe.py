"""What a recipe of the quality gate says: how to decode, what to draw, margins, judges."""

from dataclasses import dataclass, field
from typing import get_args

from mmpt.config import UserError
from mmpt.results import Method, Settings

MEDIA = ("image", "video", "speech")


@dataclass(frozen=True, kw_only=True)
class Margins:
    """How much worse is as good: of the reference's value, or, where it says so, in points."""

    likelihood: float = 0.02
    accuracy: float = 0.02  # points: 0.02 of all pictures
    word_errors: float = 0.03  # points: 0.03 of all words
    features: float = 0.05
    kernel: float = 0.05  # absolute; the kernel itself is at most 8
    frechet: float = 0.05  # of the reference's FID
    inception: float = 0.005  # absolute: KID
    entropy: float = 0.05
    distinct: float = 0.05


@dataclass(frozen=True, kw_only=True)
class GateRecipe:
    """What is drawn and how it is judged. num_samples: of each prompt, by each way to decode."""

    compare: dict[str, Settings]  # name -> how it decodes
    prompts: dict[str, tuple[str, ...]]  # medium -> names of token shards
    num_prompts: int = 200  # of each medium, at most
    num_samples: int = 1
    given_frames: int = 9  # of videos, which go on from them
    seed: int = 0
    margins: Margins = field(default_factory=Margins)
    pictures: tuple[str, ...] = ()  # raw shards that the judge of pictures learns from
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # name -> words of captions
    epochs: int = 20  # of the judge of pictures
    inception: str = ""  # torch-fidelity's weights file of InceptionV3, for FID and KID of images
    whisper: str = ""  # folder of a judge of speech; else pocketsphinx with a grammar
    num_shown: int = 6  # prompts on the page

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_samples", "epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; use 1 or more")
        for medium in self.prompts:
            if medium not in MEDIA:
                raise UserError(f"prompts.{medium}: choose from {', '.join(MEDIA)}")
        for name, settings in self.compare.items():
            if name in get_args(Method) and settings.decoder != name:
                raise UserError(
                    f"[compare.{name}] has decoder = {settings.decoder!r}; say decoder = {name!r}, "
                    "or give the table another name"
                )
