"""Raw shards written as documents come: what is held at once is one shard of each split."""

import json
import re
from pathlib import Path

from mmpt.config import UserError
from mmpt.data.shards import Record, is_heldout, write_shard


class SplitWriter:
    """Writes NAME-train-0000.tar, NAME-heldout-0000.tar, ... in the order of the documents.

    Shards of NAME that an earlier import left are removed before the first is written, so that a
    folder never holds parts of two imports of one name.
    """

    def __init__(self, out: Path, name: str, max_bytes: int) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"name {name!r}; use letters, digits, - and _ only")
        self.out, self.name, self.max_bytes = out, name, max_bytes
        self.paths: list[Path] = []
        self._waiting: dict[str, list[Record]] = {"train": [], "heldout": []}
        self._num_bytes = dict.fromkeys(self._waiting, 0)
        self._num_shards = dict.fromkeys(self._waiting, 0)

    def add(self, record: Record) -> None:
        """Take one document; a shard is written when the next one would not fit."""
        split = "heldout" if is_heldout(record.base) else "train"
        size = _num_bytes(record)
        if self._num_bytes[split] + size > self.max_bytes:
            self._write(split)
        self._waiting[split].append(record)
        self._num_bytes[split] += size

    def finish(self) -> list[Path]:
        """Write the rest; returns all paths, train before heldout."""
        for split in self._waiting:
            self._write(split)
        if not self.paths:
            self._remove_earlier()
        return sorted(self.paths, key=lambda path: ("-heldout-" in path.name, path.name))

    def _write(self, split: str) -> None:
        if not self._waiting[split]:
            return
        if not self.paths:
            self._remove_earlier()
        path = self.out / f"{self.name}-{split}-{self._num_shards[split]:04d}.tar"
        write_shard(path, self._waiting[split])
        self.paths.append(path)
        self._num_shards[split] += 1
        self._waiting[split], self._num_bytes[split] = [], 0

    def _remove_earlier(self) -> None:
        pattern = re.compile(re.escape(self.name) + r"-(train|heldout)-\d{4,}\.tar")
        for path in sorted(self.out.glob("*.tar")):
            if pattern.fullmatch(path.name):
                path.unlink()


def _num_bytes(record: Record) -> int:
    """About what a record takes in a tar: a header and padding for each member."""
    words = [{key: part[key] for key in part if key != "data"} for part in record.parts]
    media = [len(part["data"]) + 768 for part in record.parts if "data" in part]
    return 1536 + len(json.dumps(words).encode()) + sum(media)
