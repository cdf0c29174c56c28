"""Report cards of sound: distances, intelligibility, and the words that a recogniser hears.

All is measured on the waves that come out, at 16 kHz: of the codec, of k-means of stacked log-mel
frames in as many bits, and of Griffin-Lim on the true log-mel frames, the ceiling.

Legend: N samples, T mel frames (100 a second), n codes, Q codebooks.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torchaudio.functional
from torch import Tensor
from torch.nn import functional as F

from mmpt.config import UserError
from mmpt.data.shards import Document
from mmpt.parts import Audio, Text
from mmpt.progress import Bar
from mmpt.tokenizers.base import Codec
from mmpt.tokenizers.cards.baseline import FrameKMeans
from mmpt.tokenizers.cards.system import Block, System, Tally, mean
from mmpt.tokenizers.vocoder import (
    FFT,
    HOP,
    SAMPLE_RATE,
    SILENCE,
    WINDOW,
    log_mel,
    mel_magnitude,
)

log = logging.getLogger(__name__)

MEL_RATE = SAMPLE_RATE / HOP
SCALES = (2048, 1024, 512, 256, 128)  # samples a window, of the spectral distance
FLOOR = 1e-4  # magnitudes below this are silence
# ViSQOL runs at five times real time: it hears the first seconds of some
NUM_VISQOL, VISQOL_SECONDS = 12, 3


@dataclass(frozen=True)
class Utterance:
    """wave: float (N,) at 16 kHz; text: what is said and voice: who says it, "" if unknown.

    source: the data set that it belongs to.
    """

    wave: Tensor
    text: str
    voice: str
    source: str = ""


def utterances(documents: Sequence[Document]) -> list[Utterance]:
    """Every sound, with the text of its document where there is exactly one."""
    found = []
    for document in documents:
        texts = [part.text for part in document.parts if isinstance(part, Text)]
        sounds = [part for part in document.parts if isinstance(part, Audio)]
        voices = document.voices or ("",) * len(sounds)
        for sound, voice in zip(sounds, voices, strict=True):
            wave = torch.from_numpy(sound.resample(SAMPLE_RATE).wave)
            text = texts[0] if len(texts) == 1 else ""
            found.append(Utterance(wave, text, voice, document.source))
    if not found:
        raise UserError("the shards hold no sound to measure; name others")
    return found


def measure_sound(
    codec: Codec, heldout: Sequence[Utterance], baseline: FrameKMeans
) -> tuple[dict[str, Block], dict[str, list[Tensor]]]:
    """The blocks of a speech codec by name ("" is the codec), and the waves of each system.

    Speeds are multiples of real time.
    """
    systems = {"": _codec(codec), "baseline": _baseline(baseline), "ceiling": _ceiling()}
    blocks, waves = {}, {}
    for name, system in systems.items():
        blocks[name], waves[name] = _measure(system, heldout)
    return blocks, waves


def spectral_distance(made: Tensor, real: Tensor) -> float:
    """Mean absolute difference of log magnitudes, in nats, over windows of 8 to 128 ms.

    made, real: float (N,). The multi-scale spectrogram distance of Engel et al. 2020, log term.
    """
    total = 0.0
    for size in SCALES:
        window = torch.hann_window(size, device=made.device)
        spectra = torch.stft(
            torch.stack([made, real]), size, size // 4, window=window, return_complex=True,
            pad_mode="constant",
        )  # fmt: skip
        # a full-scale sine has about magnitude 1 at every scale
        made_log, real_log = (spectra.abs() * 2 / window.sum()).clamp(min=FLOOR).log()
        total += float((made_log - real_log).abs().mean())
    return total / len(SCALES)


def griffin_lim(mel: Tensor) -> Tensor:
    """The wave (160 T,) of log-mel frames (T, 80), all at once: 32 fast steps (Perraudin 2013)."""
    # frames after the end, so that every sample is covered by whole windows
    longer = F.pad(mel, (0, 0, 0, WINDOW // HOP), value=SILENCE)
    wave = torchaudio.functional.griffinlim(
        mel_magnitude(longer[None])[0],
        torch.hann_window(WINDOW),
        n_fft=FFT,
        hop_length=HOP,
        win_length=WINDOW,
        power=1.0,
        n_iter=32,
        momentum=0.99,
        length=None,
        rand_init=False,
    )
    # there, frame i is centred on sample 160 i; a frame of `log_mel` on 160 (i - 1)
    return wave[HOP : HOP * (len(mel) + 1)].clamp(-1, 1)


def _measure(system: System, real: Sequence[Utterance]) -> tuple[Block, list[Tensor]]:
    tally, made, seconds, coded = Tally(system), [], 0.0, 0.0
    for utterance in Bar(real, desc=system.name):
        wave = F.pad(utterance.wave, (0, -len(utterance.wave) % (8 * HOP)))
        out = tally.keep(wave)
        coded += len(out) / SAMPLE_RATE
        seconds += len(utterance.wave) / SAMPLE_RATE
        made.append(_fit(out, len(utterance.wave)).clone())
    pairs = [(out, utterance.wave) for out, utterance in zip(made, real, strict=True)]
    block: Block = {
        "system": system.name,
        "bits_per_second": tally.bits / coded if system.sizes else None,
        "spectral": mean(spectral_distance(*pair) for pair in pairs),
        "log_mel_distance": _log_mel_distance(pairs),
        "stoi": mean(score for pair in pairs if (score := _stoi(*pair)) is not None),
        "visqol": _visqol(pairs, system.name),
    }
    return block | tally.metrics(seconds) | {"seconds": seconds}, made


def _codec(codec: Codec) -> System:
    rate = int(codec.sample_rate)  # type: ignore[arg-type] # all codecs of sound

    def encode(wave: Tensor) -> Tensor:
        return codec.encode(_resampled(wave, SAMPLE_RATE, rate)[None])[0]

    def decode(codes: Tensor) -> Tensor:
        return _resampled(codec.decode(codes[None])[0], rate, SAMPLE_RATE)

    sizes = (codec.codebook_size,) * codec.num_codebooks
    return System(name=codec.name, encode=encode, decode=decode, sizes=sizes)


def fit_baseline(
    codec: Codec, train: Sequence[Utterance], shards: Sequence[str] = ()
) -> FrameKMeans:
    """k-means in as many bits as the codec, of the sounds that it was trained on."""
    rate = _codec(codec).encode(torch.zeros(10 * SAMPLE_RATE)).shape[0] / 10
    frames = max(1, round(MEL_RATE / rate))
    # codecs whose codes do not come in whole frames get the nearest number of bits
    depth = max(1, round(codec.num_codebooks * rate * frames / MEL_RATE))
    voices = sorted({utterance.voice for utterance in train} - {""})
    waves = [utterance.wave for utterance in train]
    return FrameKMeans.fit(waves, frames, codec.codebook_size, depth, voices=voices, shards=shards)


def _baseline(centres: FrameKMeans) -> System:
    return System(
        name=centres.name,
        encode=centres.encode,
        decode=lambda codes: griffin_lim(centres.decode(codes)),
        sizes=centres.centres.sizes,
    )


def _ceiling() -> System:
    return System(
        name="Griffin-Lim of the true log-mel frames",
        encode=lambda wave: log_mel(wave[None])[0],
        decode=griffin_lim,
    )


def _resampled(wave: Tensor, before: int, after: int) -> Tensor:
    if before == after:
        return wave
    return torchaudio.functional.resample(wave, before, after).clamp(-1, 1)


def _fit(wave: Tensor, length: int) -> Tensor:
    return F.pad(wave[:length], (0, max(0, length - len(wave))))


def _log_mel_distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean absolute difference in nats, over all frames."""
    total, count = 0.0, 0
    for made, real in pairs:
        pad = (0, -len(real) % HOP)
        error = (log_mel(F.pad(made, pad)[None]) - log_mel(F.pad(real, pad)[None])).abs()
        total, count = total + float(error.sum()), count + error.numel()
    return 2.0 * total / count  # `log_mel` halves


def _stoi(made: Tensor, real: Tensor) -> float | None:
    """Short-time objective intelligibility; None where there is too little that is not silent."""
    import pystoi

    if not real.any():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi.stoi(real.numpy(), made.numpy(), SAMPLE_RATE))
        except (RuntimeWarning, ValueError):
            return None


def _visqol(pairs: Sequence[tuple[Tensor, Tensor]], name: str) -> float | None:
    """Mean opinion score (1 to 5) as ViSQOL's speech mode foresees it, of a sample."""
    try:
        from visqol import VisqolApi
    except ImportError:
        log.warning("no ViSQOL: pip install 'visqol-python[lattice]'")
        return None
    chosen = pairs[:: max(1, len(pairs) // NUM_VISQOL)][:NUM_VISQOL]
    length = VISQOL_SECONDS * SAMPLE_RATE
    judge = VisqolApi()
    judge.create(mode="speech")
    scores, short = [], 0
    for made, real in Bar(chosen, desc=f"{name}: ViSQOL"):
        arrays = (real[:length].double().numpy(), made[:length].double().numpy())
        try:
            scores.append(float(judge.measure_from_arrays(*arrays, SAMPLE_RATE).moslqo))
        except (IndexError, ValueError):  # too short, or too little of it is loud
            short += 1
    if short:
        log.warning("%s: ViSQOL found no speech in %d of %d sounds", name, short, len(chosen))
    return mean(scores)
