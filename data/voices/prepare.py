"""Small English sentences spoken by synthetic voices, some of which are kept from all training.

A grammar of 131 words makes the sentences, espeak-ng and flite speak them. A judge that knows the
words can tell what a speech codec keeps, for voices that it was trained on and for voices that not.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmpt.data import importers
from mmpt.data.shards import Quarantine, Record, is_heldout, read_documents, write_shard
from mmpt.data.sources import load_script
from mmpt.parts import Text
from mmpt.progress import Bar

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
# for training alone; none is made as an unseen voice is (the klatt synthesizers, twins of m7)
ACCENTS = "en-gb en-gb-scotland en-gb-x-rp en-gb-x-gbclan en-gb-x-gbcwmd en-029 en-us-nyc"
VARIANTS = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario Michael "
    "Mike Storm anika antonio aunty belinda boris ed grandma grandpa gustave iven kaukovalta linda "
    "m1 m4 m5 m6 marcelo max michel miguel paul pedro quincy rob robert sandro shelby steph steph2 "
    "travis victor zac"
)
MORE_VOICES = (
    *(f"espeak-ng:{accent}" for accent in ACCENTS.split()),
    *(f"espeak-ng:en-us+{variant}" for variant in VARIANTS.split()),
)
PITCH, PACE = (0.65, 1.5), (0.85, 1.2)  # of a voice in the further training utterances
SAMPLE_RATE = 16_000
MARGIN = 800  # samples that stay before and after the speech: 50 ms
PEAK = 0.6  # of full scale
QUIET = 64  # of 32,768: what does not rise above it at the edges is silence

SAMPLER = Path(__file__).resolve().parent.parent / "sampler"

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
    num_more: int = 1600  # further training utterances, for codecs
    compression: float = 0.985  # about 10 kbit/s
    seed: int = 0


@dataclass(frozen=True)
class Utterance:
    """Sentences said after one another by a voice; pitch and pace in its own."""

    sentences: list[str]
    voice: str
    pitch: float = 1.0
    pace: float = 1.0


def main(out: Path, cache: Path, settings: Settings | None = None) -> list[Path]:
    """Write voices-train-*, voices-heldout-*, voices-unseen-* and voices-more-0000.tar into `out`.

    Nothing is fetched. What unseen voices say is a shard of its own, for judging codecs: a model
    that never met a voice is not expected to foresee its codes. So is what more voices say, for
    training codecs: it is too large for the sampler.
    """
    settings = settings or Settings()
    importers.require_tools("espeak-ng", "flite")
    records = _speak(list_utterances(settings), settings, "voices")
    seen = [record for record in records if not record.parts[1]["unseen"]]
    paths = importers.write_split(seen, out, "voices")
    others = {
        "unseen": [record for record in records if record.parts[1]["unseen"]],
        "more": _speak(list_more(settings), settings, "more voices"),
    }
    for name, records in others.items():
        if records:
            paths.append(out / f"voices-{name}-0000.tar")
            write_shard(paths[-1], records)
    return paths


def _speak(jobs: Iterable[Utterance], settings: Settings, what: str) -> list[Record]:
    shown = Bar(list(jobs), desc=what, unit="utterance")
    return [utterance_record(job, settings) for job in shown]


def list_utterances(settings: Settings) -> Iterator[Utterance]:
    """Held-out sentences by seen and unseen voices, others by seen ones."""
    joined: list[str] = []
    num_train = num_heldout = 0
    for sentence in list_sentences(settings.seed):
        if not is_heldout(base_of([sentence])):
            joined.append(sentence)
            if len(joined) == settings.num_joined and is_heldout(base_of(joined)):
                joined.pop()
            elif len(joined) == settings.num_joined and num_train < settings.num_train:
                yield Utterance(joined, SEEN_VOICES[num_train % len(SEEN_VOICES)])
                joined, num_train = [], num_train + 1
        elif num_heldout < settings.num_heldout:
            for voices, count in (
                (SEEN_VOICES, settings.num_seen),
                (UNSEEN_VOICES, settings.num_unseen),
            ):
                for number in range(num_heldout * count, (num_heldout + 1) * count):
                    yield Utterance([sentence], voices[number % len(voices)])
            num_heldout += 1
        if (num_train, num_heldout) == (settings.num_train, settings.num_heldout):
            return


def list_more(settings: Settings) -> Iterator[Utterance]:
    """Further training utterances: two of three are sentences, one keywords of the emoji.

    Two of five are by seen voices, the others by ones that are heard nowhere else; all in another
    pitch and pace each time.
    """
    if not settings.num_more:
        return
    rng = random.Random(f"more {settings.seed}")
    fresh = (s for s in list_sentences(settings.seed + 1) if not is_heldout(base_of([s])))
    keywords, spoken = sorted(_keywords()), set()
    for number in range(settings.num_more):
        said = [next(fresh) for _ in range(settings.num_joined)]
        if number % 3 == 2:
            said = [rng.choice(keywords)]
        if is_heldout(base_of(said)):
            continue
        voice = rng.choice(SEEN_VOICES if rng.random() < 0.4 else MORE_VOICES)
        pitch, pace = round(rng.uniform(*PITCH), 2), round(rng.uniform(*PACE), 2)
        if (said[0], voice) not in spoken:
            spoken.add((said[0], voice))
            yield Utterance(said, voice, pitch, pace)


def _keywords() -> Iterator[str]:
    """What the sampler's training pictures are called, eight words at most."""
    for document in read_documents(sorted(SAMPLER.glob("emoji-train-*.tar")), Quarantine(None)):
        for part in document.parts:
            text = part.text if isinstance(part, Text) else ""
            words = re.findall("[a-z]{2,}", text.lower().removeprefix("keywords: "))
            if len(words) > 1:
                yield " ".join(words[:8])


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


def utterance_record(said: Utterance, settings: Settings) -> Record:
    """The transcript and its sound."""
    sentences, voice = said.sentences, said.voice
    synthesize = load_script("emoji").synthesize
    spoken = [
        trim(synthesize(sentence, voice, pitch=said.pitch, pace=said.pace)).astype(np.float32)
        for sentence in sentences
    ]
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
