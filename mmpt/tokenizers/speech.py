"""Speech codec: 16 kHz, 12.5 positions a second, learned from text and sound together.

Sound is cut into blocks (0.8 s, 10 positions, unless a config says otherwise). The encoder sees a
block and the context before it, never what follows, so encoding streams with the latency of a block
and constant memory, for sound of any length. The codes must both spell the transcript (CTC after
fourfold upsampling; text teaches the codes, as in GLM-4-Voice, arXiv 2412.02612) and rebuild the
log-mel frames. Decoding runs the same way, block by block; a vocoder makes waves of mel frames.

Legend: B batch, N samples, T mel frames (100 a second), n positions, Q codebooks, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.config import UserError, to_dict
from mmpt.tokenizers.base import Codec, tensors_of, through
from mmpt.tokenizers.quantize import QuantizerConfig, build_quantizer
from mmpt.tokenizers.speech_layers import Attention, transformer, zero_conv, zero_linear
from mmpt.tokenizers.speech_stream import (
    FRAMES_PER_CODE,
    SAMPLES_PER_CODE,
    SpeechDecodeStream,
    SpeechStream,
)
from mmpt.tokenizers.vocoder import NUM_MEL, SAMPLE_RATE, WaveHead
from mmpt.vocab import Modality

CHARACTERS = " abcdefghijklmnopqrstuvwxyz'"
CTC_UPSAMPLING = 4


def _default_quantizer() -> QuantizerConfig:
    return QuantizerConfig(kind="ema", codebook_size=512, width=32)


@dataclass(frozen=True, kw_only=True)
class SpeechCodecConfig:
    """Width and depth of both transformers; block and context in positions of 80 ms.

    vocoder: griffin-lim has no weights; istft is a small causal network of `vocoder_width`.
    """

    quantizer: QuantizerConfig = field(default_factory=_default_quantizer)
    width: int = 192
    num_layers: int = 4
    num_heads: int = 4
    block: int = 10
    context: int = 5
    vocoder: Literal["griffin-lim", "istft"] = "griffin-lim"
    vocoder_width: int = 128

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads", "block", "vocoder_width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}; use 1 or more")
        if self.context < 0:
            raise UserError(f"context = {self.context}; use 0 or more")
        if self.width % (2 * self.num_heads):
            raise UserError(f"width = {self.width} is no multiple of {2 * self.num_heads}")


def stack(mel: Tensor) -> Tensor:
    """Frames (..., 8 n, 80) -> (..., n, 640): those of one position."""
    return rearrange(mel, "... (n f) m -> ... n (f m)", f=FRAMES_PER_CODE)


class SpeechCodec(Codec):
    """wave: float (B, N) at 16 kHz in [-1, 1] -> codes int64 (B, ceil(N / 1280), Q)."""

    kind = "speech"
    modality = Modality.SPEECH
    config_class = SpeechCodecConfig
    config: SpeechCodecConfig
    sample_rate = SAMPLE_RATE
    samples_per_code = SAMPLES_PER_CODE

    def __init__(self, config: SpeechCodecConfig) -> None:
        super().__init__(config)
        width = config.width
        self.quantizer = build_quantizer(config.quantizer)
        # past both transformers: stacked frames to latents and back, see `begin`
        self.shortcut = nn.Linear(NUM_MEL * FRAMES_PER_CODE, self.quantizer.width)
        self.shortcut_back = nn.Linear(self.quantizer.width, NUM_MEL * FRAMES_PER_CODE)
        # two places a position: 25 a second inside, 12.5 after pooling
        self.stem = nn.Sequential(
            nn.Linear(NUM_MEL * FRAMES_PER_CODE // 2, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )
        self.encoder = transformer(width, config.num_heads, config.num_layers)
        self.to_latents = nn.Sequential(
            nn.RMSNorm(2 * width), zero_linear(2 * width, self.quantizer.width)
        )
        self.from_latents = nn.Linear(self.quantizer.width, 2 * width)
        self.decoder = transformer(width, config.num_heads, config.num_layers)
        self.to_mel = nn.Sequential(
            nn.RMSNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            zero_linear(2 * width, NUM_MEL * FRAMES_PER_CODE // 2),
        )
        self.smooth = nn.Sequential(
            nn.Conv1d(NUM_MEL, width, 5, padding=2),
            nn.GELU(),
            zero_conv(width, NUM_MEL, 5),
        )
        self.speller = nn.Sequential(
            Attention(width, config.num_heads),
            nn.RMSNorm(width),
            nn.Linear(width, CTC_UPSAMPLING // 2 * (1 + len(CHARACTERS))),
        )
        if config.vocoder == "istft":
            self.wave_head = WaveHead(config.vocoder_width)

    @classmethod
    def upgrade(cls, config: dict[str, Any], version: int) -> dict[str, Any]:
        """Format 1 knew moving averages only, with size and width of the codebook at the top."""
        if version < 2 and "codebook_size" in config:
            rest = {k: v for k, v in config.items() if k not in ("codebook_size", "code_width")}
            size, width = config["codebook_size"], config.get("code_width", 16)
            return rest | {"quantizer": {"kind": "ema", "codebook_size": size, "width": width}}
        return config

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def num_codebooks(self) -> int:
        return self.quantizer.num_codebooks

    @property
    def rate(self) -> str:
        return f"{SAMPLE_RATE / SAMPLES_PER_CODE * self.num_codebooks} codes a second"

    @property
    def block_samples(self) -> int:
        """Samples of one block, the unit of encoding."""
        return self.config.block * SAMPLES_PER_CODE

    @property
    def latency(self) -> float:
        """Seconds that a streamed wave is late after encoding and decoding: a block and 30 ms."""
        return self.block_samples / SAMPLE_RATE + SpeechDecodeStream.delay / SAMPLE_RATE

    @property
    def bits_per_second(self) -> float:
        """Positions a second times codebooks times log2 of their size."""
        bits = self.num_codebooks * math.log2(self.codebook_size)
        return SAMPLE_RATE / SAMPLES_PER_CODE * bits

    def code_latents(self) -> Tensor:
        if self.num_codebooks > 1:
            return super().code_latents()
        return self.quantizer.lookup(torch.arange(self.codebook_size, device=self.device)[:, None])

    def defining_config(self) -> dict[str, Any]:
        """Without the vocoder, and without options of quantisers that are at their default."""
        config, plain = to_dict(self.config), to_dict(QuantizerConfig())
        chosen = {k: v for k, v in config["quantizer"].items() if v != plain[k]}
        config = {k: v for k, v in config.items() if not k.startswith("vocoder")}
        return config | {"quantizer": {"kind": self.config.quantizer.kind, **chosen}}

    def defining_tensors(self) -> dict[str, Tensor]:
        state = tensors_of(self, ("shortcut", "stem", "encoder", "to_latents", "quantizer"))
        # what moving averages still remember defines no code
        return {k: v for k, v in state.items() if not k.endswith((".counts", ".sums"))}

    def encode_features(self, mel: Tensor) -> Tensor:
        """Log-mel (B, T, 80), T a multiple of the block -> unquantised features (B, n, width)."""
        return self._unwindow(self.encode_windows(self._windows(mel, FRAMES_PER_CODE)), len(mel))

    def decode_mel(self, latents: Tensor) -> Tensor:
        """Quantised latents (B, n, width), n a multiple of the block -> log-mel (B, 8 n, 80)."""
        return self._unwindow(self.decode_windows(self._windows(latents, 1)), len(latents))

    def spell(self, latents: Tensor) -> Tensor:
        """CTC logits (B, 4 n, 29) at 50 a second; class 0 is blank. Used in training only."""
        x = rearrange(self.from_latents(latents), "b n (p d) -> b (n p) d", p=2)
        return rearrange(self.speller(x), "b m (u c) -> b (m u) c", u=CTC_UPSAMPLING // 2)

    def ctc_loss(
        self, logits: Tensor, num_samples: Tensor, text: Tensor, num_text: Tensor
    ) -> tuple[Tensor, int]:
        """Mean CTC loss per character, and how many infeasible (too long) targets were left out."""
        steps = (num_samples * CTC_UPSAMPLING / SAMPLES_PER_CODE).ceil().long()
        steps = steps.clamp(max=logits.shape[1])
        repeats = ((text[:, 1:] == text[:, :-1]) & (text[:, 1:] > 0)).sum(1)
        feasible = (num_text > 0) & (steps >= num_text + repeats)
        infeasible = int(((num_text > 0) & ~feasible).sum())
        if not feasible.any():
            return logits.sum() * 0.0, infeasible
        chances = logits.float().log_softmax(-1)[feasible].transpose(0, 1)
        loss = F.ctc_loss(chances, text[feasible], steps[feasible], num_text[feasible])
        return loss, infeasible

    def _windows(self, x: Tensor, per_code: int) -> Tensor:
        """(B, n per_code, d) -> (B blocks, (context + block) per_code, d), zeros at the start."""
        context, block = self.config.context * per_code, self.config.block * per_code
        padded = F.pad(x, (0, 0, context, 0))
        windows = padded.unfold(1, context + block, block)
        return rearrange(windows, "b k d w -> (b k) w d")

    def _unwindow(self, x: Tensor, batch: int) -> Tensor:
        """(B blocks, w, d), of each window its block alone -> (B, blocks w, d)."""
        return rearrange(x, "(b k) w d -> b (k w) d", b=batch)

    def encode_windows(self, mel: Tensor) -> Tensor:
        """Log-mel (B, 8 (context + block), 80) -> features of the block (B, block, width)."""
        x = self.stem(rearrange(mel, "b (n f) m -> b n (f m)", f=FRAMES_PER_CODE // 2))
        x = rearrange(self.encoder(x), "b (n p) d -> b n (p d)", p=2)
        return (self.to_latents(x) + self.shortcut(stack(mel)))[:, self.config.context :]

    def decode_windows(self, latents: Tensor) -> Tensor:
        """Latents (B, context + block, width) -> log-mel of the block (B, 8 block, 80)."""
        x = rearrange(self.from_latents(latents), "b n (p d) -> b (n p) d", p=2)
        x = self.to_mel(self.decoder(x))
        mel = rearrange(x, "b n (f m) -> b m (n f)", m=NUM_MEL)
        mel = mel + rearrange(self.shortcut_back(latents), "b n (f m) -> b m (n f)", m=NUM_MEL)
        mel = mel + self.smooth(mel)
        return rearrange(mel, "b m t -> b t m")[:, self.config.context * FRAMES_PER_CODE :]

    @torch.no_grad()
    def begin(self, frames: Tensor, generator: torch.Generator) -> None:
        """Start training as k-means of principal components of stacked frames (N, 640).

        So the transformers, whose last layers are zero at first, learn what is better than that.
        """
        centred = frames - frames.mean(0)
        spreads, directions = torch.linalg.eigh(centred.T @ centred / len(frames))
        # on a sphere one dimension is kept constant, so that loudness is not lost
        constant = getattr(self.quantizer, "spherical", False)
        count = self.quantizer.width - constant
        first = directions.flip(1)[:, :count] / spreads[-1].sqrt().clamp(min=1e-6)
        self.shortcut.weight.zero_()
        self.shortcut.weight[constant : constant + first.shape[1]] = first.T
        self.shortcut.bias.copy_(-self.shortcut.weight @ frames.mean(0))
        if constant:
            self.shortcut.bias[0] = 3.0
        latents = self.shortcut(frames)
        self.quantizer.initialise(latents, generator)
        training = self.quantizer.training
        known = F.pad(self.quantizer.eval()(latents).latents, (0, 1), value=1.0)
        self.quantizer.train(training)
        best = torch.linalg.lstsq(known, frames, driver="gelsd").solution
        self.shortcut_back.weight.copy_(best[:-1].T)
        self.shortcut_back.bias.copy_(best[-1])

    @torch.inference_mode()
    def encode(self, wave: Tensor) -> Tensor:
        """Codes (B, ceil(N / 1280), Q): pushing each wave through a stream."""
        if wave.ndim != 2 or wave.numel() == 0:
            raise UserError(f"wave must be (batch, samples), not empty; got {tuple(wave.shape)}")
        return torch.stack([through(self.stream(), samples) for samples in wave])

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Wave float (B, 1280 n) in [-1, 1]: pushing each row of codes through a stream."""
        codes = self.check_codes(codes, 3)
        return torch.stack([through(self.decode_stream(), row) for row in codes])

    def stream(self) -> SpeechStream:
        """Samples in, codes out, a block late."""
        return SpeechStream(self)

    def decode_stream(self) -> SpeechDecodeStream:
        """Codes in, samples out."""
        return SpeechDecodeStream(self)


# by name: where the shape comes from, and the shape
PRESETS: Mapping[str, tuple[str, SpeechCodecConfig]] = {
    "glm-4-voice": (
        "GLM-4-Voice (arXiv 2412.02612): 16,384 codes at 12.5 Hz, 175 bit/s, blocks of 2 s; 16 of "
        "Whisper's layers there, as many of ours here",
        SpeechCodecConfig(
            quantizer=QuantizerConfig(kind="ema", codebook_size=16_384, width=64),
            width=1024,
            num_layers=16,
            num_heads=16,
            block=25,
            context=25,
        ),
    ),
    "mimi": (
        "Mimi (arXiv 2410.00037): 8 residual codebooks of 2,048 at 12.5 Hz, 1,100 bit/s; blocks of "
        "160 ms here, frames of 80 ms and convolutions on 24 kHz there",
        SpeechCodecConfig(
            quantizer=QuantizerConfig(
                kind="ema", codebook_size=2048, width=256, num_codebooks=8, dropout=0.5
            ),
            width=512,
            num_layers=8,
            num_heads=8,
            block=2,
            context=23,
        ),
    ),
    "speech-512": ("small; the shipped speech-12hz, 112.5 bit/s", SpeechCodecConfig()),
    "speech-1k": (
        "small; 125 bit/s",
        SpeechCodecConfig(quantizer=QuantizerConfig(kind="ema", codebook_size=1024, width=32)),
    ),
    "speech-2k": (
        "small; 137.5 bit/s",
        SpeechCodecConfig(quantizer=QuantizerConfig(kind="ema", codebook_size=2048, width=32)),
    ),
    "speech-8x256": (
        "small; residual, 8 codebooks of 256, 800 bit/s",
        SpeechCodecConfig(
            quantizer=QuantizerConfig(
                kind="ema", codebook_size=256, width=32, num_codebooks=8, dropout=0.5
            )
        ),
    ),
}
