"""What a speech codec learns: sound and its transcript."""

import math

import numpy as np
import torch
from torch import Tensor

from mmpt.config import UserError
from mmpt.parts import Audio, Part, Text
from mmpt.tokenizers.losses import mel_loss
from mmpt.tokenizers.objectives.base import Objective
from mmpt.tokenizers.recipe import CodecRecipe
from mmpt.tokenizers.speech import CHARACTERS, SpeechCodec
from mmpt.tokenizers.vocoder import log_mel

MAX_BLOCKS = 6  # of 0.8 s, that one training utterance may take


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
        if step >= self.quantize_from and not codec.quantizer.ready:
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
