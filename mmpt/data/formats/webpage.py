"""Folders of HTML pages: their text and local media in reading order, without navigation."""

import codecs
import html.parser
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from mmpt.config import UserError
from mmpt.data.formats.draft import Draft, Item, Medium
from mmpt.data.formats.files import base_of, each, read_inside, read_linked, root_of, walk

MAX_PAGE_BYTES = 1 << 24
# fmt: off
SKIPPED = (
    "script", "style", "title", "nav", "footer", "noscript", "template", "svg", "math", "select",
    "button", "iframe",
)
VOID = (
    "img", "br", "hr", "input", "meta", "link", "col", "wbr", "source", "area", "base", "embed",
    "track",
)
PARAGRAPHS = (
    "p", "h1", "h2", "h3", "h4", "h5", "h6", "div", "section", "article", "main", "header",
    "aside", "figure", "figcaption", "blockquote", "ul", "ol", "dl", "table", "pre", "hr", "form",
    "fieldset", "details", "summary", "address", "caption",
)
LINES = ("li", "tr", "br", "dt", "dd")
CELLS = ("td", "th")
# fmt: on
CHARSET = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?([\w.:-]{2,40})""", re.IGNORECASE)


def read(path: Path, images: Path | None) -> Iterator[Item]:
    """Pages of a folder (.html, .htm, .xhtml); media outside of the folder are left out.

    Where a page has a <main>, the page is what stands in it.
    """
    root = root_of(path)
    yield from each(walk(path, (".html", ".htm", ".xhtml")), lambda file: _read_page(file, root))


def _read_page(file: Path, root: Path) -> Iterator[Item]:
    draft = Draft(str(file), 0, base_of(file, root))
    text = _decode(read_inside(root, file, limit=MAX_PAGE_BYTES))
    read_html(text, draft, lambda link: read_linked(link, file, root))
    yield draft


def read_html(text: str, draft: Draft, fetch: Callable[[str], bytes]) -> None:
    """Put a page, or a piece of one, into a draft; `fetch` gives the bytes behind a link."""
    page = _PageReader(draft, fetch)
    # html.parser takes quadratic time for tags and comments that never end
    head, end, tail = text.rpartition(">")
    text = head + end + tail.replace("<", "&lt;")
    head, end, tail = text.rpartition("-->")
    text = head + end + tail.replace("<!--", "&lt;!--")
    try:
        page.feed(text)
        page.close()
    except AssertionError as error:  # how html.parser refuses declarations that it does not know
        raise UserError(f"bad html: {error}") from None


def _decode(data: bytes) -> str:
    """UTF-8, or the charset that the page names."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        named = CHARSET.search(data[:2048])
        if named is None:
            raise UserError(f"bad text: no UTF-8 at byte {error.start}, no charset named") from None
    name = named[1].decode("ascii")
    try:
        return data.decode(codecs.lookup(name).name, errors="replace")
    except LookupError:
        raise UserError(f"bad text: unknown charset {name!r}") from None


class _PageReader(html.parser.HTMLParser):
    """Follows the open tags as far as they hide text, hold the page or part paragraphs."""

    def __init__(self, draft: Draft, fetch: Callable[[str], bytes]) -> None:
        super().__init__()
        self._draft, self._fetch = draft, fetch
        self._words: list[str] = []
        self._joint = "\n\n"  # what stands between the text so far and the next words
        self._hidden, self._hidden_depth = "", 0  # the tag of what is skipped, and its nesting
        self._main, self._main_depth = "", 0
        self._ended = False  # what follows <main> is left out
        self._num_pre = 0
        self._player: Medium | None = None  # a <video> or <audio> that waits for its <source>

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "body":
            self._hidden = ""
        if self._ended or self._nested(tag):
            return
        if _is_hidden(tag, values):
            self._hidden, self._hidden_depth = tag, 1
            return
        if not self._main and (tag == "main" or values.get("role") == "main"):
            self._begin_main(tag)
        elif tag == self._main:
            self._main_depth += 1
        self._break(tag)
        self._num_pre += tag == "pre"
        if tag in ("img", "video", "audio", "source"):
            self._add(tag, values.get("src", ""))

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            self._hidden_depth -= tag == self._hidden
            self._hidden = self._hidden if self._hidden_depth else ""
            return
        self._break(tag)
        self._num_pre = max(0, self._num_pre - (tag == "pre"))
        if tag in ("video", "audio"):
            self._player = None
        if tag == self._main:
            self._main_depth -= 1
            self._ended = self._main_depth == 0

    def handle_data(self, data: str) -> None:
        if not self._hidden and not self._ended:
            self._words.append(data)

    def close(self) -> None:
        super().close()
        self._flush()

    def _nested(self, tag: str) -> bool:
        """Whether the tag stands in what is skipped."""
        self._hidden_depth += bool(self._hidden) and tag == self._hidden
        return bool(self._hidden)

    def _begin_main(self, tag: str) -> None:
        self._main, self._main_depth = tag, 1
        self._words.clear()
        self._draft.parts.clear()
        self._draft.lost.clear()

    def _break(self, tag: str) -> None:
        if tag in PARAGRAPHS:
            self._flush()
            self._joint = "\n\n"
        elif tag in LINES:
            self._flush()
            self._joint = "\n\n" if self._joint == "\n\n" else "\n"
        elif tag in CELLS:
            self._flush()
            self._joint = self._joint or " | "

    def _flush(self) -> None:
        text, self._words = "".join(self._words), []
        if not self._num_pre:
            text = " ".join(text.split())
        if text.strip():
            self._draft.text(text.strip("\n"), joint=self._joint or " ")
            self._joint = ""

    def _add(self, tag: str, link: str) -> None:
        kind = {"img": "image", "source": self._player}.get(tag, tag)
        if tag in ("video", "audio"):
            self._player = None if link else cast(Medium, tag)
        if kind is None or (tag in ("video", "audio") and not link):
            return  # a <source> of a <picture>, whose <img> follows; a player without a file
        self._player = None if tag == "source" else self._player
        self._flush()
        self._joint = "\n\n"
        self._draft.add(cast(Medium, kind), link[:200], lambda: self._fetch(link))


def _is_hidden(tag: str, values: dict[str, str]) -> bool:
    if tag in VOID:
        return False
    return (
        tag in SKIPPED
        or "hidden" in values
        or values.get("role") in ("navigation", "search")
        or "headerlink" in values.get("class", "").split()  # the pilcrows of Sphinx
    )
