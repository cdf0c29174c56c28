"""Small English sentences spoken by synthetic voices, some of which are kept from all training.

A grammar of 131 words makes the sentences, espeak-ng and flite speak them. A judge that knows the
words can tell what a speech codec keeps, for voices that it was trained on and for voices that not.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmpt.data import importers
from mmpt.data.shards import Record, is_heldout, write_shard
from mmpt.data.sources import load_script

SEEN_VOICES = (
    "espeak-ng:en-us",
    "flite:slt",
    "espeak-ng:en-us+m3",
    "espeak-ng:en-us+f2",
    "flite:rms",
    "espeak-ng:en-us+f3",
    "espeak-ng:en-us+m2",
    "espeak-ng:en-us+f4",
)
UNSEEN_VOICES = (
    "flite:awb",
    "espeak-ng:en-us+f5",
    "flite:kal16",
    "espeak-ng:en-us+m7",
    "espeak-ng:en-us+klatt",
    "espeak-ng:en-us+f1",
)
SAMPLE_RATE = 16_000
MARGIN = 800  # samples that stay before and after the speech: 50 ms
PEAK = 0.6  # of full scale
QUIET = 64  # of 32,768: what does not rise above it at the edges is silence

TEMPLATES = (
    "a {size} {colour} {shape} {side}",
    "{number} {size} {animals} {verb} {place}",
    "the {person} {does} {number} {colour} {things}",
    "the {colour} {thing} is {place}",
    "please {order} the {size} {thing} on {day} {time}",
    "{number} {things} and {number} {colour} {animals}",
    "on {day} the {person} {does} a {thing}",
    "a {size} {colour} {shape}",
    "{number} {colour} {animals}",
    "{order} the {colour} {thing}",
    "the {person} {does} {things}",
    "a {shape} {side}",
    "{animals} {verb} {place}",
)
WORDS = {
    slot: words.split(", ")
    for slot, words in {
        "number": "two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, twenty",
        "size": "big, small, tiny, huge, long, heavy",
        "colour": "red, orange, yellow, green, blue, purple, black, white, brown, pink",
        "shape": "circle, square, triangle, star, cross, diamond",
        "side": "on the left, on the right, at the top, at the bottom, in the middle",
        "animals": "birds, cats, dogs, horses, ducks, rabbits, foxes, bears, frogs, monkeys",
        "verb": "sleep, run, play, wait, jump, sing, swim, walk",
        "place": "under the bridge, near the river, in the garden, behind the house, "
        "on the mountain, beside the lake, in the forest, over the road, "
        "at the station, in the kitchen",
        "person": "teacher, doctor, king, queen, farmer, sister, brother, woman",
        "does": "finds, opens, sells, buys, paints, carries, wants, holds",
        "thing": "apple, book, cup, bottle, hat, chair, lamp, boat, window, basket",
        "things": "apples, books, cups, bottles, hats, chairs, lamps, boats, windows, baskets",
        "order": "open, bring, take, keep, move",
        "day": "monday, tuesday, wednesday, thursday, friday, saturday, sunday",
        "time": "morning, evening, afternoon",
    }.items()
}
LICENSE = "MIT"
ATTRIBUTION = [
    {
        "package": "Debian espeak-ng, flite",
        "gives": "speech (synthetic)",
        "license": "made by us with these programs; the programs are not part of the data",
        "copyright": "",
        "homepage": "https://github.com/espeak-ng/espeak-ng",
        "changes": "edges trimmed, peak at 0.6, 16 kHz, Ogg Opus",
    },
]


@dataclass(frozen=True)
class Settings:
    """The defaults build everything; the sampler takes less."""

    num_train: int = 230  # utterances, by the seen voices in turn
    num_joined: int = 3  # sentences of a training utterance: many short files are mostly headers
    num_heldout: int = 66  # sentences, each by some voices of both kinds in turn
    num_seen: int = 2  # voices of a held-out sentence
    num_unseen: int = 4
    compression: float = 0.985  # about 10 kbit/s
    seed: int = 0


def main(out: Path, cache: Path, settings: Settings | None = None) -> list[Path]:
    """Write voices-train-*, voices-heldout-* and voices-unseen-0000.tar into `out`.

    Nothing is fetched. What unseen voices say is a shard of its own, for judging codecs: a model
    that never met a voice is not expected to foresee its codes.
    """
    settings = settings or Settings()
    importers.require_tools("espeak-ng", "flite")
    jobs = list(list_utterances(settings))
    records = [
        utterance_record(sentences, voice, settings)
        for sentences, voice in tqdm(jobs, desc="voices", unit="utterance")
    ]
    unseen = [record for record in records if record.parts[1]["unseen"]]
    seen = [record for record in records if not record.parts[1]["unseen"]]
    path = out / "voices-unseen-0000.tar"
    write_shard(path, unseen)
    return [*importers.write_split(seen, out, "voices"), path]


def list_utterances(settings: Settings) -> Iterator[tuple[list[str], str]]:
    """Sentences with a voice: held-out ones by seen and unseen voices, others by seen ones."""
    joined: list[str] = []
    num_train = num_heldout = 0
    for sentence in list_sentences(settings.seed):
        if not is_heldout(base_of([sentence])):
            joined.append(sentence)
            if len(joined) == settings.num_joined and is_heldout(base_of(joined)):
                joined.pop()
            elif len(joined) == settings.num_joined and num_train < settings.num_train:
                yield joined, SEEN_VOICES[num_train % len(SEEN_VOICES)]
                joined, num_train = [], num_train + 1
        elif num_heldout < settings.num_heldout:
            for voices, count in (
                (SEEN_VOICES, settings.num_seen),
                (UNSEEN_VOICES, settings.num_unseen),
            ):
                for number in range(num_heldout * count, (num_heldout + 1) * count):
                    yield [sentence], voices[number % len(voices)]
            num_heldout += 1
        if (num_train, num_heldout) == (settings.num_train, settings.num_heldout):
            return


def list_sentences(seed: int) -> Iterator[str]:
    """Sentences of the grammar without end, each once."""
    rng = random.Random(seed)
    seen = set()
    while True:
        slots = {name: rng.choice(words) for name, words in WORDS.items()}
        sentence = rng.choice(TEMPLATES).format(**slots)
        if sentence not in seen:
            seen.add(sentence)
            yield sentence


def base_of(sentences: list[str]) -> str:
    """The base key: sentences are on one side, whoever speaks them. Short, as names in tars are."""
    return "voices-" + hashlib.sha256(" ".join(sentences).encode()).hexdigest()[:12]


def utterance_record(sentences: list[str], voice: str, settings: Settings) -> Record:
    """The transcript and its sound."""
    synthesize = load_script("emoji").synthesize
    spoken = [trim(synthesize(sentence, voice)).astype(np.float32) for sentence in sentences]
    wave = np.concatenate([PEAK / np.abs(wave).max() * wave for wave in spoken])
    data = importers.encode_opus(wave, SAMPLE_RATE, compression=settings.compression)
    sound = {"type": "audio", "voice": voice, "synthetic": True, "unseen": voice in UNSEEN_VOICES}
    text = {"type": "text", "text": " ".join(sentences)}
    key = f"{base_of(sentences)}-{voice.replace(':', '-').replace('+', '-')}"
    parts = (text, sound | {"suffix": "opus", "data": data})
    return Record(key, base_of(sentences), "any", parts, "voices", LICENSE)


def trim(wave: np.ndarray) -> np.ndarray:
    """int16 (num_samples,) without the silence at both ends, but for 50 ms."""
    loud = np.flatnonzero(np.abs(wave.astype(np.int32)) > QUIET)
    return wave[max(0, loud[0] - MARGIN) : loud[-1] + 1 + MARGIN]
