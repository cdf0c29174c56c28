"""Raw documents on one page of its own, as a person would read them.

Every part in order: text, pictures, clips that move, sound with a player; when it begins and ends,
who speaks, and which words lie beside it unread (see `mmpt.data.interleave`). The page holds
everything in itself, runs no script and asks no server; what a document says stays text.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

from mmpt.config import UserError, write_atomic
from mmpt.data.indexed import samples_of
from mmpt.data.interleave.cuts import NOTES, Original
from mmpt.data.shards import Sample, is_heldout
from mmpt.page.cells import render_part
from mmpt.page.markup import chip, escape, number, tag
from mmpt.parts import Part

MAX_DOCUMENTS = 1000
SHOWN_KEYS = ("role", "voice", "lang")  # of a part, beside its time
CHIPS = {"audio": "speech"}  # the name of a medium, where a part type has another


def write_page(path: str | Path, shards: Sequence[str | Path], count: int) -> int:
    """Write a page of the first `count` documents of the shards in turn; returns how many."""
    if not 1 <= count <= MAX_DOCUMENTS:
        raise UserError(f"documents = {count}; a page holds 1 to {MAX_DOCUMENTS}")
    shown = list(itertools.islice(_in_turn([_originals(shard) for shard in shards]), count))
    write_atomic(path, render_page(shown))
    return len(shown)


def render_page(documents: Iterable[Original]) -> str:
    """The page as HTML."""
    articles = [_article(original) for original in documents]
    template = Template(Path(__file__).with_name("render.html").read_text("utf-8"))
    return template.substitute(
        title=f"{len(articles)} documents" if len(articles) != 1 else "1 document",
        documents="".join(articles) or tag("p", "No document can be read.", class_="missing"),
    )


def _originals(shard: str | Path) -> Iterator[Original]:
    for item in samples_of(shard):
        if isinstance(item, Sample):
            try:
                yield Original.load(item)
            except UserError:
                continue  # counted where the shards are read in full


def _in_turn(readers: Sequence[Iterator[Original]]) -> Iterator[Original]:
    for round_ in itertools.zip_longest(*readers):
        yield from (original for original in round_ if original is not None)


def _article(original: Original) -> str:
    document, record = original.document, original.record
    notes = record.more.get(NOTES)
    facts = {
        "base": document.base,
        "split": "held out" if is_heldout(document.base) else "training",
        "source": document.source,
        "license": record.license,
        "order": document.order,
        "template": notes.get("template") if isinstance(notes, dict) else None,
        "shard": Path(document.shard).name,
    }
    said = [f"{name}: {escape(value)}" for name, value in facts.items() if value]
    parts = zip(document.parts, record.parts, strict=True)
    rows = [_row(part, entry, n, original) for n, (part, entry) in enumerate(parts)]
    head = tag("h2", escape(document.key)) + tag("p", ", ".join(said), class_="facts")
    return tag("article", head, tag("ol", *rows))


def _row(part: Part, entry: dict[str, Any], index: int, original: Original) -> str:
    kind = str(entry["type"])
    about = [chip(CHIPS.get(kind, kind))]
    time = original.time(index)
    if time:
        about.append(f"{number(time[0])} to {number(time[1])} s")
    about += [escape(entry[key]) for key in SHOWN_KEYS if entry.get(key)]
    words = entry.get("text") if kind != "text" else None
    if isinstance(words, str):
        about.append(
            tag("q", escape(words.strip()), title="what it stands for; not shown to a model")
        )
    label = tag("div", *(tag("span", each) for each in about), class_="about")
    content = tag("div", render_part(part, f"{kind} {index + 1}"), class_=f"part {kind}")
    return tag("li", label, content)
