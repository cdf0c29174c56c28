"""Interleaving: documents in which media take turns, out of documents that hold them side by side.

Raw shards become raw shards of the same names. What becomes of a document depends on the seed and
its key alone, and its base key, which decides what is held out, stays. A document that fits no
template (no sound with its text, say) is kept as it is and counted; one whose sound and text do not
belong together is quarantined. Every template can be undone: `mmpt data interleave --restore`.

Times of words are aligned (`mmpt.data.align`) unless the json has them: "words" of a text part is a
[start, end] in seconds for each word, "start" and "end" of any part are its own.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmpt.config import UserError, load_recipe
from mmpt.data.indexed import samples_of
from mmpt.data.interleave.cuts import NOTES, NoPairError, Original, restore
from mmpt.data.interleave.recipe import InterleaveRecipe, Name
from mmpt.data.interleave.templates import TEMPLATES, Tools
from mmpt.data.shards import Damage, Quarantine, Record, write_shard
from mmpt.progress import Bar

__all__ = [
    "InterleaveRecipe",
    "Original",
    "Tools",
    "interleave",
    "interleave_document",
    "interleave_shards",
    "restore",
]

logger = logging.getLogger(__name__)
OVERRIDE = re.compile(r"[\w.-]+=(?!.*\.tar$)")


@dataclass
class InterleaveReport:
    """What became of the samples: each is counted in `templates`, in `kept` or in `bad`."""

    shards: list[Path] = field(default_factory=list)
    samples: int = 0
    templates: Counter[str] = field(default_factory=Counter)  # documents by what they became
    kept: Counter[str] = field(default_factory=Counter)  # documents as they were, by why
    bad: Counter[str] = field(default_factory=Counter)  # samples and damaged places, by why

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "shards": [str(path) for path in self.shards],
            "samples": self.samples,
            "interleaved": self.templates.total(),
            "kept": self.kept.total(),
            "bad_samples": self.bad.total(),
            "templates": dict(self.templates),
            "kept_because": dict(self.kept),
            "reasons": dict(self.bad),
        }


def interleave(
    shards: list[str],
    *,
    out: Path,
    template: Name | None = None,
    recipe: Path | None = None,
    seed: int = 0,
    restore: bool = False,
) -> dict[str, Any]:
    """Turn raw shards into raw shards of interleaved documents, in a folder, under their names.

    After the shards, key=value sets what a recipe sets: ratio=0.2 mean_words=4. --template: what
    each document becomes; --recipe: a TOML file that names several by weight. Documents that fit no
    template are kept and counted; bad ones, and sounds that do not say their text, are left out and
    listed in NAME.quarantine.jsonl. --restore: undo it, whatever the template was.
    """
    overrides = [given for given in shards if OVERRIDE.match(given)]
    paths = [given for given in shards if given not in overrides]
    if not paths:
        raise UserError("no shards given; name one or more .tar files")
    if [template is not None, recipe is not None, restore].count(True) != 1:
        raise UserError("give one of --template NAME, --recipe FILE and --restore")
    if restore:
        return restore_shards(paths, out).to_json()
    if template:
        overrides = [f"templates.{template}=1.0", *overrides]
    if seed or recipe is None:
        overrides = [f"seed={seed}", *overrides]
    return interleave_shards(paths, out, load_recipe(InterleaveRecipe, recipe, overrides)).to_json()


def interleave_shards(
    shards: Sequence[str | Path], out: str | Path, recipe: InterleaveRecipe
) -> InterleaveReport:
    """Write each shard anew into the folder `out`."""
    tools = Tools(recipe)
    tools.check()
    return _rewrite(shards, Path(out), lambda original: interleave_document(original, tools))


def restore_shards(shards: Sequence[str | Path], out: str | Path) -> InterleaveReport:
    """Write each shard as it was before `interleave_shards`, into the folder `out`."""
    return _rewrite(shards, Path(out), _restore_document)


def interleave_document(original: Original, tools: Tools) -> tuple[str, Record]:
    """The template that was drawn of those that fit, and what it makes of the document.

    Raises NoPairError when none fits, UserError when the document is bad.
    """
    if NOTES in original.record.more:
        raise NoPairError("interleaved already")
    words = f"{tools.recipe.seed} {original.record.key}"
    rng = np.random.default_rng(list(hashlib.sha256(words.encode()).digest()))
    weights = {name: weight for name, weight in tools.recipe.templates.items() if weight > 0}
    # the smallest of exponential waiting times: a draw by weight, then one of the rest, and so on
    waits = {name: rng.exponential() / weights[name] for name in sorted(weights)}
    why = NoPairError("")
    for name in sorted(waits, key=lambda name: waits[name]):
        try:
            return name, original.become(name, TEMPLATES[name](original, tools, rng))
        except NoPairError as error:
            why = error
    raise why if len(weights) == 1 else NoPairError("fits none of the templates")


def _restore_document(original: Original) -> tuple[str, Record]:
    if NOTES not in original.record.more:
        raise NoPairError("not interleaved")
    return "restored", restore(original.record)


def _rewrite(shards: Sequence[str | Path], out: Path, change: Any) -> InterleaveReport:
    report = InterleaveReport()
    for raw, path in Bar(_pair(shards, out), desc="interleave", unit="shard"):
        listing = path.with_name(f"{path.name.partition('.')[0]}.quarantine.jsonl")
        listing.unlink(missing_ok=True)  # of an earlier run
        quarantine = Quarantine(listing)
        write_shard(path, _records(raw, change, report, quarantine))
        report.shards.append(path)
        report.bad += quarantine.reasons
    return report


def _records(
    raw: Path, change: Any, report: InterleaveReport, quarantine: Quarantine
) -> Iterator[Record]:
    for item in samples_of(raw):
        where = {"shard": item.shard, "offset": item.offset, "key": item.key}
        if isinstance(item, Damage):
            quarantine.add(**where, why=item.why)
            continue
        report.samples += 1
        try:
            original = Original.load(item)
        except UserError as error:
            quarantine.add(**where, why=str(error))
            continue
        try:
            name, record = change(original)
            report.templates[name] += 1
        except NoPairError as error:
            report.kept[str(error)] += 1
            record = original.record
        except UserError as error:
            quarantine.add(**where, why=str(error))
            continue
        yield record


def _pair(shards: Sequence[str | Path], out: Path) -> list[tuple[Path, Path]]:
    """Shard -> where it is written; refuses missing ones, and to write over any of them."""
    pairs: dict[Path, Path] = {}
    for raw in map(Path, shards):
        if not raw.is_file():
            raise UserError(f"no shard at {raw}; give paths of .tar files")
        path = out / raw.name
        if path in pairs or path.resolve() == raw.resolve():
            raise UserError(f"{path} would be written over; give another --out, or rename {raw}")
        pairs[path] = raw
    return [(raw, path) for path, raw in pairs.items()]
