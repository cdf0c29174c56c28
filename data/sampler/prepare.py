"""The embedded sampler: a little of every source that may be committed, under 14 MB.

It runs the other prepare scripts with the settings below, copies the licence texts out of the
packages, and writes ATTRIBUTION.json with the origin and the checksum of every shard.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from mmpt.config import UserError, write_atomic
from mmpt.data import importers
from mmpt.data.inspect import inspect
from mmpt.data.sources import load_script

LICENSE = "MIT, CC-BY-SA-3.0 and BSD-3-Clause, by shard"
MAX_BYTES = 14_000_000
MARKS = ("<!-- counts, written by prepare.py -->", "<!-- end of counts -->")
SETTINGS: dict[str, dict[str, Any]] = {
    "emoji": {
        "skin_tones": False,
        "flags": False,
        "num_clips": 180,
        "num_spoken": 560,
        "image_quality": 80,
        "clip_quality": 75,
        "compression": 0.985,
    },
    "prompts": {"max_seconds": 15.0, "compression": 0.985},
    "handbook": {"num_documents": 320},
    "voices": {"num_train": 84, "num_heldout": 50, "num_more": 0},  # the full set takes 16 MB
}
MIT_TEXT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def main(out: Path, cache: Path) -> list[Path]:
    """Write the sampler's shards, licences and ATTRIBUTION.json into `out`."""
    paths = []
    for name, values in SETTINGS.items():
        script = load_script(name)
        paths += script.main(out, cache, script.Settings(**values))
    write_licenses(out / "LICENSES", cache)
    attribution = {
        "sources": {name: load_script(name).ATTRIBUTION for name in SETTINGS},
        "settings": SETTINGS,
        "shards": [describe(path) for path in paths],
    }
    write_atomic(out / "ATTRIBUTION.json", json.dumps(attribution, indent=1) + "\n")
    write_table(out / "README.md", attribution["shards"])
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if num_bytes >= MAX_BYTES:
        raise UserError(f"the sampler takes {num_bytes} bytes, at most {MAX_BYTES}; lower SETTINGS")
    return paths


def describe(path: Path) -> dict[str, Any]:
    """Counts and checksum of a shard."""
    counts = inspect([path])
    return {
        "shard": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "documents": counts["documents"],
        "modalities": counts["modalities"],
    }


def write_table(card: Path, shards: list[dict[str, Any]]) -> None:
    """Put the counts into the card, between its two marks; without a card, do nothing."""
    if not card.exists():
        return
    before, _, rest = card.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    write_atomic(card, before + MARKS[0] + "\n" + count_table(shards) + MARKS[1] + after)


def count_table(shards: list[dict[str, Any]]) -> str:
    """Markdown: what each shard holds."""
    lines = [
        "| shard | bytes | documents | text bytes | images | clips | speech seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for shard in shards:
        counts = shard["modalities"]
        numbers = [
            shard["bytes"],
            shard["documents"],
            counts.get("text", {}).get("bytes", 0),
            counts.get("image", {}).get("parts", 0),
            counts.get("video", {}).get("parts", 0),
            round(counts.get("audio", {}).get("seconds", 0)),
        ]
        lines.append(f"| {shard['shard']} | " + " | ".join(f"{n:,}" for n in numbers) + " |")
    return "\n".join(lines) + "\n"


def write_licenses(folder: Path, cache: Path) -> None:
    """The licence texts as the packages carry them."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in ("asterisk-core-sounds-en-g722", "python-sklearn-doc"):
        text = importers.fetch_deb(package, cache) / "usr/share/doc" / package / "copyright"
        shutil.copyfile(text, folder / f"{package}.txt")
    words = importers.fetch_npm("emojibase-data", "17.0.0", cache)
    shutil.copyfile(words / "LICENSE", folder / "emojibase-data.txt")
    # these packages state "license": "MIT" and the copyright line, and carry no licence file
    note = "@lobehub/fluent-emoji-3d, @lobehub/fluent-emoji-anim-1..4: MIT License\n\n"
    copyright_line = "Copyright (c) 2023 LobeHub (art: Fluent Emoji by Microsoft)\n\n"
    write_atomic(folder / "fluent-emoji.txt", note + copyright_line + MIT_TEXT)
