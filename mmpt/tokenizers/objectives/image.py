"""What an image codec learns: pictures and frames."""

import numpy as np
from torch import Tensor

from mmpt.parts import Image, Part, Video
from mmpt.tokenizers.image import ImageCodec, to_pixels
from mmpt.tokenizers.losses import pixel_loss
from mmpt.tokenizers.objectives.base import PICTURE, Objective, augment, usable
from mmpt.tokenizers.recipe import CodecRecipe


class ImageObjective(Objective):
    """Reconstruct pictures and frames, shifted and mirrored at random."""

    def __init__(self, recipe: CodecRecipe, documents: list[list[Part]]) -> None:
        self.codec: ImageCodec = ImageCodec(recipe.image)
        pictures = [p.pixels for parts in documents for p in parts if isinstance(p, Image)]
        pictures += [
            f for parts in documents for p in parts if isinstance(p, Video) for f in p.frames[::4]
        ]
        self.pictures = np.stack(usable(pictures, PICTURE, "pictures of 64 x 64 pixels"))

    def batch(self, generator: np.random.Generator, size: int) -> dict[str, Tensor]:
        picks = generator.integers(len(self.pictures), size=size)
        pictures = [augment(self.pictures[i][None], generator)[0] for i in picks]
        return {"pixels": to_pixels(np.stack(pictures))}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        made, quantized = self.codec(batch["pixels"])
        loss = pixel_loss(made, batch["pixels"])
        return loss + quantized.loss, {"used": quantized.codes.unique().numel()}
