"""Emoji as text, picture, clip and speech: one idea in four media.

Pictures and animations are Microsoft's Fluent Emoji as packaged by LobeHub, labels and keywords
come from emojibase-data, and a part of the labels is spoken by two offline synthesizers.
"""

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mmpt.data import importers
from mmpt.data.shards import Record
from mmpt.progress import Bar

SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
VOICES = ("espeak-ng:en-us", "flite:slt", "espeak-ng:en-gb", "flite:rms")
SAMPLE_RATE = 16_000
NUM_FRAMES = 17  # 1 + 4n
# emojibase's numbers of the groups symbols and flags, and of the subgroups maps and clocks
ONE_WAY_GROUPS, ONE_WAY_SUBGROUPS = (8, 9), (49, 58)
ONE_WAY_LABEL = re.compile(  # sides, moons that wax or wane, and things that carry signs
    r"\b(left|right|leftwards|rightwards|\w*clockwise|arrow|moon|calendar|hundred|zzz|flag"
    r"|banknote|yen|dollar|coin|money|envelope|e-mail|credit card|ticket|tickets|chart|medal|8 ball"
    r"|slot machine|mahjong|joker|cards|newspaper|ledger|dvd|keyboard|input|sign|hotel|hospital"
    r"|bank|post office|school|store|stadium|station|bus stop|bus|taxi|ambulance|police|truck"
    r"|musical note|musical notes|musical score|ruler|card|placard|label|receipt|scroll|memo"
    r"|game die|barber pole|sleeping|sleepy)\b",
    re.IGNORECASE,
)
LICENSE = "MIT"
ATTRIBUTION = [
    {
        "package": "npm @lobehub/fluent-emoji-3d 1.1.0",
        "gives": "pictures",
        "license": "MIT",
        "copyright": "Copyright (c) 2023 LobeHub; Fluent Emoji are from Microsoft",
        "homepage": "https://github.com/lobehub/fluent-emoji",
        "changes": "on white, shrunk to 64 x 64, WebP",
    },
    {
        "package": "npm @lobehub/fluent-emoji-anim-1, -2, -3, -4 1.0.0",
        "gives": "clips",
        "license": "MIT",
        "copyright": "Copyright (c) 2023 LobeHub; Fluent Emoji are from Microsoft",
        "homepage": "https://github.com/lobehub/fluent-emoji",
        "changes": "17 frames of each loop, on white, shrunk to 64 x 64, WebP",
    },
    {
        "package": "npm emojibase-data 17.0.0",
        "gives": "labels and keywords",
        "license": "MIT",
        "copyright": "Copyright (c) 2017-2019 Miles Johnson",
        "homepage": "https://emojibase.dev",
        "changes": "none",
    },
    {
        "package": "Debian espeak-ng, flite",
        "gives": "spoken labels (synthetic)",
        "license": "made by us with these programs; the programs are not part of the data",
        "copyright": "",
        "homepage": "https://github.com/espeak-ng/espeak-ng",
        "changes": "voices espeak-ng en-us, en-gb and flite slt, rms; 16 kHz, Ogg Opus",
    },
]


@dataclass(frozen=True)
class Settings:
    """The defaults build everything; the sampler takes less."""

    side: int = 64  # pixels
    skin_tones: bool = True
    flags: bool = True  # of countries
    num_clips: int | None = None  # None: all; 0: none, and animations are not fetched
    num_spoken: int | None = None  # labels; 0: none, and no synthesizer is needed
    image_quality: int = 92
    clip_quality: int = 80
    compression: float = 0.96  # of sound, about 16 kbit/s


@dataclass(frozen=True)
class Emoji:
    """One picture file with its words; `base` is the same for all variants of an idea.

    mirror: whether it means the same with left and right swapped.
    """

    key: str
    base: str
    label: str
    tags: tuple[str, ...]
    picture: Path
    animation: Path | None
    mirror: bool = True


def main(out: Path, cache: Path, settings: Settings | None = None) -> list[Path]:
    """Write emoji-train-*.tar and emoji-heldout-*.tar into `out`."""
    settings = settings or Settings()
    if settings.num_spoken != 0:
        importers.require_tools("espeak-ng", "flite")
    emoji = list_emoji(cache, settings)
    spoken = {item.key for item in choose(emoji, settings.num_spoken, "spoken")}
    records = [
        picture_record(item, settings, speak=item.key in spoken)
        for item in Bar(emoji, desc="emoji: pictures and speech", unit="document")
    ]
    records += list_clips(emoji, settings)
    return importers.write_split(records, out, "emoji")


def list_emoji(cache: Path, settings: Settings) -> list[Emoji]:
    """Join pictures, animations and words by code points (variation selectors apart)."""
    still = importers.fetch_npm("@lobehub/fluent-emoji-3d", "1.1.0", cache) / "assets"
    moving: dict[str, Path] = {}
    for number in () if settings.num_clips == 0 else (1, 2, 3, 4):
        package = importers.fetch_npm(f"@lobehub/fluent-emoji-anim-{number}", "1.0.0", cache)
        for path in sorted((package / "assets").glob("*.webp")):
            moving.setdefault(_plain(path.stem), path)
    words = _read_words(importers.fetch_npm("emojibase-data", "17.0.0", cache))
    found: dict[str, Emoji] = {}
    for path in sorted(still.glob("*.webp")):
        key = _plain(path.stem)
        entry = words.get(key)
        if entry is None or key in found:  # some pictures come twice, with and without fe0f
            continue
        if not settings.skin_tones and any(tone in path.stem for tone in SKIN_TONES):
            continue
        if not settings.flags and entry["label"].startswith("flag: "):
            continue
        tags = tuple(tag for tag in entry.get("tags", ()) if tag != entry["label"])
        found[key] = Emoji(
            key, base_of(key), entry["label"], tags, path, moving.get(key), _may_mirror(entry)
        )
    return list(found.values())


def list_clips(emoji: list[Emoji], settings: Settings) -> list[Record]:
    """All clips, or `num_clips` of them, each of another idea."""
    moving = choose([item for item in emoji if item.animation], None, "clips")
    if settings.num_clips is not None:
        moving = list({item.base: item for item in moving}.values())
    wanted = len(moving) if settings.num_clips is None else settings.num_clips
    clips: list[Record] = []
    with Bar(total=wanted, desc="emoji: clips", unit="clip") as bar:
        for item in moving:
            if len(clips) == wanted:
                break
            if record := clip_record(item, settings):
                clips.append(record)
                bar.update()
    return clips


def base_of(key: str) -> str:
    """The idea behind a variant: skin tone, gender and direction are taken away."""
    people = re.sub(r"1f46[89]", "1f9d1", key)  # man, woman -> person
    people = re.sub(r"-1f3f[bcdef]", "", people)
    return "emoji-" + re.sub(r"-200d-(2640|2642|27a1)", "", people)


def choose(items: list[Emoji], count: int | None, salt: str) -> list[Emoji]:
    """A fixed choice of `count` items that does not follow their order."""
    mixed = sorted(items, key=lambda item: hashlib.sha256(f"{salt} {item.key}".encode()).digest())
    return mixed if count is None else mixed[:count]


def picture_record(emoji: Emoji, settings: Settings, *, speak: bool) -> Record:
    """Label, keywords, picture, and for some the spoken label."""
    picture = importers.square(PIL.Image.open(emoji.picture), settings.side)
    data = importers.encode_webp(picture, quality=settings.image_quality)
    parts = [*_texts(emoji), {"type": "image", "suffix": "webp", "data": data}]
    if speak:
        voice = VOICES[hashlib.sha256(f"voice {emoji.key}".encode()).digest()[0] % len(VOICES)]
        data = importers.encode_opus(
            synthesize(emoji.label, voice), SAMPLE_RATE, compression=settings.compression
        )
        sound = {"type": "audio", "voice": voice, "synthetic": True}
        parts.append(sound | {"suffix": "opus", "data": data})
    return Record(emoji.key, emoji.base, "any", tuple(parts), "emoji", LICENSE, emoji.mirror)


def clip_record(emoji: Emoji, settings: Settings) -> Record | None:
    """Label, keywords and 17 frames of the animation; None when it does not move enough."""
    assert emoji.animation is not None
    with PIL.Image.open(emoji.animation) as animation:
        num_source = getattr(animation, "n_frames", 1)
        if num_source < NUM_FRAMES:
            return None
        frames, milliseconds = [], 0
        wanted = [number * num_source // NUM_FRAMES for number in range(NUM_FRAMES)]
        for number in range(num_source):
            animation.seek(number)
            animation.load()
            milliseconds += animation.info["duration"]
            if number in wanted:
                frames.append(importers.square(animation, settings.side))
    step = round(milliseconds / NUM_FRAMES)
    data = importers.encode_clip(frames, milliseconds=step, quality=settings.clip_quality)
    if data is None:
        return None
    clip = {"type": "video", "fps": round(1000 / step, 3), "suffix": "webp", "data": data}
    parts = (*_texts(emoji), clip)
    return Record(f"{emoji.key}-clip", emoji.base, "any", parts, "emoji", LICENSE, emoji.mirror)


def synthesize(text: str, voice: str, *, pitch: float = 1.0, pace: float = 1.0) -> np.ndarray:
    """The spoken text, int16 (num_samples,) at 16 kHz; pitch and pace in those of the voice."""
    import av
    import soundfile

    engine, _, name = voice.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        if engine == "espeak-ng":
            # 50 of 99 and 175 words a minute are what every voice begins with
            how = ["-p", str(round(50 * pitch)), "-s", str(round(175 * pace))]
            command = ["espeak-ng", "-v", name, *how, "-w", str(path), "--", text]
        else:
            how = ["--setf", f"f0_shift={pitch}"] if pitch != 1 else []
            how += ["--setf", f"duration_stretch={1 / pace}"] if pace != 1 else []
            command = ["flite", "-voice", name, *how, "-t", text, "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True)
        wave, rate = soundfile.read(path, dtype="int16")
    if rate == SAMPLE_RATE:
        return wave
    frame = av.AudioFrame.from_ndarray(wave[None].astype(np.int16), format="s16", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
    pieces = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([piece.to_ndarray().reshape(-1) for piece in pieces])


def _texts(emoji: Emoji) -> Iterator[dict[str, Any]]:
    yield {"type": "text", "text": emoji.label}
    if emoji.tags:
        yield {"type": "text", "text": "keywords: " + ", ".join(emoji.tags)}


def _may_mirror(entry: dict[str, Any]) -> bool:
    return not (
        entry.get("group") in ONE_WAY_GROUPS
        or entry.get("subgroup") in ONE_WAY_SUBGROUPS
        or ONE_WAY_LABEL.search(entry["label"])
    )


def _plain(name: str) -> str:
    return name.lower().replace("-fe0f", "")


def _read_words(package: Path) -> dict[str, dict[str, Any]]:
    words = {}
    for entry in json.loads((package / "en" / "data.json").read_text()):
        words[_plain(entry["hexcode"])] = entry
        for skin in entry.get("skins", ()):
            words[_plain(skin["hexcode"])] = {"tags": entry.get("tags", ())} | skin
    return words
