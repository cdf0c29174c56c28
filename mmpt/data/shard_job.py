"""One raw shard -> one token shard: read, filtered, encoded in batches of documents, accounted for.

Equal media of a batch go through their codec together. Codes do not depend on that, for a codec
computes every unit alone, so the bytes of a token shard are the same for any batch.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmpt.config import UserError
from mmpt.data.index import load_index
from mmpt.data.indexed import samples_of
from mmpt.data.quarantine import Quarantine
from mmpt.data.remote import local_copy
from mmpt.data.shards import Document, is_heldout, load_document
from mmpt.data.tars import Damage, count_samples
from mmpt.data.tokens import SUFFIX, EncodedDocument, ShardWriter
from mmpt.parts import Audio, Image, Part, Text, Video
from mmpt.process import one_thread, pick_device
from mmpt.stream import Segment
from mmpt.vocab import Vocabulary

SPEEDS = (0.9, 1.1)  # of sound in a second view
MAX_BATCH_BYTES = 64 << 20  # of decoded media; one document may have more


class PartEncoder(Protocol):
    """What encoding needs of a processor."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def separator(self) -> np.ndarray: ...

    @property
    def max_side(self) -> int: ...

    def encode_batch(
        self, documents: Sequence[Sequence[Part]]
    ) -> Sequence[list[Segment] | UserError]: ...

    def to(self, device: str) -> Any: ...


@dataclass(frozen=True)
class ShardJob:
    """A raw shard, the token shard that it becomes, and what that notes of its origin."""

    raw: str  # a path or URL
    path: Path
    source: Mapping[str, Any]
    tolerance: float  # share of the samples that may be bad
    batch: int = 1  # documents that are encoded together
    device: str = "cpu"  # as `pick_device` takes it
    left_out: Mapping[str, str] = field(default_factory=dict)  # key -> by which filter

    def __str__(self) -> str:
        return self.raw


def encode_shard(processor: PartEncoder, job: ShardJob, report: Callable[[int], Any]) -> None:
    """Do a job; `report` is told how many more documents were looked at.

    Codes do not depend on who makes them: on a CPU, one thread does.
    """
    device = pick_device(job.device)
    with one_thread(), _on(device.type):
        if device.type != "cpu":
            processor.to(str(device))
        _Work(processor, job, device.type).run(report)


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


class _Read(NamedTuple):
    """A sample or a damage: where it is, and the views of its document or why there are none."""

    where: dict[str, Any]
    views: list[Document]
    why: str = ""


class _Work:
    """What became of a shard's samples so far."""

    def __init__(self, processor: PartEncoder, job: ShardJob, device: str) -> None:
        self.processor, self.job, self.device = processor, job, device
        self.raw = local_copy(job.raw)
        index = load_index(self.raw)
        self.promised = None if index is None else index.promised
        total = count_samples(self.raw) if self.promised is None else self.promised
        allowed = None if job.tolerance >= 1 else int(job.tolerance * total)
        name = job.path.name.removesuffix(SUFFIX)
        self.quarantine = Quarantine(job.path.with_name(f"{name}.quarantine.jsonl"), allowed)
        self.filtered: Counter[str] = Counter()
        self.used = self.augmented = 0

    def run(self, report: Callable[[int], Any]) -> None:
        job, processor = self.job, self.processor
        with ShardWriter(job.path, processor.vocabulary, separator=processor.separator) as writer:
            assert self.quarantine.path is not None
            self.quarantine.path.unlink(missing_ok=True)  # of an interrupted try
            for batch in self._batches():
                self._write(batch, writer)
                report(len(batch))
            writer.finish({"source": dict(job.source), **self._notes()})

    def _notes(self) -> dict[str, Any]:
        """What the token shard says of the raw one; what does not apply is left out."""
        bad, filtered = self.quarantine.count, self.filtered.total()
        if self.promised not in (None, self.used + filtered + bad):
            raise RuntimeError(
                f"{self.raw}: {self.used} used, {filtered} filtered, {bad} bad, {self.promised} "
                "promised"
            )
        notes = {"bad": bad, "augmented": self.augmented, "promised": self.promised}
        if bad:
            notes["reasons"] = dict(self.quarantine.reasons)
        if filtered:
            notes["filtered"] = dict(self.filtered)
        if self.device != "cpu":
            notes["device"] = self.device
        return notes

    def _batches(self) -> Iterator[list[_Read]]:
        batch: list[_Read] = []
        num_bytes = 0
        for read in self._read():
            more = sum(_num_bytes(part) for view in read.views for part in view.parts)
            if len(batch) == self.job.batch or (batch and num_bytes + more > MAX_BATCH_BYTES):
                yield batch
                batch, num_bytes = [], 0
            batch.append(read)
            num_bytes += more
        if batch:
            yield batch

    def _read(self) -> Iterator[_Read]:
        for item in samples_of(self.raw):
            where = {"shard": item.shard, "offset": item.offset, "key": item.key}
            if isinstance(item, Damage):
                yield _Read(where, [], item.why)
            elif (name := self.job.left_out.get(item.key)) is not None:
                self.filtered[name] += 1
            else:
                try:
                    document = load_document(item)
                    other = second_view(document) if self.job.source["augment"] else None
                    yield _Read(where, [document, other] if other else [document])
                except UserError as error:
                    yield _Read(where, [], str(error))

    def _write(self, batch: Sequence[_Read], writer: ShardWriter) -> None:
        """In the order of the shard, so that the quarantine does not depend on the batch either."""
        parts = [view.parts for read in batch for view in read.views]
        encoded = iter(self.processor.encode_batch(parts) if parts else [])
        for where, views, why in batch:
            made = [next(encoded) for _ in views]
            try:
                if why:
                    raise UserError(why)
                documents = [_document(*pair) for pair in zip(views, made, strict=True)]
                for document in documents:
                    writer.check(document)
            except UserError as error:
                self.quarantine.add(**where, why=str(error))
                continue
            for document in documents:
                writer.add(document)
            self.used, self.augmented = self.used + 1, self.augmented + len(documents) - 1


def _document(view: Document, segments: list[Segment] | UserError) -> EncodedDocument:
    if isinstance(segments, UserError):
        raise segments
    return EncodedDocument(view.key, view.base, view.order, segments, view.roles)


def _second_part(part: Part, speed: float, *, mirror: bool) -> Part:
    if isinstance(part, Image) and mirror:
        return Image(np.ascontiguousarray(part.pixels[:, ::-1]))
    if isinstance(part, Video) and mirror:
        return Video(np.ascontiguousarray(part.frames[:, :, ::-1]), part.fps)
    if isinstance(part, Audio):
        return Audio(part.wave, round(speed * part.sample_rate)).resample(part.sample_rate)
    return part


def _num_bytes(part: Part) -> int:
    if isinstance(part, Text):
        return 0
    data = {Image: "pixels", Video: "frames", Audio: "wave"}[type(part)]
    return getattr(part, data).nbytes


def _on(device: str) -> AbstractContextManager[Any]:
    """On a card: whole fp32, and the same kernels every time."""
    if device == "cpu":
        return nullcontext()
    from torch.backends import cudnn

    return cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
