"""Tux Paint stamps: pictures with one-sentence descriptions, a few of them spoken.

The package states GPL-2 for everything, so shards are built on request and never committed.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from mmpt.config import UserError
from mmpt.data import importers
from mmpt.data.shards import Record
from mmpt.parts import Audio
from mmpt.progress import Bar

log = logging.getLogger(__name__)

LICENSE = "GPL-2"
ATTRIBUTION = [
    {
        "package": "Debian tuxpaint-stamps-default",
        "gives": "pictures, descriptions, spoken descriptions",
        "license": "GPL-2",
        "copyright": "2002-2022 by Bill Kendrick",
        "homepage": "https://tuxpaint.org",
        "changes": "on white, shrunk, WebP",
    }
]


@dataclass(frozen=True)
class Settings:
    """How the pictures are stored."""

    side: int = 64  # pixels
    image_quality: int = 92


def main(out: Path, cache: Path, settings: Settings | None = None) -> list[Path]:
    """Write stamps-train-*.tar and stamps-heldout-*.tar into `out`."""
    settings = settings or Settings()
    root = importers.fetch_deb("tuxpaint-stamps-default", cache) / "usr/share/tuxpaint/stamps"
    records, num_skipped = [], 0
    for path in Bar(sorted(root.rglob("*.png")), desc="stamps", unit="stamp"):
        description = describe(path)
        if description:
            records.append(stamp_record(path, root, description, settings))
        num_skipped += not description
    if not records:
        raise UserError(f"{root} holds no stamps; is the package complete?")
    log.info("stamps: %d pictures without a description left out", num_skipped)
    return importers.write_split(records, out, "stamps")


def describe(path: Path) -> str:
    """The English description: the first line of the .txt beside the picture."""
    text = path.with_suffix(".txt")
    if not text.exists():
        return ""
    first, _, _ = text.read_text(encoding="utf-8", errors="replace").partition("\n")
    return first.strip()


def stamp_record(path: Path, root: Path, description: str, settings: Settings) -> Record:
    """Description, picture, and the spoken description where there is an English one."""
    with PIL.Image.open(path) as picture:
        small = importers.square(picture, settings.side)
    data = importers.encode_webp(small, quality=settings.image_quality)
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": description},
        {"type": "image", "suffix": "webp", "data": data},
    ]
    spoken = path.with_name(f"{path.stem}_desc.ogg")
    if spoken.exists():
        sound = spoken.read_bytes()
        Audio.load(sound)  # a broken file stops the build here, not a training later
        parts.append({"type": "audio", "voice": "tuxpaint", "suffix": "ogg", "data": sound})
    key = "stamp-" + "-".join(path.relative_to(root).with_suffix("").parts)
    key = key.replace(".", "-")
    return Record(key, key, "any", tuple(parts), "stamps", LICENSE)
