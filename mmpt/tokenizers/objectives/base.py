"""How a batch is drawn and what the loss is: the part that all media share.

A batch is a pure function of the generator that is handed in, so that a resumed training equals an
uninterrupted one. Media that an objective cannot use are counted and reported.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmpt.config import UserError
from mmpt.tokenizers.base import Codec
from mmpt.tokenizers.discriminator import Adversary
from mmpt.tokenizers.recipe import CodecRecipe

log = logging.getLogger(__name__)

PICTURE = (64, 64, 3)  # what frames are trained on


class Objective(ABC):
    """What a codec learns: draws batches and computes losses."""

    codec: Codec
    infeasible: int = 0  # targets that no codes could spell, so far
    adversary: Adversary | None = None  # updated after each step, on what `loss` showed it

    @abstractmethod
    def batch(self, generator: np.random.Generator, size: int) -> dict[str, Tensor]:
        """Draw a training batch on the CPU: tensors (size, ...), or fewer rows if data is short."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss and what to log, of a batch on the codec's device.

        The loss is a mean over the rows. An int is a count, which processes add up.
        """

    def trained(self) -> torch.nn.Module:
        """The module whose parameters are trained and averaged."""
        return self.codec

    def to(self, device: torch.device) -> None:
        """Move the codec and all other modules of the objective."""
        for value in vars(self).values():
            if isinstance(value, torch.nn.Module):
                value.to(device)


def build_adversary(recipe: CodecRecipe, *, num_channels: int = 3) -> Adversary | None:
    """The discriminator of a recipe that gives it a weight."""
    if not recipe.loss.discriminator:
        return None
    return Adversary(recipe.loss, recipe.steps, num_channels=num_channels)


def usable(arrays: Sequence[np.ndarray], shape: tuple[int, ...], need: str) -> list[np.ndarray]:
    """Those whose last sides are `shape`; the rest is counted. Raises UserError when none is."""
    kept = [array for array in arrays if array.shape[-3:] == shape and len(array)]
    count_unusable(len(kept), len(arrays), need)
    return kept


def count_unusable(num_kept: int, num_given: int, need: str) -> None:
    """Report how many media are left out. Raises UserError when none is kept."""
    if not num_kept:
        raise UserError(f"the shards hold no {need} to train on; name others")
    if num_kept < num_given:
        log.warning("%d are left out: only %s are used", num_given - num_kept, need)


def augment(clip: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Shift (edges repeated) and mirror all frames (t, h, w, 3) alike."""
    across, down = generator.integers(-7, 8, size=2)
    if generator.random() < 0.25:
        across = down = 0
    padded = np.pad(clip, ((0, 0), (7, 7), (7, 7), (0, 0)), "edge")
    height, width = clip.shape[1:3]
    clip = padded[:, 7 + down : 7 + down + height, 7 + across : 7 + across + width]
    return clip[:, :, ::-1] if generator.random() < 0.5 else clip
