"""What a speech codec learns: sound and its transcript.

Training works on log-mel frames, which are computed once; only a learned vocoder needs the waves.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmpt.config import UserError
from mmpt.parts import Audio, Part, Text
from mmpt.tokenizers.losses import mel_loss
from mmpt.tokenizers.objectives.base import Objective, build_adversary
from mmpt.tokenizers.objectives.voices import vary
from mmpt.tokenizers.objectives.waves import crop, wave_loss
from mmpt.tokenizers.recipe import CodecRecipe
from mmpt.tokenizers.speech import CHARACTERS, SpeechCodec, stack
from mmpt.tokenizers.speech_stream import FRAMES_PER_CODE
from mmpt.tokenizers.vocoder import HOP, SILENCE, WINDOW, log_mel

MAX_SECONDS = 8.0  # that one training utterance may take
COMMITMENT = 0.5


class SpeechObjective(Objective):
    """Reconstruct log-mel frames and spell the transcript (CTC), through the same codes."""

    def __init__(self, recipe: CodecRecipe, documents: list[list[Part]]) -> None:
        self.codec: SpeechCodec = SpeechCodec(recipe.speech)
        self.augment, self.spelling = recipe.augment, recipe.spelling
        self.commitment = COMMITMENT * recipe.loss.quantizer
        self.adversary = build_adversary(recipe, num_channels=1)
        self.adversary_weight = recipe.loss.discriminator
        self.seed = recipe.seed
        self.mels: list[Tensor] = []
        self.waves: list[np.ndarray] = []  # for a vocoder that learns
        self.texts: list[list[int]] = []
        for parts in documents:
            labels = [part.text for part in parts if isinstance(part, Text)]
            for part in parts:
                if isinstance(part, Audio):
                    self._keep(part.resample(self.codec.sample_rate).wave, labels)
        if not self.mels:
            raise UserError("the shards hold no sound to train on; name others")
        self.by_length = np.argsort([len(mel) for mel in self.mels], kind="stable")
        self.codec.begin(self._frames(), torch.Generator().manual_seed(recipe.seed))

    def batch(self, generator: np.random.Generator, size: int) -> dict[str, Tensor]:
        # of similar length, so that little is padding
        near = self.by_length[generator.integers(len(self.mels)) :][: 4 * size]
        if len(near) < size:
            near = self.by_length[-4 * size :]
        picks = generator.choice(near, size=min(size, len(near)), replace=False)
        mels = [self.mels[i] for i in picks]
        if self.augment:  # half of them, for sounds as they are matter most
            mels = [vary(mel, generator) if generator.random() < 0.5 else mel for mel in mels]
        block = self.codec.config.block * FRAMES_PER_CODE
        mels = [_shift(mel, generator, block) for mel in mels]
        length = max(math.ceil(len(mel) / block) for mel in mels) * block
        texts = [self.texts[i] for i in picks]
        width = max(1, *map(len, texts))
        batch = {
            "mel": torch.stack(
                [F.pad(mel, (0, 0, 0, length - len(mel)), value=SILENCE) for mel in mels]
            ),
            "num_samples": torch.tensor([len(mel) * HOP for mel in mels]),
            "text": torch.tensor([text + [0] * (width - len(text)) for text in texts]),
            "num_text": torch.tensor([len(text) for text in texts]),
        }
        if self.waves:
            batch["wave"] = torch.stack([crop(self.waves[i], generator) for i in picks])
        return batch

    def loss(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        codec, mel = self.codec, batch["mel"]
        features = codec.encode_features(mel)
        out = codec.quantizer(features)
        positions = torch.arange(features.shape[1], device=mel.device)
        last = (batch["num_samples"] - 1).div(codec.samples_per_code, rounding_mode="floor")
        # a decoder that is given too few codes for a block repeats the last: so it is here
        kept = positions.minimum(last[:, None])[..., None].expand_as(out.latents)
        latents = out.latents.gather(1, kept)
        made, letters = codec.decode_mel(latents), codec.spell(out.latents)
        frames = torch.arange(mel.shape[1], device=mel.device)
        mask = (frames * HOP < batch["num_samples"][:, None]).float()
        reconstruction = mel_loss(made, mel, mask)
        spelling, infeasible = codec.ctc_loss(
            letters, batch["num_samples"], batch["text"], batch["num_text"]
        )
        self.infeasible += infeasible
        loss = reconstruction + self.spelling * spelling + self.commitment * out.loss
        metrics = {
            "mel": float(reconstruction.detach()),
            "ctc": float(spelling.detach()),
            "used": out.codes.unique().numel(),
            "infeasible": self.infeasible,
        }
        if self.adversary is not None and self.adversary.active(step):
            # frames are a picture of one channel; what is padded cannot tell them apart
            shown = torch.where(mask[..., None] > 0, made.float(), mel)
            term = self.adversary.term(shown[:, None], mel[:, None])
            loss = loss + self.adversary_weight * term
            metrics["adversary"] = float(term.detach())
        if "wave" in batch:
            sounding = wave_loss(codec.wave_head, batch["wave"])
            loss = loss + sounding
            metrics["wave"] = float(sounding.detach())
        return loss, metrics

    def _keep(self, wave: np.ndarray, labels: list[str]) -> None:
        # the frames after the end still hear it
        padded = F.pad(torch.from_numpy(wave), (0, WINDOW - len(wave) % HOP))
        self.mels.append(log_mel(padded[None])[0])
        self.texts.append(_spell(labels[0]) if labels else [])
        if self.codec.config.vocoder == "istft":
            self.waves.append(wave)

    def _frames(self) -> Tensor:
        """Stacked frames (N, 640) of a sample of what is trained on."""
        generator, frames = np.random.default_rng((self.seed, 1)), []
        for _ in range(16):
            batch = self.batch(generator, 64)
            stacked = stack(batch["mel"])
            place = torch.arange(stacked.shape[1]) * self.codec.samples_per_code
            frames.append(stacked[place < batch["num_samples"][:, None]])
        return torch.cat(frames)


def _shift(mel: Tensor, generator: np.random.Generator, block: int) -> Tensor:
    """A random start in half of all, so that blocks do not depend on where a sentence begins."""
    size = int(generator.integers(max(1, block // 2))) if generator.random() < 0.5 else 0
    return F.pad(mel, (0, 0, size, 0), value=SILENCE)[: round(MAX_SECONDS * 100)]


def _spell(text: str) -> list[int]:
    return [CHARACTERS.index(c) + 1 for c in text.lower() if c in CHARACTERS]
