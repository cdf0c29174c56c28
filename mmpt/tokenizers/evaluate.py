"""Report cards: what a codec keeps of held-out media, beside a baseline of as many codes and bits.

Baselines are fitted on the training shards in the same run: k-means of pixel patches (of 4 x 8 x 8
cubes for video), k-means of stacked log-mel frames, and bytes for text.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from mmpt.config import UserError, load_recipe, write_atomic
from mmpt.parts import Audio, Image, Part, Text, Video, load_part
from mmpt.tokenizers.base import Codec, codec_folder, codec_names, load_codec
from mmpt.tokenizers.image import FACTOR, ImageCodec, from_pixels, to_pixels
from mmpt.tokenizers.losses import psnr
from mmpt.tokenizers.quantize import kmeans, nearest_centre
from mmpt.tokenizers.recipe import CodecRecipe, read_parts
from mmpt.tokenizers.speech import FRAMES_PER_CODE, SpeechCodec
from mmpt.tokenizers.text import TextCodec
from mmpt.tokenizers.video import GROUP, VideoCodec, pad_to_factor
from mmpt.tokenizers.vocoder import HOP, log_mel

MAX_POINTS = 100_000  # vectors that a baseline is fitted on
PICTURE = (64, 64, 3)  # what pictures and frames are measured on


def list_tokenizers() -> dict:
    """The shipped codecs with their recorded report cards."""
    rows = []
    for name in codec_names():
        codec = load_codec(name)
        metrics = read_card(codec_folder(name), codec.fingerprint)
        rows.append(
            {
                "name": name,
                "modality": codec.modality.name.lower(),
                "codebook_size": codec.codebook_size,
                "rate": codec.rate,
                "fingerprint": codec.fingerprint,
                "heldout": metrics.get("heldout"),
                "baseline": metrics.get("baseline"),
            }
        )
    return {"tokenizers": rows}


def evaluate(name: str, shards: Sequence[str] = (), *, save: bool = False) -> dict:
    """Measure codec NAME on held-out media beside its baseline, which is fitted on its recipe's.

    SHARDS are measured whole; without them, the held-out documents that belong to the recipe are.
    save: also write metrics.json into the codec's folder.
    """
    codec, folder = load_codec(name), codec_folder(name)
    recipe = load_recipe(CodecRecipe, folder / "recipe.toml")
    if shards:
        heldout = read_parts(shards)
    else:
        beside = [pattern.replace("-train-", "-heldout-") for pattern in recipe.shards]
        heldout = read_parts(beside, heldout=True)
    train = read_parts(recipe.shards, heldout=False)
    measure = {
        TextCodec: _text,
        ImageCodec: _image,
        VideoCodec: _video,
        SpeechCodec: _speech,
    }[type(codec)]
    ours, baseline = measure(codec, heldout, train)
    result = {
        "tokenizer": codec.name,
        "modality": codec.modality.name.lower(),
        "fingerprint": codec.fingerprint,
        "heldout": _rounded(ours),
        "baseline": _rounded(baseline),
    }
    if save:
        write_atomic(folder / "metrics.json", json.dumps(result, indent=1) + "\n")
    return result


def roundtrip(name: str, file: Path, *, out: Path) -> dict:
    """Encode FILE with codec NAME, decode the codes and save the result at OUT."""
    codec, part = load_codec(name), load_part(file)
    codes, made = _roundtrip_part(codec, part)
    made.save(out)
    return {
        "tokenizer": codec.name,
        "file": str(file),
        "out": str(out),
        "codes": int(codes.numel()),
        "shape": list(codes.shape[1:-1]),
        "bits": round(codes.numel() * math.log2(codec.codebook_size)),
        "fingerprint": codec.fingerprint,
    }


def _roundtrip_part(codec: Codec, part: Part) -> tuple[Tensor, Part]:
    if isinstance(codec, VideoCodec) and isinstance(part, Image):
        codes, made = _roundtrip_part(codec, Video(part.pixels[None], 1.0))
        assert isinstance(made, Video)
        return codes, Image(made.frames[0])
    if isinstance(codec, TextCodec) and isinstance(part, Text):
        codes = codec.encode(part.text)
        return codes[None], Text(codec.decode(codes))
    if isinstance(codec, ImageCodec) and isinstance(part, Image):
        height, width, _ = part.pixels.shape
        codes = codec.encode(pad_to_factor(to_pixels(part.pixels[None])))
        return codes, Image(from_pixels(codec.decode(codes))[0, :height, :width])
    if isinstance(codec, VideoCodec) and isinstance(part, Video):
        count, height, width, _ = part.frames.shape
        stream, decoder = codec.stream(), codec.decode_stream()
        codes, frames = [], []
        for frame in part.frames:  # one by one: memory does not grow with the resolution's batch
            codes.append(stream.push(pad_to_factor(to_pixels(frame[None]))))
        codes = torch.cat([*codes, stream.flush()])
        frames = [from_pixels(decoder.push(unit[None])) for unit in codes]
        frames = np.concatenate(frames)[:count, :height, :width]
        return codes[None], Video(np.ascontiguousarray(frames), part.fps)
    if isinstance(codec, SpeechCodec) and isinstance(part, Audio):
        wave = torch.from_numpy(part.resample(codec.sample_rate).wave)
        codes = codec.encode(wave[None])
        made = codec.decode(codes)[0, : len(wave)]
        return codes, Audio(made.cpu().numpy(), codec.sample_rate)
    raise UserError(
        f"{codec.name} is a {codec.kind} codec; it cannot read a {type(part).__name__.lower()}"
    )


def read_card(folder: Path, fingerprint: str) -> dict:
    """What `evaluate` saved; nothing when it measured another codec than the one that is there."""
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    return metrics if metrics.get("fingerprint") == fingerprint else {}


def _some(media: list[Any], kind: str) -> list[Any]:
    if not media:
        raise UserError(f"the shards hold no {kind} to measure; name others")
    return media


def _usage(codes: Tensor, size: int) -> dict[str, float]:
    share = torch.bincount(codes.flatten(), minlength=size).double()
    share = share / share.sum()
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return {"usage": float((share > 0).double().mean()), "perplexity": float(entropy.exp())}


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in metrics.items()}


def _text(
    codec: TextCodec, heldout: list[list[Part]], train: list[list[Part]]
) -> tuple[dict[str, float], dict[str, float]]:
    texts = [part.text for parts in heldout for part in parts if isinstance(part, Text)]
    texts = _some([text for text in texts if text], "text")
    num_bytes = sum(len(text.encode()) for text in texts)
    num_ids = sum(len(codec.encode(text)) for text in texts)
    exact = np.mean([codec.decode(codec.encode(text)) == text for text in texts])
    ours = {"bytes_per_id": num_bytes / num_ids, "exact": float(exact), "bytes": num_bytes}
    return ours, {"bytes_per_id": 1.0, "exact": 1.0, "bytes": num_bytes}


def _pictures(documents: list[list[Part]]) -> Tensor:
    pictures = [part.pixels for parts in documents for part in parts if isinstance(part, Image)]
    pictures = [picture for picture in pictures if picture.shape == PICTURE]
    return to_pixels(np.stack(_some(pictures, "pictures of 64 x 64 pixels")))


def _fit(points: Tensor, num_centres: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randperm(len(points), generator=generator)[:MAX_POINTS]
    return kmeans(points[picks], num_centres, generator)[0]


def _patches(pixels: Tensor) -> Tensor:
    f = FACTOR
    return rearrange(pixels, "b c (h p) (w q) -> (b h w) (c p q)", p=f, q=f)


def _image(
    codec: ImageCodec, heldout: list[list[Part]], train: list[list[Part]]
) -> tuple[dict[str, float], dict[str, float]]:
    real = _pictures(heldout)
    codes = codec.encode(real)
    error = (codec.decode(codes) - real).square().mean()
    bits = codec.bits_per_code / FACTOR**2
    shared = {"bits_per_pixel": bits, "pictures": len(real)}
    centres = _fit(_patches(_pictures(train)), codec.codebook_size)
    points = _patches(real)
    picks = nearest_centre(points, centres)
    base_error = (centres[picks] - points).square().mean()
    ours = {"psnr": psnr(error), **shared, **_usage(codes, codec.codebook_size)}
    return ours, {"psnr": psnr(base_error), **shared, **_usage(picks, codec.codebook_size)}


def _clips(documents: list[list[Part]]) -> list[Tensor]:
    clips = [part.frames for parts in documents for part in parts if isinstance(part, Video)]
    clips = _some([c for c in clips if c.shape[1:] == PICTURE], "clips of 64 x 64 pixels")
    return [to_pixels(clip[: 1 + (len(clip) - 1) // GROUP * GROUP]) for clip in clips]


def _cubes(clips: list[Tensor]) -> Tensor:
    f = FACTOR
    pattern = "(t g) c (h p) (w q) -> (t h w) (g c p q)"
    return torch.cat([rearrange(clip[1:], pattern, g=GROUP, p=f, q=f) for clip in clips])


def _video(
    codec: VideoCodec, heldout: list[list[Part]], train: list[list[Part]]
) -> tuple[dict[str, float], dict[str, float]]:
    real, error, all_codes, count = _clips(heldout), 0.0, [], 0
    for clip in real:
        codes = codec.encode(clip[None])
        error += float((codec.decode(codes)[0] - clip).square().sum(dtype=torch.float64))
        count += clip.numel()
        all_codes.append(codes.flatten())
    seen, size = _clips(train), codec.codebook_size
    first_centres = _fit(_patches(torch.cat([clip[:1] for clip in seen])), size)
    cube_centres = _fit(_cubes(seen), size)
    base_error = 0.0
    for points, centres in (
        (_patches(torch.cat([clip[:1] for clip in real])), first_centres),
        (_cubes(real), cube_centres),
    ):
        picked = centres[nearest_centre(points, centres)]
        base_error += float((picked - points).square().sum(dtype=torch.float64))
    codes = torch.cat(all_codes)
    pixels = count / 3
    bits = len(codes) * math.log2(size) / pixels
    shared = {"bits_per_pixel": bits, "clips": len(real)}
    ours = {"psnr": psnr(error / count), **shared, **_usage(codes, size)}
    return ours, {"psnr": psnr(base_error / count), **shared}


def _mels(documents: list[list[Part]]) -> list[tuple[Tensor, Tensor]]:
    """(wave, log-mel frames (8 n, 80)) of every sound, padded to whole codes."""
    out = []
    for parts in documents:
        for part in parts:
            if isinstance(part, Audio):
                wave = torch.from_numpy(part.resample(SpeechCodec.sample_rate).wave)
                padded = F.pad(wave, (0, -len(wave) % (HOP * FRAMES_PER_CODE)))
                out.append((wave, log_mel(padded[None])[0]))
    return _some(out, "sound")


@torch.inference_mode()
def _speech(
    codec: SpeechCodec, heldout: list[list[Part]], train: list[list[Part]]
) -> tuple[dict[str, float], dict[str, float]]:
    size, stacked = codec.codebook_size, "(n f) m -> n (f m)"
    points = [rearrange(mel, stacked, f=FRAMES_PER_CODE) for _, mel in _mels(train)]
    centres = _fit(torch.cat(points), size)
    ours = base = frames = seconds = 0.0
    all_codes = []
    for wave, mel in _mels(heldout):
        codes = codec.encode(wave[None])
        latents = codec.quantizer.lookup(codes)
        padded = F.pad(latents, (0, 0, 0, -latents.shape[1] % codec.config.block))
        made = codec.decode_mel(padded)[0, : len(mel)]
        points = rearrange(mel, stacked, f=FRAMES_PER_CODE)
        picked = centres[nearest_centre(points, centres)]
        ours += float((made - mel).abs().sum())
        base += float(
            (rearrange(picked, "n (f m) -> (n f) m", f=FRAMES_PER_CODE) - mel).abs().sum()
        )
        frames += mel.numel()
        seconds += len(wave) / codec.sample_rate
        all_codes.append(codes.flatten())
    scale = 2.0  # `log_mel` halves; report nats
    shared = {"bits_per_second": codec.bits_per_second, "seconds": seconds}
    usage = _usage(torch.cat(all_codes), size)
    mine = {"log_mel_distance": scale * ours / frames, **shared, **usage}
    return mine, {"log_mel_distance": scale * base / frames, **shared}
