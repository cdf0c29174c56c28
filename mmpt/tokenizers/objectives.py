"""What each kind of codec learns: how a batch is drawn, and the loss.

A batch is a pure function of the generator that is handed in, so that a resumed training equals an
uninterrupted one. Media that an objective cannot use are counted and reported.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mmpt.config import UserError
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.tokenizers.base import Codec, load_codec
from mmpt.tokenizers.image import ImageCodec, to_pixels
from mmpt.tokenizers.losses import mel_loss, pixel_loss
from mmpt.tokenizers.recipe import CodecRecipe
from mmpt.tokenizers.speech import CHARACTERS, SpeechCodec
from mmpt.tokenizers.video import GROUP, VideoCodec
from mmpt.tokenizers.vocoder import log_mel

log = logging.getLogger(__name__)

PICTURE = (64, 64, 3)  # what pictures and frames are trained on
MAX_FRAMES = 1 + 4 * GROUP  # of one training clip
MAX_BLOCKS = 6  # of 0.8 s, that one training utterance may take


class Objective(ABC):
    """What a codec learns: draws batches and computes losses."""

    codec: Codec
    infeasible: int = 0  # targets that no codes could spell, so far

    @abstractmethod
    def batch(self, generator: np.random.Generator, size: int) -> dict[str, Tensor]:
        """Draw a training batch."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss and what to log."""

    def trained(self) -> torch.nn.Module:
        """The module whose parameters are trained and averaged."""
        return self.codec


class ImageObjective(Objective):
    """Reconstruct pictures and frames, shifted and mirrored at random."""

    def __init__(self, recipe: CodecRecipe, documents: list[list[Part]]) -> None:
        self.codec: ImageCodec = ImageCodec(recipe.image)
        pictures = [p.pixels for parts in documents for p in parts if isinstance(p, Image)]
        pictures += [
            f for parts in documents for p in parts if isinstance(p, Video) for f in p.frames[::4]
        ]
        self.pictures = np.stack(_usable(pictures, PICTURE, "pictures of 64 x 64 pixels"))

    def batch(self, generator: np.random.Generator, size: int) -> dict[str, Tensor]:
        picks = generator.integers(len(self.pictures), size=size)
        pictures = [_augment(self.pictures[i][None], generator)[0] for i in picks]
        return {"pixels": to_pixels(np.stack(pictures))}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        made, quantized = self.codec(batch["pixels"])
        loss = pixel_loss(made, batch["pixels"])
        return loss + quantized.loss, {"used": quantized.codes.unique().numel()}


class VideoObjective(Objective):
    """Reconstruct clips; the image codec inside stays as it is."""

    def __init__(self, recipe: CodecRecipe, documents: list[list[Part]]) -> None:
        image = load_codec(recipe.base)
        if not isinstance(image, ImageCodec):
            raise UserError(f"base = {recipe.base!r} must name an image codec")
        self.codec: VideoCodec = VideoCodec(recipe.video, image)
        clips = [p.frames for parts in documents for p in parts if isinstance(p, Video)]
        need = f"clips of {1 + GROUP} or more frames of 64 x 64 pixels"
        clips = [clip if len(clip) > GROUP else clip[:0] for clip in clips]
        self.clips = _usable(clips, PICTURE, need)

    def batch(self, generator: np.random.Generator, size: int) -> dict[str, Tensor]:
        shortest = min(len(clip) for clip in self.clips)
        num_frames = min(MAX_FRAMES, 1 + (shortest - 1) // GROUP * GROUP)
        clips = []
        for i in generator.integers(len(self.clips), size=size):
            clip = self.clips[i]
            first = generator.integers(len(clip) - num_frames + 1)
            clip = clip[first : first + num_frames]
            clips.append(_augment(clip[::-1] if generator.random() < 0.5 else clip, generator))
        pixels = to_pixels(rearrange(np.stack(clips), "b t h w c -> (b t) h w c"))
        return {"pixels": rearrange(pixels, "(b t) c h w -> b t c h w", b=size)}

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        made, codes = self.codec(batch["pixels"])
        real = batch["pixels"][:, 1:]
        return pixel_loss(made.flatten(0, 1), real.flatten(0, 1)), {"used": codes.unique().numel()}

    def trained(self) -> torch.nn.Module:
        return self.codec.temporal


class SpeechObjective(Objective):
    """Reconstruct log-mel frames and spell the transcript (CTC), through the same codes."""

    def __init__(self, recipe: CodecRecipe, documents: list[list[Part]]) -> None:
        self.codec: SpeechCodec = SpeechCodec(recipe.speech)
        self.quantize_from = recipe.warmup * 2
        self.augment, self.spelling = recipe.augment, recipe.spelling
        self.seed = recipe.seed
        self.waves, self.texts = [], []
        for parts in documents:
            sounds = [p for p in parts if isinstance(p, Audio)]
            labels = [p.text for p in parts if isinstance(p, Text)]
            for sound in sounds:
                self.waves.append(sound.resample(self.codec.sample_rate).wave)
                self.texts.append(_spell(labels[0]) if labels else [])
        if not self.waves:
            raise UserError("the shards hold no sound to train on; name others")
        self.by_length = np.argsort([len(wave) for wave in self.waves], kind="stable")

    def batch(self, generator: np.random.Generator, size: int) -> dict[str, Tensor]:
        # of similar length, so that little is padding
        near = self.by_length[generator.integers(len(self.waves)) :][: 4 * size]
        if len(near) < size:
            near = self.by_length[-4 * size :]
        picks = generator.choice(near, size=min(size, len(near)), replace=False)
        block = self.codec.block_samples
        waves = [self.waves[i] for i in picks]
        if self.augment:
            waves = [_vary(wave, generator) for wave in waves]
        waves = [_shift(wave, generator, block) for wave in waves]
        length = max(1, *[math.ceil(len(wave) / block) for wave in waves]) * block
        texts = [self.texts[i] for i in picks]
        width = max(1, *[len(text) for text in texts])
        return {
            "wave": torch.from_numpy(np.stack([np.pad(w, (0, length - len(w))) for w in waves])),
            "num_samples": torch.tensor([len(wave) for wave in waves]),
            "text": torch.tensor([text + [0] * (width - len(text)) for text in texts]),
            "num_text": torch.tensor([len(text) for text in texts]),
        }

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        codec = self.codec
        mel = log_mel(batch["wave"])
        features = codec.encode_features(mel)
        if step >= self.quantize_from and not codec.quantizer.initialised:
            self._initialise()
        out = codec.quantizer(features)
        made, letters = codec.decode_mel(out.latents), codec.spell(out.latents)
        frames = torch.arange(mel.shape[1])
        mask = (frames[None] * codec.mel_hop < batch["num_samples"][:, None]).float()
        reconstruction = mel_loss(made, mel, mask)
        spelling, infeasible = codec.ctc_loss(
            letters, batch["num_samples"], batch["text"], batch["num_text"]
        )
        self.infeasible += infeasible
        loss = reconstruction + self.spelling * spelling + 0.5 * out.loss
        return loss, {
            "mel": float(reconstruction.detach()),
            "ctc": float(spelling.detach()),
            "used": out.codes.unique().numel(),
            "infeasible": self.infeasible,
        }

    @torch.no_grad()
    def _initialise(self) -> None:
        generator = np.random.default_rng((self.seed, 1))
        features = []
        for _ in range(8):
            batch = self.batch(generator, 64)
            codes = self.codec.encode_features(log_mel(batch["wave"]))
            place = torch.arange(codes.shape[1]) * self.codec.samples_per_code
            features.append(codes[place[None] < batch["num_samples"][:, None]])
        seeded = torch.Generator().manual_seed(self.seed)
        self.codec.quantizer.initialise(torch.cat(features), seeded)


OBJECTIVES: dict[str, Callable[[CodecRecipe, list[list[Part]]], Objective]] = {
    "image": ImageObjective,
    "video": VideoObjective,
    "speech": SpeechObjective,
}


def _usable(arrays: Sequence[np.ndarray], shape: tuple[int, ...], need: str) -> list[np.ndarray]:
    """Those whose last sides are `shape`; the rest is counted. Raises UserError when none is."""
    kept = [array for array in arrays if array.shape[-3:] == shape and len(array)]
    if not kept:
        raise UserError(f"the shards hold no {need} to train on; name others")
    if len(kept) < len(arrays):
        log.warning("%d are left out: only %s are used", len(arrays) - len(kept), need)
    return kept


def _augment(clip: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Shift (edges repeated) and mirror all frames (t, h, w, 3) alike."""
    across, down = generator.integers(-7, 8, size=2)
    if generator.random() < 0.25:
        across = down = 0
    padded = np.pad(clip, ((0, 0), (7, 7), (7, 7), (0, 0)), "edge")
    height, width = clip.shape[1:3]
    clip = padded[:, 7 + down : 7 + down + height, 7 + across : 7 + across + width]
    return clip[:, :, ::-1] if generator.random() < 0.5 else clip


def _shift(wave: np.ndarray, generator: np.random.Generator, block: int) -> np.ndarray:
    """A random start in half of all, so that blocks do not depend on where a sentence begins."""
    size = generator.integers(block // 2) if generator.random() < 0.5 else 0
    return np.concatenate([np.zeros(size, dtype=np.float32), wave])[: MAX_BLOCKS * block]


def _vary(wave: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Speed, loudness and noise at random."""
    places = np.arange(0, len(wave) - 1, generator.uniform(0.9, 1.1))
    wave = np.interp(places, np.arange(len(wave)), wave) * generator.uniform(0.5, 1.5)
    noise = generator.normal(0, 10 ** generator.uniform(-5, -3), len(wave))
    return np.clip(wave + noise, -1, 1).astype(np.float32)


def _spell(text: str) -> list[int]:
    return [CHARACTERS.index(c) + 1 for c in text.lower() if c in CHARACTERS]
