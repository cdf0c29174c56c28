"""What each kind of codec learns."""

from collections.abc import Callable

from mmpt.parts import Part
from mmpt.tokenizers.objectives.base import Objective
from mmpt.tokenizers.objectives.image import ImageObjective
from mmpt.tokenizers.objectives.speech import SpeechObjective
from mmpt.tokenizers.objectives.video import VideoObjective
from mmpt.tokenizers.recipe import CodecRecipe

OBJECTIVES: dict[str, Callable[[CodecRecipe, list[list[Part]]], Objective]] = {
    "image": ImageObjective,
    "video": VideoObjective,
    "speech": SpeechObjective,
}
__all__ = ["OBJECTIVES", "Objective"]
