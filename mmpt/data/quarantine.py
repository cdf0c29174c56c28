"""What could not be used: counted, with the reason and the place, and listed in a file."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mmpt.config import UserError


@dataclass
class Quarantine:
    """Counts what could not be used, and appends one JSON line for each to `path` (if given).

    allowed: how many there may be; one more raises UserError. None: any number.
    """

    path: Path | None = None
    allowed: int | None = None
    count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    lines: list[dict[str, Any]] = field(default_factory=list)  # the first MAX_LINES, for reports

    MAX_LINES = 1000

    def add(self, *, shard: str, offset: int, key: str, why: str) -> None:
        """Record one unusable sample or damaged place."""
        line = {"shard": shard, "offset": offset, "key": key, "why": why}
        self.count += 1
        self.reasons[why.partition(":")[0]] += 1
        if len(self.lines) < self.MAX_LINES:
            self.lines.append(line)
        if self.path is not None:
            self._append(json.dumps(line) + "\n")
        if self.allowed is not None and self.count > self.allowed:
            listed = f"; see {self.path}" if self.path else ""
            raise UserError(
                f"{shard}: {self.count} bad samples, {self.allowed} are tolerated (the last: {key} "
                f"at byte {offset}: {why}){listed}"
            )

    def _append(self, text: str) -> None:
        path = cast(Path, self.path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # one write of one line in append mode: lines of concurrent readers do not mix
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, text.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"cannot write the quarantine file {path}: {error.strerror}") from None
