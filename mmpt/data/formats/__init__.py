"""Other people's documents as raw shards: one file for each format, and the verb that runs them.

An importer turns a path into drafts, one at a time, so that nothing but the shard that is being
filled is held. What it cannot use is left out with the reason, and the import goes on.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmpt.config import UserError
from mmpt.data.formats import clips, markdown, mint, mmc4, obelics, pdf, speech, webpage
from mmpt.data.formats.draft import Draft, Importer, Item, LeftOut
from mmpt.data.formats.writer import SplitWriter
from mmpt.data.shards import Quarantine, Record
from mmpt.progress import Bar

Kind = Literal["obelics", "mmc4", "mint", "html", "markdown", "pdf", "clips", "speech"]


@dataclass(frozen=True)
class Format:
    """An importer, what package it needs, and whether its pictures lie in a folder apart."""

    read: Importer
    package: str = ""
    by_url: bool = False


FORMATS: dict[Kind, Format] = {
    "obelics": Format(obelics.read, "pyarrow", by_url=True),
    "mmc4": Format(mmc4.read, by_url=True),
    "mint": Format(mint.read),
    "html": Format(webpage.read),
    "markdown": Format(markdown.read, "markdown_it"),
    "pdf": Format(pdf.read, "pypdfium2"),
    "clips": Format(clips.read),
    "speech": Format(speech.read),
}


def import_documents(
    kind: Kind,
    paths: list[Path],
    *,
    out: Path,
    name: str | None = None,
    images: Path | None = None,
    whole: bool = False,
    license: str | None = None,
    shard_mib: int = 128,
) -> dict[str, Any]:
    """Turn documents of KIND into raw shards, OUT/NAME-train-0000.tar, OUT/NAME-heldout-0000.tar.

    KIND is obelics, mmc4, mint, html, markdown, pdf, clips or speech; PATHS are files or folders.
    obelics, mmc4: pictures are looked up in the folder IMAGES by the SHA-256 of their URL, or by
    the last component of it. A picture that is missing or broken is left out and its document
    stays, unless --whole is given. What is left out is counted and listed, with the reason, in
    OUT/NAME-quarantine.jsonl. Documents stay in their order. NAME is KIND if not given; a new
    import of a NAME replaces the one before.
    """
    found = FORMATS[kind]
    _check(kind, found, paths, images, shard_mib)
    name = name or kind
    writer = SplitWriter(out, name, shard_mib << 20)
    quarantine = out / f"{name}-quarantine.jsonl"
    quarantine.unlink(missing_ok=True)
    documents, places = Quarantine(quarantine), Quarantine(quarantine)
    num_read = num_written = 0
    for item in Bar(_items(found.read, paths, images), desc=f"importing {kind}", unit="document"):
        record = _to_record(item, f"{name}-{num_read:08d}", name, license or "", whole)
        num_read += 1
        if isinstance(record, LeftOut):
            _add(documents, record, record.why)
            continue
        assert isinstance(item, Draft)
        for why in item.lost:
            _add(places, item, why)
        writer.add(record)
        num_written += 1
    if not num_read:
        raise UserError(f"no {kind} documents in {', '.join(map(str, paths))}; name other paths")
    shards = writer.finish()
    return {
        "read": num_read,
        "written": num_written,
        "left_out": documents.count,
        "reasons": dict(documents.reasons),
        "parts_left_out": places.count,
        "part_reasons": dict(places.reasons),
        "shards": [str(path) for path in shards],
        "bytes": sum(path.stat().st_size for path in shards),
        "quarantine": str(quarantine) if documents.count + places.count else None,
    }


def _check(
    kind: Kind, found: Format, paths: list[Path], images: Path | None, shard_mib: int
) -> None:
    if shard_mib < 1:
        raise UserError(f"shard_mib = {shard_mib}; needs at least 1")
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is not there; name files or folders of {kind}")
    if found.by_url and (images is None or not images.is_dir()):
        raise UserError(
            f"{kind} names its pictures by URL; fetch them, and give their folder by --images"
            + (f" (not {images})" if images else "")
        )
    if images is not None and not found.by_url:
        raise UserError(f"--images is for obelics and mmc4; {kind} knows where its pictures are")
    if found.package and importlib.util.find_spec(found.package) is None:
        raise UserError(f"{kind} needs {found.package}; run `pip install 'mmpt[import]'`")


def _items(read: Importer, paths: list[Path], images: Path | None) -> Iterator[Item]:
    for path in paths:
        try:
            yield from read(path, images)
        except UserError as error:
            yield LeftOut(str(path), 0, path.stem, str(error))


def _to_record(item: Item, key: str, source: str, license: str, whole: bool) -> Record | LeftOut:
    if isinstance(item, LeftOut):
        return item
    if whole and item.lost:
        why = f"incomplete: {len(item.lost)} parts lost, the first: {item.lost[0]}"
        return LeftOut(item.path, item.place, item.base, why)
    if not item.parts:
        why = f"empty document: {item.lost[0] if item.lost else 'nothing in it can be used'}"
        return LeftOut(item.path, item.place, item.base, why)
    return Record(key, item.base, item.order, tuple(item.parts), source, license)


def _add(quarantine: Quarantine, item: Item, why: str) -> None:
    key = item.key if isinstance(item, LeftOut) else item.base
    quarantine.add(shard=item.path, offset=item.place, key=key, why=why)
