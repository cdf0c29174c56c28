"""Spoken prompts of the Asterisk telephone system, with their transcripts: one human voice."""

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmpt.data import importers
from mmpt.data.shards import Record, is_heldout
from mmpt.progress import Bar

SAMPLE_RATE = 16_000
VOICE = "asterisk"
LICENSE = "CC-BY-SA-3.0"
ATTRIBUTION = [
    {
        "package": "Debian asterisk-core-sounds-en-g722, asterisk-core-sounds-en 1.6.1",
        "gives": "spoken prompts and transcripts",
        "license": "CC-BY-SA-3.0",
        "copyright": "2003-2010, Allison Smith (voice); financial contributions by Digium, Inc.",
        "homepage": "https://downloads.asterisk.org/pub/telephony/asterisk/",
        "changes": "decoded from G.722, encoded as Ogg Opus; remarks in brackets taken away",
    }
]


@dataclass(frozen=True)
class Settings:
    """The defaults build everything; the sampler leaves the longest prompts out."""

    max_seconds: float = 120.0
    compression: float = 0.96  # of sound, about 16 kbit/s


def main(out: Path, cache: Path, settings: Settings | None = None) -> list[Path]:
    """Write prompts-train-*.tar and prompts-heldout-*.tar into `out`."""
    settings = settings or Settings()
    words = importers.fetch_deb("asterisk-core-sounds-en", cache)
    sounds = importers.fetch_deb("asterisk-core-sounds-en-g722", cache)
    folder = sounds / "usr/share/asterisk/sounds/en_US_f_Allison"
    listing = words / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    transcripts = {
        name: text for name, text in read_transcripts(listing) if (folder / f"{name}.g722").exists()
    }
    bases = base_keys(transcripts)
    records = []
    for name, transcript in Bar(transcripts.items(), desc="prompts", unit="prompt"):
        wave = decode_g722(folder / f"{name}.g722")
        if len(wave) <= settings.max_seconds * SAMPLE_RATE:
            record = prompt_record(
                name, bases[name], transcript, wave, compression=settings.compression
            )
            records.append(record)
    return importers.write_split(records, out, "prompts")


def read_transcripts(listing: Path) -> Iterator[tuple[str, str]]:
    """Name and transcript of every prompt that is speech: tones, silence and effects are not."""
    for line in gzip.decompress(listing.read_bytes()).decode().splitlines():
        name, colon, text = line.partition(":")
        if line.startswith(";") or not colon:
            continue
        text = re.sub(r"\[[^]]*\]|<[^>]*>|\([^)]*\)", " ", text)  # remarks, not spoken
        text = " ".join(text.split())
        if text:
            yield name.strip(), text


def base_keys(transcripts: dict[str, str]) -> dict[str, str]:
    """One base key for all prompts that say the same words ("Thank you." is recorded three times).

    It is the key of the first of them that is not held out, if there is one: what is spoken in
    training is never held out.
    """
    groups: dict[str, list[str]] = {}
    for name, text in transcripts.items():
        groups.setdefault(" ".join(re.findall(r"[a-z0-9']+", text.lower())), []).append(name)
    bases = {}
    for names in groups.values():
        keys = [_key(name) for name in names]
        base = next((key for key in keys if not is_heldout(key)), keys[0])
        bases |= dict.fromkeys(names, base)
    return bases


def decode_g722(path: Path) -> np.ndarray:
    """int16 (num_samples,) at 16 kHz."""
    import av

    with av.open(path, format="g722") as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(frames)


def prompt_record(
    name: str, base: str, transcript: str, wave: np.ndarray, *, compression: float
) -> Record:
    """Transcript and sound."""
    data = importers.encode_opus(wave, SAMPLE_RATE, compression=compression)
    sound = {"type": "audio", "voice": VOICE, "suffix": "opus", "data": data}
    parts = ({"type": "text", "text": transcript}, sound)
    return Record(_key(name), base, "any", parts, "prompts", LICENSE)


def _key(name: str) -> str:
    return "prompt-" + name.replace("/", "-")
