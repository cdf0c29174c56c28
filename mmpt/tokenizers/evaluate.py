"""Report cards and round trips: what a codec keeps of held-out media, and of a file of yours.

A card measures the codec, a baseline of as many codes and bits that is fitted in the same run, and
a ceiling, all with the same keys; `cards` says how.
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpt.config import UserError, write_atomic
from mmpt.data.shards import Document
from mmpt.parts import Audio, Image, Part, Text, Video, load_part
from mmpt.process import one_thread
from mmpt.tokenizers.base import Codec, codec_folder, codec_names, load_codec
from mmpt.tokenizers.cards import speech, text, visual, words
from mmpt.tokenizers.cards.baseline import FrameKMeans
from mmpt.tokenizers.cards.system import Block, Card, require, rounded
from mmpt.tokenizers.image import from_pixels, to_pixels
from mmpt.tokenizers.recipe import CodecRecipe, find_documents, find_shards, load_codec_recipe
from mmpt.tokenizers.video import pad_to_factor
from mmpt.vocab import Modality

log = logging.getLogger(__name__)

BASELINE = "baseline.safetensors"
SPEEDS = {
    Modality.TEXT: "bytes a second",
    Modality.IMAGE: "pictures a second",
    Modality.VIDEO: "times real time",
    Modality.SPEECH: "times real time",
}


def list_tokenizers() -> dict:
    """The shipped codecs with their recorded report cards."""
    rows = []
    for name in codec_names():
        codec = load_codec(name)
        card = read_card(codec_folder(name), codec.fingerprint)
        rows.append(
            {
                "name": name,
                "modality": codec.modality.name.lower(),
                "codebook_size": codec.codebook_size,
                "rate": codec.rate,
                "fingerprint": codec.fingerprint,
                "heldout": _measured(card, card["baseline"]) if card else None,
                "baseline": _measured(card["baseline"], card["baseline"]) if card else None,
            }
        )
    return {"tokenizers": rows}


def evaluate(
    name: str,
    shards: Sequence[str] = (),
    *,
    train: Sequence[str] = (),
    judge: Path | None = None,
    save: bool = False,
) -> Card:
    """Measure codec NAME on held-out media, beside a baseline of equal bits and a ceiling.

    SHARDS are measured whole; without them, the held-out documents that belong to the recipe are.
    --train: what the codec was trained on, to fit the baseline on, instead of the recipe's shards.
    --judge: a folder with a Whisper model (CTranslate2) that hears words, instead of pocketsphinx
    with a grammar. --save: also write metrics.json into the codec's folder, and for sound the
    baseline, which serves where shards that it was fitted on are missing.
    """
    codec, folder = load_codec(name), codec_folder(name)
    recipe = _recipe(folder, codec, shards, train)
    if shards:
        heldout = find_documents(shards)
    else:
        # a recipe may name shards several times, to draw them more often; they are measured once
        beside = [pattern.replace("-train-", "-heldout-") for pattern in recipe.shards]
        beside = [pattern for pattern in beside if find_shards(pattern)]
        heldout = find_documents(list(dict.fromkeys([*beside, *recipe.heldout])), heldout=True)
    began = time.monotonic()
    with one_thread():  # media are measured one by one
        if codec.modality == Modality.SPEECH:
            require("torchaudio", "pystoi", "jiwer")
            baseline = _sound_baseline(codec, folder, recipe, train)
            blocks, notes = _measure_speech(codec, heldout, baseline, recipe.unseen_voices, judge)
            if save:
                baseline.save(folder / BASELINE)
        else:
            blocks, notes = _measure(codec, heldout, _seen(recipe, train)), []
    card = Card(
        tokenizer=codec.name,
        modality=codec.modality.name.lower(),
        fingerprint=codec.fingerprint,
        codebook_size=codec.codebook_size,
        num_codebooks=codec.num_codebooks,
        speed_unit=SPEEDS[codec.modality],
        compared=[f"{key}: {block['system']}" for key, block in blocks.items() if key],
        notes=notes,
        seconds_taken=round(time.monotonic() - began, 1),
        **rounded(blocks.pop("")),
        **{key: rounded(block) for key, block in blocks.items()},
    )
    if save:
        write_atomic(folder / "metrics.json", json.dumps(card, indent=1) + "\n")
    return card


def read_card(folder: Path, fingerprint: str) -> dict[str, Any]:
    """What `evaluate` saved; nothing when it measured another codec than the one that is there."""
    path = folder / "metrics.json"
    card = json.loads(path.read_text()) if path.is_file() else {}
    # cards that were written before there was a ceiling held less
    return card if card.get("fingerprint") == fingerprint and "ceiling" in card else {}


def _measured(block: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    return {k: block[k] for k in keys if isinstance(block[k], int | float | list)}


def _recipe(folder: Path, codec: Codec, shards: Sequence[str], train: Sequence[str]) -> CodecRecipe:
    if (folder / "recipe.toml").is_file():
        return load_codec_recipe(folder / "recipe.toml")
    if shards and (train or codec.modality == Modality.TEXT):  # bytes need no fit
        return CodecRecipe(kind="text", shards=())
    raise UserError(
        f"{folder} has no recipe.toml that names its data; give shards to measure, and others to "
        "fit the baseline on: SHARDS --train OTHERS"
    )


def _seen(recipe: CodecRecipe, train: Sequence[str]) -> list[Document]:
    """What the codec was trained on."""
    return find_documents(train) if train else find_documents(recipe.shards, heldout=False)


def _measure(
    codec: Codec, heldout: Sequence[Document], seen: Sequence[Document]
) -> dict[str, Block]:
    """The blocks by name, "" for the codec."""
    parts, others = ([document.parts for document in split] for split in (heldout, seen))
    if codec.modality == Modality.TEXT:
        return text.measure_text(codec, parts)
    require("torchmetrics")
    return visual.measure_visual(codec, parts, others)


def _sound_baseline(
    codec: Codec, folder: Path, recipe: CodecRecipe, train: Sequence[str]
) -> FrameKMeans:
    """Fitted on what the codec was trained on; as it was fitted, where some of that is missing."""
    missing = [pattern for pattern in recipe.shards if not find_shards(pattern)]
    if train or not missing or not (folder / BASELINE).is_file():
        sounds = speech.utterances(_seen(recipe, train))
        return speech.fit_baseline(codec, sounds, train or recipe.shards)
    log.info("no %s here: the baseline is %s", ", ".join(missing), folder / BASELINE)
    baseline = FrameKMeans.load(folder / BASELINE)
    if baseline.shards != recipe.shards:
        raise UserError(
            f"{folder / BASELINE} was fitted on other shards than recipe.toml names; get "
            f"{', '.join(missing)} to fit it again"
        )
    return baseline


def _measure_speech(
    codec: Codec,
    heldout: Sequence[Document],
    baseline: FrameKMeans,
    unseen_voices: Sequence[str],
    whisper: Path | None,
) -> tuple[dict[str, Block], list[str]]:
    """The blocks by name, and what could not be measured, in sentences."""
    real = speech.utterances(heldout)
    words.check_unseen(unseen_voices, baseline.voices)
    picks, notes = words.judged(real, unseen_voices, whisper=whisper)
    blocks, waves = speech.measure_sound(codec, real, baseline)
    blocks["original"] = {"system": "the sound itself"}
    waves["original"] = [utterance.wave for utterance in real]
    rows = words.by_voice([real[index].voice for index in picks], unseen_voices, baseline.voices)
    said = words.measure_words(waves, [real[i].text for i in picks], picks, rows, whisper=whisper)
    for note in notes:
        log.warning("%s", note)
    return {name: block | said[name] for name, block in blocks.items()}, notes


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
    """Codes (1, ..., Q) of a part, and the part of the same size that they decode to."""
    modality = codec.modality
    if modality == Modality.VIDEO and isinstance(part, Image):
        codes, made = _roundtrip_part(codec, Video(part.pixels[None], 1.0))
        assert isinstance(made, Video)
        return codes, Image(made.frames[0])
    if modality == Modality.TEXT and isinstance(part, Text):
        codes = codec.encode(part.text)
        return codes[None], Text(codec.decode(codes))
    if modality == Modality.IMAGE and isinstance(part, Image):
        height, width, _ = part.pixels.shape
        codes = codec.encode(_padded(codec, part.pixels[None]))
        return codes, Image(from_pixels(codec.decode(codes))[0, :height, :width])
    if modality == Modality.VIDEO and isinstance(part, Video):
        return _roundtrip_video(codec, part)
    if modality == Modality.SPEECH and isinstance(part, Audio):
        rate = int(codec.sample_rate)  # type: ignore[arg-type] # all codecs of sound
        wave = torch.from_numpy(part.resample(rate).wave)
        codes = codec.encode(wave[None])
        made = codec.decode(codes)[0, : len(wave)]
        return codes, Audio(made.cpu().numpy(), rate)
    raise UserError(
        f"{codec.name} is a {codec.kind} codec; it cannot read a {type(part).__name__.lower()}"
    )


def _roundtrip_video(codec: Codec, part: Video) -> tuple[Tensor, Video]:
    count, height, width, _ = part.frames.shape
    stream, decoder = codec.stream(), codec.decode_stream()  # type: ignore[operator] # all codecs of moving media
    # one by one: memory does not grow with the length
    codes = [stream.push(_padded(codec, frame[None])) for frame in part.frames]
    codes = torch.cat([*codes, stream.flush()])
    frames = [from_pixels(decoder.push(unit[None])) for unit in codes]
    frames = np.concatenate(frames)[:count, :height, :width]
    return codes[None], Video(np.ascontiguousarray(frames), part.fps)


def _padded(codec: Codec, pictures: np.ndarray) -> Tensor:
    return pad_to_factor(to_pixels(pictures), codec.factor)
