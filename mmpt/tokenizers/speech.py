"""Speech codec: 16 kHz, 12.5 codes a second, one codebook, learned from text and sound together.

Sound is cut into blocks of 0.8 s (10 codes). The encoder sees a block and the 0.8 s before it,
never what follows, so encoding streams with 0.8 s latency and constant memory, and a block's codes
are a pure function of 1.6 s of samples. The codes must both spell the transcript (CTC after
fourfold upsampling) and rebuild the log-mel frames. Decoding runs the same way, block by block;
Griffin-Lim turns mel frames into a wave.

Legend: B batch, N samples, T mel frames (100 a second), n codes, D width.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.config import UserError
from mmpt.tokenizers.base import Codec, tensors_of
from mmpt.tokenizers.quantize import EMAVectorQuantizer
from mmpt.tokenizers.vocoder import (
    HOP,
    NUM_MEL,
    SAMPLE_RATE,
    SILENCE,
    WINDOW,
    GriffinLim,
    log_mel,
)
from mmpt.vocab import Modality

FRAMES_PER_CODE = 8
SAMPLES_PER_CODE = HOP * FRAMES_PER_CODE
CHARACTERS = " abcdefghijklmnopqrstuvwxyz'"
CTC_UPSAMPLING = 4


@dataclass(frozen=True, kw_only=True)
class SpeechCodecConfig:
    """Width and depth of both transformers; block and context in codes of 80 ms."""

    codebook_size: int = 512
    code_width: int = 16
    width: int = 192
    num_layers: int = 4
    num_heads: int = 4
    block: int = 10
    context: int = 10

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1:
            raise UserError(f"{self}: every value must be 1 or more")
        if self.width % (2 * self.num_heads):
            raise UserError(f"width = {self.width} is no multiple of {2 * self.num_heads}")
        if self.context > self.block:
            raise UserError(f"context = {self.context} is longer than block = {self.block}")


class Attention(nn.Module):
    """Pre-norm transformer layer with rotary positions, over one window."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, D) -> same; everything in the window sees everything."""
        qkv = rearrange(self.qkv(self.norm1(x)), "b n (p h d) -> p b h n d", p=3, h=self.num_heads)
        q, k, v = _rotate(qkv[0]), _rotate(qkv[1]), qkv[2]
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(rearrange(mixed, "b h n d -> b n (h d)"))
        return x + self.mlp(self.norm2(x))


def _rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    place = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    speed = 1000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = place[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class SpeechCodec(Codec):
    """wave: float (B, N) at 16 kHz in [-1, 1] -> codes int64 (B, ceil(N / 1280), 1)."""

    kind = "speech"
    modality = Modality.SPEECH
    config_class = SpeechCodecConfig
    config: SpeechCodecConfig
    sample_rate = SAMPLE_RATE
    samples_per_code = SAMPLES_PER_CODE
    mel_hop = HOP

    def __init__(self, config: SpeechCodecConfig) -> None:
        super().__init__(config)
        width = config.width
        self.quantizer = EMAVectorQuantizer(config.codebook_size, config.code_width)
        # one position is two codes' half: 25 a second inside, 12.5 after pooling
        self.stem = nn.Sequential(
            nn.Linear(NUM_MEL * FRAMES_PER_CODE // 2, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )
        self.encoder = nn.Sequential(
            *[Attention(width, config.num_heads) for _ in range(config.num_layers)]
        )
        self.to_latents = nn.Sequential(
            nn.RMSNorm(2 * width), nn.Linear(2 * width, config.code_width)
        )
        self.from_latents = nn.Linear(config.code_width, 2 * width)
        self.decoder = nn.Sequential(
            *[Attention(width, config.num_heads) for _ in range(config.num_layers)]
        )
        self.to_mel = nn.Sequential(
            nn.RMSNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, NUM_MEL * FRAMES_PER_CODE // 2),
        )
        self.smooth = nn.Sequential(
            nn.Conv1d(NUM_MEL, width, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(width, NUM_MEL, 5, padding=2),
        )
        self.speller = nn.Sequential(
            Attention(width, config.num_heads),
            nn.RMSNorm(width),
            nn.Linear(width, CTC_UPSAMPLING // 2 * (1 + len(CHARACTERS))),
        )

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def rate(self) -> str:
        return f"{SAMPLE_RATE / SAMPLES_PER_CODE} codes a second"

    @property
    def block_samples(self) -> int:
        """Samples of one block, the unit of encoding."""
        return self.config.block * SAMPLES_PER_CODE

    @property
    def bits_per_second(self) -> float:
        """Codes a second times log2 of the codebook."""
        return SAMPLE_RATE / SAMPLES_PER_CODE * math.log2(self.codebook_size)

    def code_latents(self) -> Tensor:
        return self.quantizer.lookup(torch.arange(self.codebook_size, device=self.device)[:, None])

    def defining_tensors(self) -> dict[str, Tensor]:
        codebook = {"quantizer.codebook": self.quantizer.codebook}
        return tensors_of(self, ("stem", "encoder", "to_latents")) | codebook

    def encode_features(self, mel: Tensor) -> Tensor:
        """Log-mel (B, T, 80), T a multiple of the block -> unquantised features (B, n, width)."""
        windows = self._windows(mel, FRAMES_PER_CODE)
        return self._unwindow(self._encode_windows(windows), mel.shape[0])

    def decode_mel(self, latents: Tensor) -> Tensor:
        """Quantised latents (B, n, width), n a multiple of the block -> log-mel (B, 8 n, 80)."""
        return self._unwindow(self._decode_windows(self._windows(latents, 1)), latents.shape[0])

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

    def _encode_windows(self, mel: Tensor) -> Tensor:
        x = self.stem(rearrange(mel, "b (n f) m -> b n (f m)", f=FRAMES_PER_CODE // 2))
        x = rearrange(self.encoder(x), "b (n p) d -> b n (p d)", p=2)
        return self.to_latents(x)[:, self.config.context :]

    def _decode_windows(self, latents: Tensor) -> Tensor:
        x = rearrange(self.from_latents(latents), "b n (p d) -> b (n p) d", p=2)
        x = self.to_mel(self.decoder(x))
        mel = rearrange(x, "b n (f m) -> b m (n f)", m=NUM_MEL)
        mel = mel + self.smooth(mel)
        return rearrange(mel, "b m t -> b t m")[:, self.config.context * FRAMES_PER_CODE :]

    @torch.inference_mode()
    def encode(self, wave: Tensor) -> Tensor:
        """Codes (B, ceil(N / 1280), 1): pushing each wave through a stream."""
        if wave.ndim != 2 or wave.shape[1] == 0 or not torch.isfinite(wave).all():
            raise UserError(
                f"wave must be (batch, samples), finite, not empty; got {tuple(wave.shape)}"
            )
        out = []
        for samples in wave:
            stream = self.stream()
            out.append(torch.cat([stream.push(samples), stream.flush()]))
        return torch.stack(out)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Wave float (B, 1280 n) in [-1, 1]: pushing each row of codes through a stream."""
        codes = self.check_codes(codes, 3)
        out = []
        for row in codes:
            stream = self.decode_stream()
            out.append(torch.cat([stream.push(row), stream.flush()]))
        return torch.stack(out)

    def stream(self) -> "SpeechStream":
        """Samples in, codes out, 0.8 s late."""
        return SpeechStream(self)

    def decode_stream(self) -> "SpeechDecodeStream":
        """Codes in, samples out."""
        return SpeechDecodeStream(self)


class SpeechStream:
    """push(samples (any,)) -> codes (n, 1). Units: one block of samples, and the one before it."""

    def __init__(self, codec: SpeechCodec) -> None:
        self.codec = codec
        # a window more than the context, so that its first mel frames are exact
        self._history = codec.config.context * SAMPLES_PER_CODE + WINDOW
        self._past = torch.zeros(self._history, device=codec.device)
        self._waiting = torch.zeros(0, device=codec.device)
        self._begun = False

    @torch.inference_mode()
    def push(self, samples: Tensor) -> Tensor:
        """Codes of the blocks that are complete."""
        self._waiting = torch.cat([self._waiting, samples.to(self.codec.device, torch.float32)])
        size, codes = self.codec.block_samples, [self._empty()]
        while len(self._waiting) >= size:
            codes.append(self._unit(self._waiting[:size]))
            self._waiting = self._waiting[size:].clone()
        return torch.cat(codes)

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """Codes of the tail, padded with silence; one code for every 1,280 samples begun."""
        if not len(self._waiting):
            return self._empty()
        wanted = math.ceil(len(self._waiting) / SAMPLES_PER_CODE)
        tail = F.pad(self._waiting, (0, self.codec.block_samples - len(self._waiting)))
        self._waiting = self._waiting[:0]
        return self._unit(tail)[:wanted]

    def _unit(self, block: Tensor) -> Tensor:
        codec = self.codec
        seen = torch.cat([self._past, block])
        self._past = seen[-self._history :].clone()
        with torch.autocast(codec.device.type, enabled=False):
            mel = log_mel(seen[None])[:, WINDOW // HOP :]
            if not self._begun:  # before the first sample there is no frame, not a silent one
                mel[:, : codec.config.context * FRAMES_PER_CODE] = 0
                self._begun = True
            return codec.quantizer(codec._encode_windows(mel)).codes[0]

    def _empty(self) -> Tensor:
        return torch.zeros((0, 1), dtype=torch.int64, device=self.codec.device)


class SpeechDecodeStream:
    """push(codes (n, 1)) -> samples. Units: one block of codes with the block before it."""

    def __init__(self, codec: SpeechCodec) -> None:
        self.codec = codec
        self._past: Tensor | None = None
        self._waiting = torch.zeros((0, 1), dtype=torch.int64, device=codec.device)
        self._vocoder = GriffinLim(codec.config.block * FRAMES_PER_CODE, codec.device)
        self._late = GriffinLim.DELAY  # samples still to drop: they fall before the first code
        self._owed = 0  # samples that the codes so far stand for and that are not out yet

    @torch.inference_mode()
    def push(self, codes: Tensor) -> Tensor:
        """Samples of the blocks that are complete, 30 ms late."""
        if len(codes):
            codes = self.codec.check_codes(codes, 2)
        self._waiting = torch.cat([self._waiting, codes.to(self.codec.device)])
        block, wave = self.codec.config.block, [torch.zeros(0, device=self.codec.device)]
        while len(self._waiting) >= block:
            wave.append(self._unit(self._waiting[:block], block))
            self._waiting = self._waiting[block:]
        return torch.cat(wave)

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """The samples that are left: 1,280 for each code in all."""
        count, block = len(self._waiting), self.codec.config.block
        if self._past is None and not count:
            return torch.zeros(0, device=self.codec.device)
        owed, wave = self._owed + count * SAMPLES_PER_CODE, []
        if count:
            tail = torch.cat([self._waiting, self._waiting[-1:].expand(block - count, 1)])
            self._waiting = self._waiting[:0]
            wave.append(self._unit(tail, count))
        silence = torch.full((1, block * FRAMES_PER_CODE, NUM_MEL), SILENCE)
        wave.append(self._vocode(silence.to(self.codec.device)))
        return torch.cat(wave)[:owed]

    def _unit(self, codes: Tensor, count: int) -> Tensor:
        codec = self.codec
        with torch.autocast(codec.device.type, enabled=False):
            latents = codec.quantizer.lookup(codes)[None]
            past = torch.zeros_like(latents) if self._past is None else self._past
            self._past = latents
            mel = codec._decode_windows(torch.cat([past[:, -codec.config.context :], latents], 1))
        mel[:, count * FRAMES_PER_CODE :] = SILENCE
        self._owed += count * SAMPLES_PER_CODE
        return self._vocode(mel)

    def _vocode(self, mel: Tensor) -> Tensor:
        wave = self._vocoder.push(mel)[self._late :]
        self._late = 0
        self._owed -= len(wave)
        return wave
