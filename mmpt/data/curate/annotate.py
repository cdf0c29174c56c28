"""Annotation: one row of numbers for everything that is read of a shard, in a parquet file.

The slow half of curation, done once: a file is kept as long as its shard, the evaluation sets and
the annotations themselves are the same. What cannot be used has a row as well, which says why.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpt.config import UserError, write_atomic
from mmpt.data.curate import media, text
from mmpt.data.curate.columns import ANNOTATED, arrow_schema
from mmpt.data.curate.evaluations import Evaluations, fingerprint, overlap
from mmpt.data.index import index_path
from mmpt.data.indexed import samples_of
from mmpt.data.remote import is_remote, local_copy, version_of
from mmpt.data.shards import Damage, Document, is_heldout, load_document
from mmpt.data.workers import Progress, run_tasks
from mmpt.parts import Audio, Image, Text, Video
from mmpt.progress import Bar

FORMAT_VERSION = 1  # another one when a column means something else: then all is annotated again
STATE = b"mmpt"  # key of what a file was made of, in its metadata


@dataclass(frozen=True)
class Task:
    """A raw shard, where its annotations go, and what they are made of."""

    shard: str  # a path or URL
    path: Path
    state: str

    def __str__(self) -> str:
        return self.shard


def annotate_shards(
    shards: Sequence[str], folder: Path, evaluations: Evaluations, *, workers: int = 1
) -> tuple[list[Task], int]:
    """Write the annotations that are not there yet into `folder`; how many there were, too.

    workers: processes, each with shards of its own; 1: this one.
    """
    tasks = _tasks(shards, folder, fingerprint(evaluations))
    todo = [task for task in tasks if _state_of(task.path) != task.state]
    with Bar(desc="annotate", unit=" documents", disable=not todo) as bar:
        if min(workers, len(todo)) > 1:
            for event in run_tasks(annotate_shard, evaluations, todo, workers=workers):
                if isinstance(event, Progress):
                    bar.update(event.count)
        else:
            for task in todo:
                annotate_shard(evaluations, task, bar.update)
    return tasks, len(tasks) - len(todo)


def annotate_shard(evaluations: Evaluations, task: Task, report: Callable[[int], Any]) -> None:
    """Write the annotations of one shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for row in _rows(task.shard, evaluations):
        rows.append(row)
        report(1)
    schema = arrow_schema(ANNOTATED).with_metadata({STATE: task.state.encode()})
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="zstd")
    write_atomic(task.path, buffer.getvalue().to_pybytes())


def annotate_document(document: Document, evaluations: Evaluations) -> dict[str, Any]:
    """The columns of a document; those that do not apply are left out."""
    pictures = [part for part in document.parts if isinstance(part, Image | Video)]
    sounds = [part for part in document.parts if isinstance(part, Audio)]
    texts = [part.text for part in document.parts if isinstance(part, Text)]
    row: dict[str, Any] = {
        "base": document.base,
        "source": document.source,
        "heldout": is_heldout(document.base),
        "texts": len(texts),
        "pictures": len(pictures),
        "sounds": len(sounds),
    }
    if texts:
        whole = "\n".join(texts)
        words = text.words_of(whole)
        hashes = text.hash_words(words)
        row |= text.annotate_text(whole, words, hashes) | overlap(hashes, evaluations)
    if pictures:
        row |= media.annotate_pictures(pictures)
    if sounds:
        row |= media.annotate_sounds(sounds, sum(map(len, texts)))
    return row


def _rows(shard: str, evaluations: Evaluations) -> Iterator[dict[str, Any]]:
    for number, item in enumerate(samples_of(local_copy(shard))):
        row: dict[str, Any] = {"shard": shard, "number": number}
        row |= {"offset": item.offset, "key": item.key}
        if isinstance(item, Damage):
            yield row | {"problem": item.why}
            continue
        try:
            row |= annotate_document(load_document(item), evaluations)
        except UserError as error:
            row["problem"] = str(error)
        yield row


def _tasks(shards: Sequence[str], folder: Path, evaluations: str) -> list[Task]:
    tasks: dict[str, Task] = {}
    for shard in shards:
        name = Path(shard).name.removesuffix(".tar")
        if name in tasks:
            raise UserError(f"{tasks[name]} and {shard} have one name; rename one of them")
        made_of = {
            "format": FORMAT_VERSION,
            "shard": shard,
            "version": _version(shard),
            "evaluations": evaluations,
        }
        tasks[name] = Task(shard, folder / f"{name}.parquet", json.dumps(made_of))
    return list(tasks.values())


def _version(shard: str) -> str:
    """Size and time of a local shard: reading terabytes to hash them would not take seconds."""
    if is_remote(shard):
        return version_of(shard)
    # an index tells more about damage: with another one the shard is read again
    files = [path for path in (Path(shard), index_path(shard)) if path.exists()]
    return ", ".join(f"{s.st_size} bytes {s.st_mtime_ns} ns" for s in map(Path.stat, files))


def _state_of(path: Path) -> str | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        return (pq.read_schema(path).metadata or {}).get(STATE, b"").decode()
    except (pa.ArrowException, OSError):
        return None  # it is written anew


def digest(tasks: Sequence[Task]) -> str:
    """What changes when any annotation changes."""
    return hashlib.sha256("\n".join(task.state for task in tasks).encode()).hexdigest()
