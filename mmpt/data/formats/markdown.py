"""Folders of Markdown files: their source text, cut where a local picture stands."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmpt.config import UserError
from mmpt.data.formats.draft import Draft, Item
from mmpt.data.formats.files import base_of, each, read_inside, read_linked, root_of, walk
from mmpt.data.formats.webpage import MAX_PAGE_BYTES, read_html

MAX_MARKS = 2000  # markdown-it takes quadratic time for brackets that never close
# what is left of a link around a picture: [![alt](picture)](link)
LINK_BEGIN, LINK_END = re.compile(r"\[\s*$"), re.compile(r"^\s*\](\([^)\n]*\)|\[[^\]\n]*\])")


def read(path: Path, images: Path | None) -> Iterator[Item]:
    """Files of a folder (.md, .markdown); pictures outside of the folder are left out."""
    root = root_of(path)
    yield from each(walk(path, (".md", ".markdown")), lambda file: _read_page(file, root))


def _read_page(file: Path, root: Path) -> Iterator[Item]:
    try:
        text = read_inside(root, file, limit=MAX_PAGE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"bad text: no UTF-8 at byte {error.start}") from None
    draft = Draft(str(file), 0, base_of(file, root))
    read_page(text, draft, lambda link: read_linked(link, file, root))
    yield draft


def read_page(text: str, draft: Draft, fetch: Callable[[str], bytes]) -> None:
    """Put a page into a draft: blocks without pictures stay as they are written."""
    lines = text.splitlines()
    for block in _blocks(_parser().parse("\n".join(lines))):
        if block[0].type == "html_block":
            read_html(block[0].content, draft, fetch)
        elif any(_is_picture(child) for token in block for child in token.children or ()):
            for token in block:
                _read_inline(token, draft, fetch)
        elif block[0].map:
            first, last = block[0].map
            draft.text("\n".join(lines[first:last]).rstrip())


def _parser() -> Any:
    """CommonMark with tables; pictures and HTML inside of lines know where they stand."""
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import html_inline, image

    def placed(rule: Callable[[Any, bool], bool]) -> Callable[[Any, bool], bool]:
        def run(state: Any, silent: bool) -> bool:
            start = state.pos
            found = rule(state, silent)
            if found and not silent:
                state.tokens[-1].meta["place"] = (start, state.pos)
            return found

        return run

    parser = MarkdownIt("commonmark").enable("table")
    parser.inline.ruler.at("image", placed(image))
    parser.inline.ruler.at("html_inline", placed(html_inline))
    parser.core.ruler.at("inline", _parse_paragraphs)
    return parser


def _parse_paragraphs(state: Any) -> None:
    """The inside of paragraphs that may hold a picture; the text of others stays as it is."""
    for token in state.tokens:
        if token.type == "inline" and ("![" in token.content or "<img" in token.content.lower()):
            if sum(map(token.content.count, "[<")) > MAX_MARKS:
                raise UserError(f"too many marks: over {MAX_MARKS} of [ and < in a paragraph")
            state.md.inline.parse(token.content, state.md, state.env, token.children)


def _blocks(tokens: list[Any]) -> Iterator[list[Any]]:
    """The tokens of each block of the page: a paragraph, a list, a table, ..."""
    block: list[Any] = []
    for token in tokens:
        block.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield block
            block = []


def _is_picture(token: Any) -> bool:
    return token.type == "image" or (
        token.type == "html_inline" and token.content[:4].lower() == "<img"
    )


def _read_inline(token: Any, draft: Draft, fetch: Callable[[str], bytes]) -> None:
    """The text of a paragraph, a cell or a list item around its pictures."""
    if token.type in ("fence", "code_block"):
        draft.text(token.content.rstrip())
    if token.type != "inline":
        return
    end = 0
    pictures = [child for child in token.children if _is_picture(child)]
    for picture in pictures:
        first, last = picture.meta["place"]
        before, after = token.content[end:first], token.content[last:]
        if LINK_BEGIN.search(before) and (rest := LINK_END.match(after)):
            before, last = LINK_BEGIN.sub("", before), last + rest.end()
        draft.text(before.strip())
        if picture.type == "image":
            link = str(picture.attrs.get("src", ""))
            draft.add("image", link[:200], lambda link=link: fetch(link))
        else:
            read_html(picture.content, draft, fetch)
        end = last
    draft.text(token.content[end:].strip())
