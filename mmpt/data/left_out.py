"""Lists of documents to leave out, as `mmpt data curate` writes them: shard, key, filter."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mmpt.config import UserError

LeftOut = dict[str, str]  # key of a document -> the filter that it did not pass


def read_lists(lists: Sequence[str | Path], shards: Sequence[str]) -> dict[str, LeftOut]:
    """Shard -> what is left out of it. A list's shards are found by the names of their files.

    Raises UserError for what is no such list, and for one that speaks of none of the shards.
    """
    by_name = {Path(shard).name: shard for shard in shards}
    found: dict[str, LeftOut] = {shard: {} for shard in shards}
    for path in map(Path, lists):
        entries = _read(path)
        known = [entry for entry in entries if Path(entry[0]).name in by_name]
        if entries and not known:
            raise UserError(
                f"{path} speaks of {Path(entries[0][0]).name} and other shards, of none that is "
                "encoded; give the filtered.jsonl that mmpt data curate wrote for these"
            )
        for shard, key, why in known:
            found[by_name[Path(shard).name]].setdefault(key, why)
    return found


def digest(left_out: LeftOut) -> str:
    """Changes when the list does."""
    return hashlib.sha256(json.dumps(left_out, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> list[tuple[str, str, str]]:
    entries = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            shard, key, why = row["shard"], row["key"], row["filter"]
            if not all(isinstance(value, str) for value in (shard, key, why)):
                raise TypeError("its values must be strings")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number}: no shard, key and filter ({error!r}); give the "
                "filtered.jsonl of mmpt data curate"
            ) from None
        entries.append((shard, key, why))
    return entries
