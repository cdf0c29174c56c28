"""The verbs of `mmpt data` that look: list, prepare, inspect. Each returns what `--json` prints."""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mmpt.config import UserError, load_recipe
from mmpt.data import sources
from mmpt.data.indexed import samples_of
from mmpt.data.remote import find_shards, local_copy
from mmpt.data.render import write_page
from mmpt.data.shards import Damage, Document, Quarantine, load_document
from mmpt.parts import Audio, Image, Text, Video
from mmpt.progress import Bar

logger = logging.getLogger(__name__)


def list_datasets() -> dict[str, Any]:
    """The data sets that mmpt can build, and those that are here."""
    return {
        "sets": [
            {
                "name": source.name,
                "summary": source.summary,
                "license": source.license,
                "shards": [str(path) for path in source.shards],
                "bytes": sum(path.stat().st_size for path in source.shards),
            }
            for source in sources.list_sources()
        ]
    }


def prepare(
    name: str, settings: Sequence[str] = (), *, out: Path | None = None, cache: Path | None = None
) -> dict[str, Any]:
    """Fetch the packages of a data set and write its shards into OUT (default: build/NAME).

    Settings are key=value of those that its script has, such as num_episodes=7500 of gridworld.
    """
    started = time.monotonic()
    out = Path("build") / name if out is None else out
    script = sources.load_script(name)
    if settings and not hasattr(script, "Settings"):
        raise UserError(f"{name} has no settings; leave out {' '.join(settings)}")
    chosen = [load_recipe(script.Settings, None, settings)] if settings else []
    try:
        out.mkdir(parents=True, exist_ok=True)
        paths = script.main(out, cache or sources.default_cache(), *chosen)
    except PermissionError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from None
    return {
        "name": name,
        "shards": [str(path) for path in paths],
        "bytes": sum(path.stat().st_size for path in paths),
        "seconds": round(time.monotonic() - started, 1),
    }


def inspect(
    shards: list[str],
    *,
    quarantine: Path | None = None,
    render: Path | None = None,
    documents: int = 10,
) -> dict[str, Any]:
    """Count samples, documents and media of raw shards; everything is decoded.

    --render FILE.html: a page that shows --documents of them, from all shards in turn, as a person
    would read them: text, pictures, clips and sound in order, with their times.
    """
    bad = Quarantine(quarantine)
    modalities: dict[str, Counter[str]] = {}
    sources_seen, turns = Counter[str](), Counter[str]()
    rows, num_samples = [], 0
    for path in shown(shards):
        row = {"shard": str(path), "samples": 0, "documents": 0, "bad_samples": -bad.count}
        for document in _documents(path, bad, row):
            sources_seen[document.source] += 1
            turns.update(role for role, _ in groupby(document.roles))
            _count_parts(document, modalities)
        row["bad_samples"] += bad.count
        num_samples += row["samples"]
        rows.append(row)
    if render is not None:
        write_page(render, [local_copy(shard) for shard in find_shards(shards)], documents)
    return {
        "shards": rows,
        "samples": num_samples,
        "documents": sum(row["documents"] for row in rows),
        "bad_samples": bad.count,
        "reasons": dict(bad.reasons),
        "sources": dict(sources_seen),
        **({"turns": dict(turns)} if turns else {}),
        "modalities": {
            name: {key: round(value, 3) for key, value in counts.items()}
            for name, counts in modalities.items()
        },
        **({} if render is None else {"page": str(render)}),
    }


def _documents(path: Path, bad: Quarantine, row: dict[str, Any]) -> Iterator[Document]:
    """The documents of one shard, with counts of samples and documents in `row`."""
    for item in samples_of(path):
        where = {"shard": item.shard, "offset": item.offset, "key": item.key}
        if isinstance(item, Damage):
            bad.add(**where, why=item.why)
            continue
        row["samples"] = row.get("samples", 0) + 1
        try:
            document = load_document(item)
        except UserError as error:
            bad.add(**where, why=str(error))
            continue
        row["documents"] = row.get("documents", 0) + 1
        yield document


def _count_parts(document: Document, modalities: dict[str, Counter[str]]) -> None:
    for part in document.parts:
        counts = modalities.setdefault(type(part).__name__.lower(), Counter())
        counts["parts"] += 1
        if isinstance(part, Text):
            counts["bytes"] += len(part.text.encode())
        elif isinstance(part, Image):
            counts["pixels"] += part.pixels.shape[0] * part.pixels.shape[1]
        elif isinstance(part, Video):
            counts["frames"] += len(part.frames)
            counts["seconds"] += len(part.frames) / part.fps  # type: ignore[assignment] # a float sum
        elif isinstance(part, Audio):
            counts["seconds"] += part.seconds  # type: ignore[assignment] # a float sum


def shown(shards: Sequence[str | Path]) -> Iterator[Path]:
    """The shards that are named, on this machine, under a progress bar. Raises UserError."""
    found = find_shards([str(shard) for shard in shards])
    return (local_copy(shard) for shard in Bar(found, desc="reading", unit="shard"))
