"""The frame of a page: title, head, a list of chapters, and the style sheet that pages share."""

from collections.abc import Mapping
from pathlib import Path
from string import Template

from mmpt.page.markup import escape, tag

NOTHING = tag(
    "p", "Nothing was recorded here; the run may have been interrupted.", class_="missing"
)


def document(
    title: str, lead: str, head: str, chapters: Mapping[str, tuple[str, str]], *, style: str = ""
) -> str:
    """A whole page that needs nothing else. chapters: id -> (title, content), all finished HTML.

    A chapter without content says that nothing was recorded. `style` is CSS for this page alone.
    """
    here = Path(__file__).parent
    body = [
        tag("section", tag("h2", heading), content or NOTHING, id=name)
        for name, (heading, content) in chapters.items()
    ]
    links = [tag("li", tag("a", name.capitalize(), href=f"#{name}")) for name in chapters]
    return Template((here / "page.html").read_text("utf-8")).substitute(
        title=escape(title),
        style=(here / "page.css").read_text("utf-8") + style,
        lead=lead,
        head=head,
        links="".join(links),
        sections="".join(body),
    )


def tile(name: str, value: str, unit: str, note: str = "") -> str:
    """One key figure of the list with class `tiles`."""
    return tag(
        "li",
        tag("span", name, class_="tile-name"),
        tag("strong", value),
        tag("span", unit, class_="tile-unit"),
        note,
    )
