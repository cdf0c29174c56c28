"""Encoding: raw shards -> token shards, one to one, resumable by shard, by one or more processes.

Codes do not depend on who makes them: every worker computes on one thread. A token shard is renamed
into place when it is whole, so that a finished one needs no other marker. It is kept when it was
made from the same bytes by the same codecs. Samples that cannot be used are counted and listed
beside it, in `NAME.quarantine.jsonl`.
"""

import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmpt.config import UserError
from mmpt.data import ray_workers
from mmpt.data.index import load_index
from mmpt.data.remote import find_shards, is_remote, local_copy, version_of
from mmpt.data.shards import Document, Quarantine, is_heldout, read_documents
from mmpt.data.tokens import SUFFIX, EncodedDocument, ShardWriter, TokenShard, temporary_path
from mmpt.data.workers import Died, Progress, run_tasks
from mmpt.parts import Audio, Image, Part, Video
from mmpt.process import one_thread
from mmpt.stream import Segment
from mmpt.vocab import MEDIA, Modality, Vocabulary

SPEEDS = (0.9, 1.1)  # of sound in a second view


class PartEncoder(Protocol):
    """What encoding needs of a processor."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def separator(self) -> np.ndarray: ...

    @property
    def max_side(self) -> int: ...

    def encode_parts(self, parts: Sequence[Part]) -> list[Segment]: ...


@dataclass
class EncodeReport:
    """What became of the raw shards; documents and bad samples are counted over all of them."""

    shards: list[Path] = field(default_factory=list)  # token shards, in the order of the raw ones
    kept: int = 0  # token shards that were there already
    documents: int = 0
    bad: int = 0
    promised: int = 0  # samples that the indexes of raw shards list
    indexed: int = 0  # raw shards that have an index
    workers: int = 0  # processes beside this one
    codes: Counter[str] = field(default_factory=Counter)  # by medium

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "shards": [str(path) for path in self.shards],
            "kept": self.kept,
            "documents": self.documents,
            "bad": self.bad,
            "promised": self.promised,
            "indexed": self.indexed,
            "workers": self.workers,
            "codes": dict(self.codes),
        }


def encode_shards(
    shards: Sequence[str | Path],
    out: str | Path,
    processor: PartEncoder,
    *,
    augment: bool = False,
    workers: int = 1,
    ray: str | None = None,
    tolerance: float = 1.0,
    progress: bool = True,
) -> EncodeReport:
    """Encode raw shards into the folder `out`; run again after an interruption, it goes on.

    augment: training documents are there a second time as `second_view` makes them. Held-out
    documents are encoded as they are. tolerance: the share of a shard's samples that may be bad;
    beyond it, UserError. workers: processes that encode, each its own shards; 1: this
    one. Processes import the main module anew, so a script guards its own with `__name__`.
    ray: the address of a Ray whose actors are the workers, see `mmpt.data.ray_workers`.
    """
    report = EncodeReport()
    tasks = [
        _Task(raw, path, _source(raw, processor, augment), tolerance)
        for raw, path in _pair(shards, Path(out))
    ]
    todo = [task for task in tasks if not _finished(task, processor.vocabulary)]
    report.kept = len(tasks) - len(todo)
    _sweep(todo)  # an earlier command may have been killed
    with _bar(todo, progress=progress) as bar:
        if todo and (ray or min(workers, len(todo)) > 1):
            report.workers = min(workers, len(todo))
            _encode_apart(todo, processor, report.workers, ray, bar)
        else:
            for task in todo:
                _encode_shard(processor, task, bar.update)
    for task in tasks:
        shard = TokenShard(task.path)
        report.shards.append(task.path)
        report.documents += len(shard) - shard.notes["augmented"]
        report.bad += shard.notes["bad"]
        promised = shard.notes.get("promised")
        report.promised += promised or 0
        report.indexed += promised is not None
        report.codes.update(shard.counts)
    return report


def encode(
    shards: list[str],
    *,
    out: Path,
    tokenizers: Sequence[str] = (),
    max_side: int = 64,
    augment: bool = False,
    workers: int = 0,
    ray: str | None = None,
    strict: bool = False,
    tolerance: float = 100.0,
) -> dict[str, Any]:
    """Encode raw shards into token shards in a folder, with vocabulary.json and processor.json.

    SHARDS are paths, folders, patterns such as raw-{000..031}.tar, or URLs (s3, gs, http).
    Finished shards are kept, so the same command goes on after an interruption. Samples that cannot
    be used are listed beside each shard. Pictures are shrunk to `max_side` pixels. --workers:
    processes, each with shards of its own; 0: as many as this machine has cores. --ray ADDRESS:
    they are actors of that Ray cluster, whose machines share all folders; "local" starts one here.
    One command at a time may write a shard. --strict: stop at the first bad sample. --tolerance:
    stop when more than so many percent of a shard are bad. --augment: training documents that are
    no pages are encoded a second time: pictures and clips mirrored, unless the document says
    "mirror": false, and sound played a tenth faster or slower.
    """
    from mmpt.processor import DEFAULT_TOKENIZERS, Processor

    processor = Processor.load(tokenizers or DEFAULT_TOKENIZERS, max_side=max_side)
    workers = workers or os.cpu_count() or 1
    if not 0 <= tolerance <= 100:
        raise UserError(f"tolerance = {tolerance}; it is in percent, from 0 to 100")
    report = encode_shards(
        shards,
        out,
        processor,
        augment=augment,
        workers=workers,
        ray=ray,
        tolerance=0.0 if strict else tolerance / 100,
    )
    paths = sorted(Path(out).glob(f"*{SUFFIX}"))  # earlier calls encoded other shards
    vocabulary = processor.vocabulary
    current = [path for path in paths if _is_current(path, vocabulary)]
    counts = count_codes(current, vocabulary)
    with_used_codes(vocabulary, counts).save(Path(out) / "vocabulary.json")
    processor.save_settings(out)
    return report.to_json() | {"vocabulary": vocabulary.fingerprint}


def second_view(document: Document) -> Document | None:
    """A training document that means the same and has other codes; None where there is none.

    Pictures and clips are mirrored where the document allows it; sound is played a tenth faster or
    slower, by the hash of the key (its pitch moves, too: speed perturbation, Ko et al. 2015).
    """
    if document.order == "fixed" or is_heldout(document.base):
        return None  # a page's text may speak of left and right
    speed = SPEEDS[zlib.crc32(document.key.encode()) % len(SPEEDS)]
    parts = [_second_part(part, speed, mirror=document.mirror) for part in document.parts]
    changed = any(new is not old for new, old in zip(parts, document.parts, strict=True))
    return replace(document, key=f"{document.key} again", parts=parts) if changed else None


def _second_part(part: Part, speed: float, *, mirror: bool) -> Part:
    if isinstance(part, Image) and mirror:
        return Image(np.ascontiguousarray(part.pixels[:, ::-1]))
    if isinstance(part, Video) and mirror:
        return Video(np.ascontiguousarray(part.frames[:, :, ::-1]), part.fps)
    if isinstance(part, Audio):
        return Audio(part.wave, round(speed * part.sample_rate)).resample(part.sample_rate)
    return part


def count_codes(paths: Iterable[str | Path], vocabulary: Vocabulary) -> dict[Modality, np.ndarray]:
    """How often each code occurs in the documents that are not held out.

    By medium int64 (codebooks, codec size); media that do not occur are left out.
    """
    totals: dict[Modality, np.ndarray] = {}
    for shard in map(TokenShard, paths):
        for document in shard:
            if is_heldout(document.base):
                continue
            for modality, codes in document.segments:
                size = shard.sizes[modality.name.lower()]
                num_books = 1 if modality == Modality.TEXT else vocabulary.num_codebooks(modality)
                shape = (num_books, size)
                counts = totals.setdefault(modality, np.zeros(shape, dtype=np.int64))
                np.add.at(counts, (np.arange(codes.size) % num_books, codes.reshape(-1)), 1)
    return totals


def with_used_codes(vocabulary: Vocabulary, counts: Mapping[Modality, np.ndarray]) -> Vocabulary:
    """The same vocabulary (and fingerprint), which knows which codes occur in training data."""
    by_name = {m.name.lower(): np.atleast_2d(count) for m, count in counts.items()}
    books = {m.name.lower(): vocabulary.ranges_of(m) for m in MEDIA if vocabulary.has(m)}
    ranges = []
    for code_range in vocabulary.ranges:
        names = [name for name in code_range.fingerprints if name in by_name]
        seen = [by_name[name][books[name].index(code_range)] for name in names]
        used = tuple(np.flatnonzero(sum(seen)).tolist()) if seen else None
        ranges.append(replace(code_range, used=used))
    return replace(vocabulary, ranges=tuple(ranges))


@dataclass(frozen=True)
class _Task:
    """A raw shard, the token shard that it becomes, and what that notes of its origin."""

    raw: str  # a path or URL
    path: Path
    source: dict[str, Any]
    tolerance: float

    def __str__(self) -> str:
        return self.raw


def _source(raw: str, processor: PartEncoder, augment: bool) -> dict[str, Any]:
    return {
        "name": Path(raw).name,
        "sha256": version_of(raw),
        "max_side": processor.max_side,
        "augment": augment,
    }


def _encode_apart(
    tasks: Sequence[_Task], processor: PartEncoder, workers: int, ray: str | None, bar: Any
) -> None:
    """By several processes; a dead one is replaced, and what it left behind is removed."""
    # so that none is left alone at the end
    tasks = sorted(tasks, key=lambda task: _num_bytes(task.raw), reverse=True)
    run = run_tasks if ray is None else partial(ray_workers.run_tasks, address=ray)
    try:
        for event in run(_encode_shard, processor, tasks, workers=workers):
            if isinstance(event, Progress):
                bar.update(event.count)
            elif isinstance(event, Died):
                temporary_path(tasks[event.number].path, event.pid).unlink(missing_ok=True)
    finally:
        _sweep(tasks)


def _sweep(tasks: Sequence[_Task]) -> None:
    """Remove unfinished token shards of processes that are gone."""
    for task in tasks:
        for path in task.path.parent.glob(f"{escape(task.path.name)}.*.tmp"):
            path.unlink(missing_ok=True)


def _encode_shard(processor: PartEncoder, task: _Task, report: Callable[[int], Any]) -> None:
    with one_thread():
        _write_shard(processor, task, report)


def _write_shard(processor: PartEncoder, task: _Task, report: Callable[[int], Any]) -> None:
    raw, path, source = local_copy(task.raw), task.path, task.source
    listing = path.with_name(path.name.removesuffix(SUFFIX) + ".quarantine.jsonl")
    index = load_index(raw)
    promised = None if index is None else index.promised
    total = _count_samples(raw) if promised is None else promised
    allowed = None if task.tolerance >= 1 else int(task.tolerance * total)
    quarantine, augmented, used = Quarantine(listing, allowed), 0, 0
    with ShardWriter(path, processor.vocabulary, separator=processor.separator) as writer:
        listing.unlink(missing_ok=True)  # of an interrupted try
        for document in read_documents([raw], quarantine):
            try:
                other = second_view(document) if source["augment"] else None
                views = [_encode_document(each, processor) for each in (document, other) if each]
                for view in views:
                    writer.check(view)
            except UserError as error:
                quarantine.add(shard=document.shard, offset=-1, key=document.key, why=str(error))
            else:
                for view in views:
                    writer.add(view)
                augmented, used = augmented + len(views) - 1, used + 1
            report(1)
        if promised not in (None, used + quarantine.count):
            raise RuntimeError(f"{raw}: {used} used, {quarantine.count} bad, {promised} promised")
        notes = {"bad": quarantine.count, "augmented": augmented, "promised": promised}
        writer.finish({"source": source, **notes})


def _encode_document(document: Document, processor: PartEncoder) -> EncodedDocument:
    segments = processor.encode_parts(document.parts)
    return EncodedDocument(document.key, document.base, document.order, segments)


def _pair(shards: Sequence[str | Path], out: Path) -> list[tuple[str, Path]]:
    """Raw shard -> token shard; refuses missing ones and names that collide."""
    pairs: dict[Path, str] = {}
    for raw in find_shards([str(shard) for shard in shards]):
        path = out / f"{Path(raw).name.partition('.')[0]}{SUFFIX}"
        if path in pairs:
            raise UserError(f"{pairs[path]} and {raw} would both become {path}; rename one")
        pairs[path] = raw
    return [(raw, path) for path, raw in pairs.items()]


def _finished(task: _Task, vocabulary: Vocabulary) -> bool:
    """Whether the token shard is there, whole, and made from this source by these codecs."""
    if not task.path.is_file() or not _is_current(task.path, vocabulary):
        return False  # damaged or stale: encoding again is what the message asks for
    return TokenShard(task.path).notes.get("source") == task.source


def _is_current(path: Path, vocabulary: Vocabulary) -> bool:
    try:
        TokenShard(path).check(vocabulary)
    except UserError:
        return False
    return True


def _bar(tasks: Sequence[_Task], *, progress: bool) -> Any:
    from tqdm import tqdm

    total = sum(_count_samples(task.raw) for task in tasks)
    return tqdm(total=total, unit="doc", desc="encode", disable=not progress)


def _num_bytes(raw: str) -> int:
    """0 for what is remote."""
    return 0 if is_remote(raw) else Path(raw).stat().st_size


def _count_samples(raw: str | Path) -> int:
    """About how many samples a raw shard has, for the progress bar: damage is counted elsewhere.

    0 for what is remote.
    """
    try:
        with tarfile.open(raw, "r:") as tar:
            return len({_key(member.name) for member in tar})
    except (OSError, tarfile.TarError):
        return 0


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"
