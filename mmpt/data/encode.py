"""Encoding: raw shards -> token shards, one to one, resumable by shard, by one or more processes.

A token shard is renamed into place when it is whole, so that a finished one needs no other marker.
It is kept when it was made from the same bytes by the same codecs. Samples that cannot be used are
counted and listed beside it, in `NAME.quarantine.jsonl`; see `mmpt.data.shard_job`.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from mmpt.config import UserError
from mmpt.data import ray_workers
from mmpt.data.accounts import shard_account
from mmpt.data.codes import count_codes, with_used_codes
from mmpt.data.left_out import LeftOut, digest, read_lists
from mmpt.data.remote import find_shards, is_remote, version_of
from mmpt.data.shard_job import PartEncoder, ShardJob, encode_shard
from mmpt.data.tars import count_samples
from mmpt.data.tokens import SUFFIX, TokenShard, temporary_path
from mmpt.data.workers import Died, Progress, run_tasks
from mmpt.vocab import Vocabulary

MOST_ON_A_CARD = 4  # processes that share it, unless told otherwise


@dataclass
class EncodeReport:
    """What became of the raw shards: of their samples, documents + filtered + bad.

    They are counted over all shards, also those that were there already.
    """

    shards: list[Path] = field(default_factory=list)  # token shards, in the order of the raw ones
    kept: int = 0  # token shards that were there already
    documents: int = 0
    filtered: Counter[str] = field(default_factory=Counter)  # by filter
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # of bad samples
    promised: int = 0  # samples that the indexes of raw shards list
    indexed: int = 0  # raw shards that have an index
    workers: int = 0  # processes beside this one
    codes: Counter[str] = field(default_factory=Counter)  # by medium

    def add(self, shard: TokenShard) -> None:
        """Count a token shard."""
        account = shard_account(shard)
        self.shards.append(shard.path)
        self.documents += account["used"]
        self.filtered.update(account["filtered"])
        self.bad += account["quarantined"]
        self.reasons.update(shard.notes.get("reasons", {}))
        self.promised += account["promised"] or 0
        self.indexed += account["promised"] is not None
        self.codes.update(shard.counts)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "shards": [str(path) for path in self.shards],
            "kept": self.kept,
            "documents": self.documents,
            "filtered": self.filtered.total(),
            "bad": self.bad,
            "promised": self.promised,
            "indexed": self.indexed,
            "filters": dict(self.filtered),
            "reasons": dict(self.reasons),
            "workers": self.workers,
            "codes": dict(self.codes),
        }


def encode_shards(
    shards: Sequence[str | Path],
    out: str | Path,
    processor: PartEncoder,
    *,
    without: Sequence[str | Path] = (),
    augment: bool = False,
    batch: int = 16,
    workers: int = 1,
    device: str = "cpu",
    ray: str | None = None,
    tolerance: float = 1.0,
    progress: bool = True,
) -> EncodeReport:
    """Encode raw shards into the folder `out`; run again after an interruption, it goes on.

    without: lists of documents to leave out, see `mmpt.data.left_out`. augment: training documents
    are there a second time as `second_view` makes them. Held-out documents are encoded as they
    are. batch: documents that are encoded together. tolerance: the share of a shard's samples that
    may be bad; beyond it, UserError. workers: processes that encode, each its own shards; 1: this
    one. Processes import the main module anew, so a script guards its own with `__name__`.
    device: where codecs compute, and are left. ray: the address of a Ray whose actors are the
    workers, see `mmpt.data.ray_workers`.
    """
    if batch < 1:
        raise UserError(f"batch = {batch}; use at least 1")
    report, pairs = EncodeReport(), _pair(shards, Path(out))
    lists = read_lists(without, [raw for raw, _ in pairs])
    jobs = [
        ShardJob(
            raw,
            path,
            _source(raw, processor, augment=augment, left_out=lists[raw]),
            tolerance,
            batch,
            device,
            lists[raw],
        )
        for raw, path in pairs
    ]
    todo = [job for job in jobs if not _finished(job, processor.vocabulary)]
    report.kept = len(jobs) - len(todo)
    _sweep(todo)  # an earlier command may have been killed
    with _bar(todo, progress=progress) as bar:
        if todo and (ray or min(workers, len(todo)) > 1):
            report.workers = min(workers, len(todo))
            _encode_apart(todo, processor, report.workers, ray, bar)
        else:
            for job in todo:
                encode_shard(processor, job, bar.update)
    for job in jobs:
        report.add(TokenShard(job.path))
    return report


def encode(
    shards: list[str],
    *,
    out: Path,
    tokenizers: Sequence[str] = (),
    max_side: int = 64,
    without: Sequence[Path] = (),
    augment: bool = False,
    batch: int = 16,
    workers: int = 0,
    device: str = "cpu",
    ray: str | None = None,
    strict: bool = False,
    tolerance: float = 100.0,
) -> dict[str, Any]:
    """Encode raw shards into token shards in a folder, with vocabulary.json and processor.json.

    SHARDS are paths, folders, patterns such as raw-{000..031}.tar, or URLs (s3, gs, http).
    Finished shards are kept, so the same command goes on after an interruption. Samples that cannot
    be used are listed beside each shard. Pictures are shrunk to `max_side` pixels. --without:
    the filtered.jsonl of `mmpt data curate --dry-run`: these documents are left out, and counted.
    --batch: documents that are encoded together. --workers: processes, each with shards of its own;
    0: as many as this machine has cores, at most 4 on a card. --device: cpu, cuda, or auto, a card
    if there is one; the processes share it. --ray ADDRESS: they are actors of that Ray cluster,
    whose machines share all folders; "local" starts one here. One command at a time may write a
    shard. --strict: stop at the first bad sample. --tolerance: stop when more than so many percent
    of a shard are bad. --augment: training documents that are no pages are encoded a second time:
    pictures and clips mirrored, unless the document says "mirror": false, and sound played a tenth
    faster or slower.
    """
    from mmpt.process import pick_device
    from mmpt.processor import DEFAULT_TOKENIZERS, Processor

    if not workers:
        # on a cluster, its machines know what they have
        on_card = device != "cpu" and (ray is not None or pick_device(device).type != "cpu")
        workers = min(os.cpu_count() or 1, MOST_ON_A_CARD if on_card else 1 << 16)
    processor = Processor.load(tokenizers or DEFAULT_TOKENIZERS, max_side=max_side)
    if not 0 <= tolerance <= 100:
        raise UserError(f"tolerance = {tolerance}; it is in percent, from 0 to 100")
    report = encode_shards(
        shards,
        out,
        processor,
        without=without,
        augment=augment,
        batch=batch,
        workers=workers,
        device=device,
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


def _source(
    raw: str, processor: PartEncoder, *, augment: bool, left_out: LeftOut
) -> dict[str, Any]:
    return {
        "name": Path(raw).name,
        "sha256": version_of(raw),
        "max_side": processor.max_side,
        "augment": augment,
    } | ({"left_out": digest(left_out)} if left_out else {})


def _encode_apart(
    jobs: Sequence[ShardJob], processor: PartEncoder, workers: int, ray: str | None, bar: Any
) -> None:
    """By several processes; a dead one is replaced, and what it left behind is removed."""
    # so that none is left alone at the end
    jobs = sorted(jobs, key=lambda job: _num_bytes(job.raw), reverse=True)
    run = run_tasks
    if ray is not None:
        run = partial(ray_workers.run_tasks, address=ray, device=jobs[0].device)
    try:
        for event in run(encode_shard, processor, jobs, workers=workers):
            if isinstance(event, Progress):
                bar.update(event.count)
            elif isinstance(event, Died):
                temporary_path(jobs[event.number].path, event.pid).unlink(missing_ok=True)
    finally:
        _sweep(jobs)


def _sweep(jobs: Sequence[ShardJob]) -> None:
    """Remove unfinished token shards of processes that are gone."""
    for job in jobs:
        for path in job.path.parent.glob(f"{escape(job.path.name)}.*.tmp"):
            path.unlink(missing_ok=True)


def _pair(shards: Sequence[str | Path], out: Path) -> list[tuple[str, Path]]:
    """Raw shard -> token shard; refuses missing ones and names that collide."""
    pairs: dict[Path, str] = {}
    for raw in find_shards([str(shard) for shard in shards]):
        path = out / f"{Path(raw).name.partition('.')[0]}{SUFFIX}"
        if path in pairs:
            raise UserError(f"{pairs[path]} and {raw} would both become {path}; rename one")
        pairs[path] = raw
    return [(raw, path) for path, raw in pairs.items()]


def _finished(job: ShardJob, vocabulary: Vocabulary) -> bool:
    """Whether the token shard is there, whole, and made from this source by these codecs."""
    if not job.path.is_file() or not _is_current(job.path, vocabulary):
        return False  # damaged or stale: encoding again is what the message asks for
    return TokenShard(job.path).notes.get("source") == job.source


def _is_current(path: Path, vocabulary: Vocabulary) -> bool:
    try:
        TokenShard(path).check(vocabulary)
    except UserError:
        return False
    return True


def _bar(jobs: Sequence[ShardJob], *, progress: bool) -> Any:
    from mmpt.progress import Bar

    total = sum(count_samples(job.raw) for job in jobs)
    return Bar(total=total, unit="doc", desc="encode", disable=not progress)


def _num_bytes(raw: str) -> int:
    """0 for what is remote."""
    return 0 if is_remote(raw) else Path(raw).stat().st_size
