"""Codecs of sound from `transformers`: Mimi, DAC, EnCodec, X-Codec; see `adapters`.

A sound of N samples has ceil(N / hop) frames of Q codes, and n frames decode to n hop samples;
hop is `samples_per_code`.

Legend: B batch, N samples, n frames, Q codebooks, K codes of a codebook, D width of a code.
"""

import abc
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.config import UserError
from mmpt.tokenizers.adapters import MAX_SECONDS, Adapter, AdapterConfig, WholeStream
from mmpt.tokenizers.base import through
from mmpt.vocab import Modality


class SoundAdapter(Adapter):
    """wave: float (B, N) in [-1, 1] at `sample_rate` -> codes int64 (B, ceil(N / hop), Q)."""

    modality = Modality.SPEECH
    least_codebooks = 1

    def __init__(self, config: AdapterConfig, model: nn.Module) -> None:
        super().__init__(config, model)
        self.sample_rate = self._sample_rate()
        total = len(self.codebooks())
        if config.num_codebooks and not self.least_codebooks <= config.num_codebooks <= total:
            raise UserError(
                f"num_codebooks = {config.num_codebooks}; this {self.kind} codec has "
                f"{self.least_codebooks} to {total}"
            )

    @property
    @abc.abstractmethod
    def samples_per_code(self) -> int:
        """Samples that one frame of Q codes stands for."""

    @abc.abstractmethod
    def _encode(self, wave: Tensor) -> Tensor:
        """One wave (1, 1, N) -> codes (1, Q, ceil(N / hop))."""

    @abc.abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """Codes (1, Q, n) of one sound -> about n hop samples (..., samples)."""

    def _sample_rate(self) -> int:
        return int(self.model.config.sampling_rate)

    @property
    def rate(self) -> str:
        frames = self.sample_rate / self.samples_per_code
        return f"{frames:g} frames of {self.num_codebooks} codes a second"

    @torch.inference_mode()
    def encode(self, wave: Tensor) -> Tensor:
        """Codes (B, ceil(N / hop), Q); every sound is one unit, computed alone."""
        if wave.ndim != 2 or wave.numel() == 0 or not torch.isfinite(wave).all():
            raise UserError(
                f"wave must be (batch, samples), finite, not empty; got {tuple(wave.shape)}"
            )
        return torch.stack([through(self.stream(), samples) for samples in wave])

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Wave float (B, n hop) in [-1, 1]; accepts every legal code."""
        codes = self.check_codes(codes, 3)
        return torch.stack([through(self.decode_stream(), row) for row in codes])

    def stream(self) -> WholeStream:
        """push(samples (any,)) collects; flush() gives the codes (n, Q) of all of them."""
        nothing = torch.zeros((0, self.num_codebooks), dtype=torch.int64, device=self.device)
        limit = int(MAX_SECONDS * self.sample_rate)
        return WholeStream(self._encode_unit, nothing, limit=limit, unit="samples")

    def decode_stream(self) -> WholeStream:
        """push(codes (n, Q)) collects; flush() gives the samples (n hop,) of all of them."""
        nothing = torch.zeros(0, device=self.device)
        limit = math.ceil(MAX_SECONDS * self.sample_rate / self.samples_per_code)
        return WholeStream(self._decode_unit, nothing, limit=limit, unit="frames of codes")

    @torch.inference_mode()
    def _encode_unit(self, samples: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            codes = self._encode(samples.to(self.device, torch.float32)[None, None])
        return codes[0, : self.num_codebooks].T.contiguous()

    @torch.inference_mode()
    def _decode_unit(self, codes: Tensor) -> Tensor:
        codes = self.check_codes(codes, 2)
        with torch.autocast(self.device.type, enabled=False):
            wave = self._decode(codes.T.contiguous()[None]).reshape(-1)
        # strides that do not divide evenly leave some samples too few
        length = len(codes) * self.samples_per_code
        return F.pad(wave, (0, max(0, length - len(wave))))[:length].clamp(-1, 1)

    def _whole_frames(self, wave: Tensor) -> Tensor:
        return F.pad(wave, (0, -wave.shape[-1] % self.samples_per_code))


class MimiCodec(SoundAdapter):
    """Mimi (arXiv 2410.00037): one semantic codebook, and acoustic ones beside it."""

    kind = "mimi"
    model_class = "mimi.modeling_mimi:MimiModel"
    defining = ("encoder", "quantizer")

    def __init__(self, config: AdapterConfig, model: nn.Module) -> None:
        self.least_codebooks = int(model.config.num_semantic_quantizers)  # type: ignore[union-attr] # a model of transformers has a config
        super().__init__(config, model)
        _mono(self.model.config.audio_channels, self.kind)

    @property
    def samples_per_code(self) -> int:
        config = self.model.config
        return math.prod(config.upsampling_ratios) * config.latent_stride

    def codebooks(self) -> list[Tensor]:
        # the model keeps a quotient of its own, which does not follow to another device
        return [
            book.embed_sum / book.cluster_usage.clamp(min=book.epsilon)[:, None]
            for book in self._books()
        ]

    def _books(self) -> list:
        quantizer = self.model.quantizer
        first = quantizer.semantic_residual_vector_quantizer.layers
        others = quantizer.acoustic_residual_vector_quantizer.layers
        return [layer.codebook for layer in (*first, *others)]

    def _apply(self, fn, recurse: bool = True):
        for book in self._books():
            book._embed = None
        return super()._apply(fn, recurse)

    def _encode(self, wave: Tensor) -> Tensor:
        return self.model.encode(wave, num_quantizers=self.num_codebooks).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values


class DacCodec(SoundAdapter):
    """DAC (arXiv 2306.06546): residual codebooks of normalised, low-dimensional codes."""

    kind = "dac"
    model_class = "dac.modeling_dac:DacModel"
    defining = ("encoder", "quantizer")

    @property
    def samples_per_code(self) -> int:
        return math.prod(self.model.config.downsampling_ratios)

    def codebooks(self) -> list[Tensor]:
        return [layer.codebook.weight for layer in self.model.quantizer.quantizers]

    def _encode(self, wave: Tensor) -> Tensor:
        wave = self._whole_frames(wave)
        return self.model.encode(wave, n_quantizers=self.num_codebooks).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(audio_codes=codes).audio_values


class EncodecCodec(SoundAdapter):
    """EnCodec (arXiv 2210.13438) of one channel, computed whole.

    The 48 kHz model is refused: it scales each chunk by a number that no code carries.
    """

    kind = "encodec"
    model_class = "encodec.modeling_encodec:EncodecModel"
    defining = ("encoder", "quantizer")

    def __init__(self, config: AdapterConfig, model: nn.Module) -> None:
        super().__init__(config, model)
        given = self.model.config
        _mono(given.audio_channels, self.kind)
        if given.normalize or given.chunk_length_s is not None:
            raise UserError(
                f"this encodec codec has normalize = {given.normalize} and chunks of "
                f"{given.chunk_length_s} s, whose scales are no codes; use one without, such as "
                "the 24 kHz model"
            )

    @property
    def samples_per_code(self) -> int:
        return math.prod(self.model.config.upsampling_ratios)

    def codebooks(self) -> list[Tensor]:
        return [layer.codebook.embed for layer in self.model.quantizer.layers]

    def _encode(self, wave: Tensor) -> Tensor:
        widest = self.model.config.target_bandwidths[-1]
        return self.model.encode(wave, bandwidth=widest).audio_codes[0]

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[None], [None]).audio_values


class XcodecCodec(SoundAdapter):
    """X-Codec (arXiv 2408.17175): residual codebooks of acoustic and semantic features."""

    kind = "xcodec"
    model_class = "xcodec.modeling_xcodec:XcodecModel"
    defining = ("acoustic_encoder", "encoder_semantic", "semantic_model", "fc", "quantizer")

    @property
    def samples_per_code(self) -> int:
        return int(self.model.config.hop_length)

    def _sample_rate(self) -> int:
        return int(self.model.config.sample_rate)

    def codebooks(self) -> list[Tensor]:
        return [layer.codebook.embed for layer in self.model.quantizer.quantizers]

    def _encode(self, wave: Tensor) -> Tensor:
        return self.model.encode(self._whole_frames(wave)).audio_codes

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values


def _mono(channels: int, kind: str) -> None:
    if channels != 1:
        raise UserError(f"this {kind} codec has {channels} channels; use one of a single channel")
