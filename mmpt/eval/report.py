"""report.html: what a run made, how good it is and what it cost, on one page of its own.

The page holds its pictures, sounds, charts and styles in itself, runs no script and asks no server.
Whatever a run lacks (it was interrupted, a value is NaN) is a dash or one plain line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmpt.config import write_atomic
from mmpt.eval.page import sections
from mmpt.eval.page.verdicts import Row, beats, ratio, verdict
from mmpt.page.cells import Cell, has_media, output_kind, render_cell, row_width, row_words
from mmpt.page.document import NOTHING, document, tile
from mmpt.page.markup import (
    MODALITIES,
    chip,
    duration,
    escape,
    facts,
    finite,
    number,
    percent,
    tag,
)

HERO_CARDS = 4
NOTE = tag(
    "p",
    "Per cent: how surprised the model is by held-out ids, beside a model that knows only how "
    "often each id occurs. Less is better.",
    class_="note",
)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Rows to look at, one card each; the first row also stands at the head of the page.

    A cell is a part, plain text, a list of parts side by side, or None (a dash).
    """

    title: str
    text: str  # what is shown, in a sentence or two
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one part of the job took."""

    name: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page says; empty fields are allowed."""

    title: str
    command: str  # that makes this report again
    stages: Sequence[Stage] = ()
    peak_gib: float | None = None
    heldout: Mapping[str, Row] = field(
        default_factory=dict
    )  # modality -> nats per id beside others
    curves: Mapping[str, Sequence[Row]] = field(
        default_factory=dict
    )  # name -> rows of metrics.jsonl
    codecs: Sequence[Row] = ()  # rows of `list_tokenizers`
    data: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)  # of `mmpt doctor`
    galleries: Sequence[Gallery] = ()
    provenance: Row = field(default_factory=dict)  # seed, fingerprints, settings


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page and return its path; a reader never sees half of it."""
    write_atomic(path, render_report(report))
    return Path(path)


def render_report(report: Report) -> str:
    """The page as HTML."""
    galleries = [_gallery(index, each) for index, each in enumerate(report.galleries)]
    chapters = {
        "outputs": ("What it makes", "".join(galleries)),
        "likelihood": ("How well it predicts", sections.heldout(report.heldout)),
        "loss": ("How it learned", sections.curves(report.curves, report.heldout)),
        "experts": ("Who does the work", sections.experts(report.curves)),
        "codecs": ("What the codecs keep", sections.codecs(report.codecs)),
        "cost": ("What it cost", _cost(report)),
        "data": ("What it was made from", facts(report.data, label="data")),
        "reproduce": ("Run it again", _again(report)),
    }
    head = _key_figures(report) + NOTE + _hero_cards(report.galleries)
    return document(report.title, _lead(report), head, chapters)


def _lead(report: Report) -> str:
    judged = [beats(report.heldout.get(name) or {}, "baseline_nats") for name in MODALITIES]
    known = [won for won in judged if won is not None]
    text = (
        "One decoder reads and writes text, pictures, video and speech as a single stream of ids."
    )
    if not known:
        return text
    score = f"in {sum(known)} of {len(known)} media" if len(known) > 1 or not all(known) else ""
    return f"{text} On documents that it never saw, it predicts better than the baseline {score}."


def _key_figures(report: Report) -> str:
    tiles = [_modality_tile(name, report.heldout.get(name) or {}) for name in MODALITIES]
    seconds = sum(finite(stage.seconds) or 0.0 for stage in report.stages)
    tiles.append(tile("whole job", duration(seconds or None), f"stages: {len(report.stages)}"))
    tiles.append(tile("memory, at most", number(report.peak_gib, 1), "GiB"))
    return tag("ul", *tiles, class_="tiles")


def _modality_tile(name: str, row: Row) -> str:
    share = percent(ratio(row.get("nats"), row.get("unigram_nats")))
    judged = verdict(
        beats(row, "baseline_nats"), yes="ahead of the baseline", no="not ahead of the baseline"
    )
    return tile(chip(name), share, "of unigram nats", judged)


def _hero_cards(galleries: Sequence[Gallery]) -> str:
    cards = [
        _card(
            galleries[index].columns,
            galleries[index].rows[0],
            link=tag("a", escape(galleries[index].title), href=f"#gallery-{index + 1}"),
        )
        for index in _most_different(galleries)
    ]
    return tag("div", *cards, class_="cards hero-cards") if cards else ""


def _most_different(galleries: Sequence[Gallery]) -> list[int]:
    """Galleries for the head: first one of every kind of output, then others, in their order."""
    with_media = [i for i, each in enumerate(galleries) if each.rows and has_media(each.rows[0])]
    first: dict[str, int] = {}
    for index in with_media:
        first.setdefault(output_kind(galleries[index].rows[0]), index)
    firsts = list(first.values())
    others = [index for index in with_media if index not in firsts]
    return sorted((firsts + others)[:HERO_CARDS])


def _gallery(index: int, gallery: Gallery) -> str:
    cards = [_card(gallery.columns, row) for row in gallery.rows]
    width = min(max([260, *map(row_width, gallery.rows)]) + 38, 1040)
    return tag(
        "div",
        tag("h3", escape(gallery.title)),
        tag("p", escape(gallery.text), class_="prose") if gallery.text else "",
        tag("div", *cards, class_="cards", style=f"--wide:{width}px") if cards else NOTHING,
        class_="gallery",
        id=f"gallery-{index + 1}",
    )


def _card(columns: Sequence[str], row: Sequence[Cell], *, link: str = "") -> str:
    about = row_words(row)
    labels = [*columns, *[""] * (len(row) - len(columns))]
    figures = [render_cell(cell, label, about) for cell, label in zip(row, labels, strict=False)]
    kicker = tag("p", link, class_="kicker") if link else ""
    return tag("article", kicker, tag("div", *figures, class_="cells"), class_="card")


def _cost(report: Report) -> str:
    if not report.stages and report.peak_gib is None:
        return ""
    stages = [(each.name, finite(each.seconds), each.detail) for each in report.stages]
    known = finite(report.peak_gib) is not None
    memory = f"Memory: at most {number(report.peak_gib, 1)} GiB." if known else ""
    return sections.stages(stages) + (tag("p", memory, class_="prose") if memory else "")


def _again(report: Report) -> str:
    out = []
    if report.command:
        out.append(tag("p", "The command that makes this page again:", class_="prose"))
        out.append(tag("pre", tag("code", escape(report.command)), tabindex=0))
    for name, values in (("environment", report.environment), ("provenance", report.provenance)):
        if values:
            inner = tag("div", facts(values, label=name), class_="facts-body")
            out.append(tag("details", tag("summary", name), inner))
    return "".join(out)
