"""What an image codec learns: pictures and frames."""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mmpt.parts import Image, Part, Video
from mmpt.tokenizers.image import ImageCodec, to_pixels
from mmpt.tokenizers.objectives.base import (
    Objective,
    augment,
    build_adversary,
    count_unusable,
)
from mmpt.tokenizers.objectives.pictures import PictureLoss
from mmpt.tokenizers.recipe import CodecRecipe


class ImageObjective(Objective):
    """Reconstruct pictures and frames, shifted and mirrored at random.

    Of a picture that is larger than the recipe's size, a part at a random place.
    """

    def __init__(self, recipe: CodecRecipe, documents: list[list[Part]]) -> None:
        self.codec: ImageCodec = ImageCodec(recipe.image)
        self.adversary = build_adversary(recipe)
        self.rebuilding = PictureLoss(recipe.loss, self.adversary)
        self.size, self.quantizer_weight = recipe.size, recipe.loss.quantizer
        self.seed, self.quantize_from = recipe.seed, recipe.warmup * 2
        pictures = [p.pixels for parts in documents for p in parts if isinstance(p, Image)]
        pictures += [
            f for parts in documents for p in parts if isinstance(p, Video) for f in p.frames[::4]
        ]
        self.pictures = [p for p in pictures if min(p.shape[:2]) >= self.size]
        need = f"pictures of {self.size} x {self.size} pixels"
        count_unusable(len(self.pictures), len(pictures), need)

    def batch(self, generator: np.random.Generator, size: int) -> dict[str, Tensor]:
        picks = generator.integers(len(self.pictures), size=size)
        pictures = [self._cut(self.pictures[i], generator) for i in picks]
        pictures = [augment(picture[None], generator)[0] for picture in pictures]
        return {"pixels": to_pixels(np.stack(pictures))}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        if step >= self.quantize_from and not self.codec.quantizer.ready:
            self._initialise(batch["pixels"].device)
        made, quantized = self.codec(batch["pixels"])
        loss, terms = self.rebuilding(made, batch["pixels"], step)
        terms |= {name: float(value.detach()) for name, value in quantized.parts.items()}
        return loss + self.quantizer_weight * quantized.loss, terms

    @torch.no_grad()
    def _initialise(self, device: torch.device) -> None:
        """The first codebook, from latents of the encoder as it is now."""
        codec, latents = self.codec, []
        generator, seeded = np.random.default_rng((self.seed, 1)), torch.Generator()
        while sum(map(len, latents)) < 4 * codec.codebook_size:
            pixels = self.batch(generator, 16)["pixels"].to(device)
            made = codec.to_latents(codec.encoder(pixels))
            latents.append(rearrange(made, "b d h w -> (b h w) d").float())
        codec.quantizer.initialise(torch.cat(latents), seeded.manual_seed(self.seed))

    def _cut(self, picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        spare = np.array(picture.shape[:2]) - self.size
        if not spare.any():
            return picture
        top, left = generator.integers(spare + 1)
        return picture[top : top + self.size, left : left + self.size]
