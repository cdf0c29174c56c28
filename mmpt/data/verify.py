"""`mmpt data verify`: every damage of raw shards, and clean copies of what is whole."""

from pathlib import Path
from typing import Any

from mmpt.config import UserError
from mmpt.data.index import build_index, load_index
from mmpt.data.indexed import samples_of
from mmpt.data.inspect import shown
from mmpt.data.shards import Document, Quarantine, is_heldout, read_usable, write_samples
from mmpt.data.tars import Sample

SPLITS = {"-train-": False, "-heldout-": True, "-unseen-": True}


def verify(
    shards: list[str], *, quarantine: Path | None = None, repair: Path | None = None
) -> dict[str, Any]:
    """Read raw shards in full and list every damage, bad sample and document of the wrong split.

    A shard that has an index is held to it: what it promises is there, or is listed. --repair:
    a folder for clean copies of the shards in which something was bad; they hold all that is whole,
    byte by byte. The exit status is 1 when anything was bad.
    """
    bad, copies = Quarantine(quarantine), []
    num_shards = num_documents = indexed = 0
    for path in shown(shards):
        num_shards += 1
        before, good = bad.count, []
        for sample, document in read_usable([path], bad):
            num_documents += 1
            if _in_its_split(path, document):
                good.append(sample.offset)
            else:
                why = f"wrong split: base key {document.base!r} belongs to the other one"
                bad.add(shard=str(path), offset=sample.offset, key=document.key, why=why)
        index = load_index(path)
        indexed += index is not None
        if index is not None and bad.count == before and build_index(path).sha256 != index.sha256:
            why = "changed: every indexed sample is there, other bytes are not what they were"
            bad.add(shard=str(path), offset=0, key="", why=why)
        if repair is not None and bad.count > before:
            copies.append(_copy(path, repair, set(good)))
    return {
        "ok": bad.count == 0,
        "exit_status": int(bad.count > 0),
        "shards": num_shards,
        "indexed": indexed,
        "documents": num_documents,
        "bad_samples": bad.count,
        "reasons": dict(bad.reasons),
        "damage": bad.lines,
        "repaired": [str(path) for path in copies],
    }


def _in_its_split(path: Path, document: Document) -> bool:
    held = next((held for mark, held in SPLITS.items() if mark in path.name), None)
    return held is None or is_heldout(document.base) is held


def _copy(path: Path, folder: Path, offsets: set[int]) -> Path:
    """A shard of the same name with the samples that begin at these offsets."""
    copy = folder / path.name
    if copy.exists() and copy.samefile(path):
        raise UserError(f"--repair {folder} holds {path} itself; give another folder")
    samples = (s for s in samples_of(path) if isinstance(s, Sample) and s.offset in offsets)
    write_samples(copy, ({"__key__": s.key, **s.members} for s in samples))
    return copy
