"""Pages with figures: the user guide and the examples of scikit-learn, as interleaved documents.

A page becomes a list of text blocks and figures in reading order. It is cut into documents around
its figures; no text stands in two documents. A figure of an example that the user guide shows again
has the example's base key in both places, so that it cannot be in train and held-out at once.
"""

import hashlib
import html.parser
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import PIL.Image

from mmpt.data import importers
from mmpt.data.shards import Record
from mmpt.progress import Bar

LICENSE = "BSD-3-Clause"
ATTRIBUTION = [
    {
        "package": "Debian python-sklearn-doc 1.2.1",
        "gives": "pages with figures",
        "license": "BSD-3-Clause",
        "copyright": "2007-2019 Scikit-Learn Developers",
        "homepage": "https://scikit-learn.org",
        "changes": "text taken out of HTML, cut around figures; figures shrunk to 64 x 64 on white",
    }
]
MIN_SIDE = 48  # pixels; below are icons
CONTENT = "sk-page-content"
SKIPPED_CLASSES = (
    "sphx-glr-download-link-note",
    "sphx-glr-footer",
    "sphx-glr-timing",
    "sphx-glr-signature",
    "sphx-glr-thumbcontainer",
    "sphx-glr-thumbnails",
    "sphx-glr-horizontal-hidden",
    "headerlink",
    "toctree-wrapper",
    "estimator-doc-link",
    "sk-container",
    "sk-text-repr-fallback",
)
SKIPPED_TAGS = ("script", "style", "head", "nav", "footer", "noscript")
BLOCKS = (
    "p",
    "h1",
    "h2",
    "h3",
    "h4",
    "li",
    "dt",
    "dd",
    "pre",
    "tr",
    "figcaption",
    "div",
    "section",
)
VOID = ("img", "br", "hr", "input", "meta", "link", "col", "wbr", "source")


@dataclass(frozen=True)
class Settings:
    """The defaults build everything; the sampler takes fewer documents."""

    side: int = 64  # pixels
    num_documents: int | None = None  # None: all
    max_characters: int = 1200  # of text around the figures of one document
    max_figures: int = 3
    image_quality: int = 92


@dataclass(frozen=True)
class Figure:
    """A picture on a page."""

    path: Path
    caption: str


@dataclass
class Passage:
    """A document to be: text, figures, text, text, figures, ... in reading order."""

    base: str
    parts: list[str | Figure] = field(default_factory=list)


def main(out: Path, cache: Path, settings: Settings | None = None) -> list[Path]:
    """Write handbook-train-*.tar and handbook-heldout-*.tar into `out`."""
    settings = settings or Settings()
    package = importers.fetch_deb("python-sklearn-doc", cache)
    root = package / "usr/share/doc/python-sklearn-doc/html"
    pages = sorted([*root.glob("modules/*.html"), *root.glob("auto_examples/*/*.html")])
    passages: dict[str, Passage] = {}
    for page in Bar(pages, desc="handbook: pages", unit="page"):
        name = "-".join(page.relative_to(root).with_suffix("").parts)
        for number, passage in enumerate(cut_page(read_page(page), name, settings)):
            passages[f"{name}-{number}".replace(".", "-")] = passage
    keys = sorted(passages, key=lambda key: hashlib.sha256(f"page {key}".encode()).digest())
    records = [
        to_record(key, passages[key], settings)
        for key in Bar(keys[: settings.num_documents], desc="handbook: documents", unit="document")
    ]
    return importers.write_split(records, out, "handbook")


def read_page(page: Path) -> list[str | Figure]:
    """Text blocks and figures of a page in reading order."""
    reader = PageReader(page)
    reader.feed(page.read_text())
    reader.close()
    return reader.items


class PageReader(html.parser.HTMLParser):
    """Collects the text and figures inside the content element, without navigation and footers."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.items: list[str | Figure] = []
        self._page = page
        self._open: list[tuple[str, bool]] = []  # tag, and whether it hides what is inside
        self._content_depth: int | None = None
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "img":
            self._add_figure(values)
        if tag in VOID:
            return
        classes = values.get("class", "").split()
        hidden = tag in SKIPPED_TAGS or any(name in SKIPPED_CLASSES for name in classes)
        if self._content_depth is None and CONTENT in classes:
            self._content_depth = len(self._open)
        if tag in BLOCKS:
            self._flush()
        self._open.append((tag, hidden))

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self._flush()
        while any(name == tag for name, _ in self._open):  # close what was left open inside, too
            name, _ = self._open.pop()
            if self._content_depth is not None and len(self._open) <= self._content_depth:
                self._content_depth = None
            if name == tag:
                return

    def handle_data(self, data: str) -> None:
        if self._visible():
            self._text.append(data)

    def _visible(self) -> bool:
        return self._content_depth is not None and not any(hidden for _, hidden in self._open)

    def _flush(self) -> None:
        text, self._text = "".join(self._text), []
        if any(name == "pre" for name, _ in self._open):
            text = "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))
        else:
            text = " ".join(text.split())
        if text.strip() and text.strip() != "Out:":
            self.items.append(text)

    def _add_figure(self, values: dict[str, str]) -> None:
        if not self._visible():
            return
        self._flush()
        path = self._page.parent / values.get("src", "")
        name = PurePosixPath(path.name)
        if (
            "thumb" in name.stem
            or name.suffix not in (".png", ".jpg", ".jpeg")
            or not path.exists()
        ):
            return
        with PIL.Image.open(path) as picture:
            if min(picture.size) < MIN_SIDE:
                return
        self.items.append(Figure(path, _caption(values.get("alt", ""))))


def cut_page(items: list[str | Figure], page: str, settings: Settings) -> Iterator[Passage]:
    """Documents of a page: runs of near figures of one base, with the text before and after."""
    groups = _group_figures(items, page, settings)
    share = settings.max_characters // 2
    taken = 0  # items before this one stand in a document already
    for number, (base, first, last) in enumerate(groups):
        following = groups[number + 1][1] if number + 1 < len(groups) else len(items)
        before, _ = _take(items[taken:first], share, from_end=True)
        after, num_after = _take(items[last + 1 : following], share, from_end=False)
        taken = last + 1 + num_after
        passage = Passage(base)
        for item in [*before, *items[first : last + 1], *after]:
            _append(passage, item)
        if any(isinstance(part, str) for part in passage.parts):
            yield passage


def to_record(key: str, passage: Passage, settings: Settings) -> Record:
    """Encode the figures at a small size, on white."""
    parts: list[dict[str, Any]] = []
    for part in passage.parts:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        with PIL.Image.open(part.path) as picture:
            small = importers.square(picture, settings.side)
        data = importers.encode_webp(small, quality=settings.image_quality)
        parts.append({"type": "image", "suffix": "webp", "data": data})
    return Record(key, passage.base, "fixed", tuple(parts), "handbook", LICENSE)


def _caption(alt: str) -> str:
    """The figure's title; a file name is none."""
    text = " ".join(alt.split())
    return "" if " " not in text or re.search(r"\.(png|jpg|svg)$", text) else text


def _base_of(figure: Figure, page: str) -> str:
    example = re.fullmatch(r"sphx_glr_(plot_.+?)(_\d+)?", figure.path.stem)
    return f"handbook-{example[1]}" if example else f"handbook-{page}"


def _group_figures(
    items: list[str | Figure], page: str, settings: Settings
) -> list[tuple[str, int, int]]:
    """(base, first, last item) of runs of figures with little text between them."""
    groups: list[tuple[str, int, int]] = []
    num_figures = 0
    for place, item in enumerate(items):
        if isinstance(item, str):
            continue
        base = _base_of(item, page)
        if groups and num_figures < settings.max_figures and groups[-1][0] == base:
            between = sum(len(text) for text in items[groups[-1][2] + 1 : place])  # type: ignore[arg-type] # only text is between
            if between <= settings.max_characters // 4:
                groups[-1] = (base, groups[-1][1], place)
                num_figures += 1
                continue
        groups.append((base, place, place))
        num_figures = 1
    return groups


def _take(texts: list[Any], budget: int, *, from_end: bool) -> tuple[list[str], int]:
    """Whole blocks from one end of `texts` within the budget, and how many items were used."""
    chosen: list[str] = []
    for text in reversed(texts) if from_end else texts:
        if len(text) > budget and not chosen:
            text = text[-budget:] if from_end else text[:budget]
            chosen.append(_whole_words(text, from_end=from_end))
            break
        if len(text) > budget:
            break
        chosen.append(text)
        budget -= len(text)
    return (chosen[::-1] if from_end else chosen), len(chosen)


def _whole_words(text: str, *, from_end: bool) -> str:
    """Without the piece of a line (in code) or word (in prose) where it was cut."""
    mark = "\n" if "\n" in text else " "
    head, found, rest = text.partition(mark) if from_end else text.rpartition(mark)
    return (rest if from_end else head).strip("\n") if found else text


def _append(passage: Passage, item: str | Figure) -> None:
    """Add an item and its caption; texts that touch become one."""
    if isinstance(item, Figure):
        passage.parts.append(item)
        item = item.caption
        if not item:
            return
    if passage.parts and isinstance(passage.parts[-1], str):
        passage.parts[-1] += "\n" + item
    else:
        passage.parts.append(item)
