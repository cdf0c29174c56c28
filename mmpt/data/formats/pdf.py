"""PDF files: text and pictures by their place on the page. Drawn (vector) figures are not read.

A long file becomes several documents of at most MAX_PAGES pages with one base key.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mmpt.config import UserError
from mmpt.data.formats.draft import Draft, Item, LeftOut
from mmpt.data.formats.files import base_of, each, read_inside, root_of, walk
from mmpt.data.formats.layout import Box, joint, reading_order
from mmpt.media import MAX_PIXELS

MAX_PAGES = 32  # of one document
MAX_CHARACTERS = 100_000  # of one page
MAX_FIGURES = 256  # of one page
MIN_SIDE = 8  # pixels; below are rules and dots that some programs draw as pictures
WORD_GAP = 1.5  # a wider gap in a line, in heights of its letters, ends the box
DEPTH = 4  # of forms within forms where pictures are looked for


def read(path: Path, images: Path | None) -> Iterator[Item]:
    """Documents of a file or of a folder of them (.pdf)."""
    root = root_of(path)
    yield from each(walk(path, (".pdf",)), lambda file: _read_file(file, root))


def _read_file(file: Path, root: Path) -> Iterator[Item]:
    import pypdfium2

    try:
        pdf = pypdfium2.PdfDocument(read_inside(root, file))
    except pypdfium2.PdfiumError as error:  # no PDF, or one with a password
        raise UserError(f"bad pdf: {error}") from None
    try:
        for first in range(0, len(pdf), MAX_PAGES):
            draft = Draft(str(file), first, base_of(file, root))
            try:
                for number in range(first, min(first + MAX_PAGES, len(pdf))):
                    _read_page(pdf, number, draft)
            except UserError as error:
                yield LeftOut(str(file), first, draft.base, str(error))
                continue
            yield draft
    finally:
        pdf.close()


def _read_page(pdf: Any, number: int, draft: Draft) -> None:
    import pypdfium2

    try:
        page = pdf[number]
    except pypdfium2.PdfiumError as error:
        draft.lost.append(f"bad page: number {number + 1}: {error}")
        return
    try:
        text = page.get_textpage()
        figures = list(_figures(page, draft, number))
        above = None
        for box in reading_order([*_lines(text), *figures]):
            if isinstance(box.content, str):
                draft.text(box.content, joint=joint(above, box) if above else "\n\n")
                above = box
            else:
                draft.add("image", f"page {number + 1}", box.content)
        text.close()
    except pypdfium2.PdfiumError as error:
        draft.lost.append(f"bad page: number {number + 1}: {error}")
    finally:
        page.close()


def _lines(text: Any) -> Iterator[Box]:
    """Runs of characters on one line without a wide gap inside."""
    run = _Run()
    for index in range(min(text.count_chars(), MAX_CHARACTERS)):
        unit, place = _character(text, index)
        if unit in (10, 13) or not run.goes_on(place):
            yield from run.take()
        run.add(unit, place)
    yield from run.take()


def _character(text: Any, index: int) -> tuple[int, tuple[float, float, float, float] | None]:
    """A unit of UTF-16 and its loose box, None for characters that pdfium puts in between."""
    from pypdfium2 import raw

    unit = raw.FPDFText_GetUnicode(text, index)
    if raw.FPDFText_IsGenerated(text, index) == 1:
        return unit, None
    return unit, text.get_charbox(index, loose=True)


class _Run:
    """Characters that stand together, and the box around them."""

    def __init__(self) -> None:
        self._units: list[int] = []
        self._box: list[float] = []  # left, bottom, right, top

    def goes_on(self, place: tuple[float, float, float, float] | None) -> bool:
        """Whether a character at `place` continues the line without a wide gap."""
        if not self._box or place is None:
            return True
        left, bottom, _, top = place
        height = max(self._box[3] - self._box[1], 1.0)
        overlap = min(top, self._box[3]) - max(bottom, self._box[1])
        gap = left - self._box[2]
        same_line = overlap > 0.3 * min(height, max(top - bottom, 0.1))
        return same_line and -height < gap < WORD_GAP * height

    def add(self, unit: int, place: tuple[float, float, float, float] | None) -> None:
        """Append a unit of UTF-16; zero is what pdfium says of glyphs without a meaning."""
        if unit == 0:
            return
        # 2 is the hyphen at the end of a line that pdfium has recognised as one
        self._units.append(0x2D if unit == 2 else unit)
        if place is not None and not chr(unit).isspace():
            box = self._box or list(place)
            self._box = [
                min(box[0], place[0]), min(box[1], place[1]),
                max(box[2], place[2]), max(box[3], place[3]),
            ]  # fmt: skip

    def take(self) -> Iterator[Box]:
        """The box, if it shows anything, and a new start."""
        units, box = self._units, self._box
        self._units, self._box = [], []
        data = b"".join(unit.to_bytes(2, "little") for unit in units)
        content = " ".join(data.decode("utf-16-le", errors="replace").split())
        if content and box:
            left, bottom, right, top = box
            yield Box(left, bottom, right, top, content)


def _figures(page: Any, draft: Draft, number: int) -> Iterator[Box]:
    from pypdfium2 import raw

    objects = page.get_objects(filter=(raw.FPDF_PAGEOBJ_IMAGE,), max_depth=DEPTH)
    for count, figure in enumerate(objects):
        if count == MAX_FIGURES:
            draft.lost.append(f"many pictures: page {number + 1} has more than {MAX_FIGURES}")
            return
        width, height = figure.get_px_size()
        if min(width, height) < MIN_SIDE:
            draft.lost.append(f"tiny picture: {width} x {height} on page {number + 1}")
        elif width * height > MAX_PIXELS:
            draft.lost.append(f"large picture: {width} x {height} on page {number + 1}")
        else:
            left, bottom, right, top = figure.get_bounds()
            yield Box(left, bottom, right, top, _fetch(figure))


def _fetch(figure: Any) -> Callable[[], bytes | np.ndarray]:
    """The bytes of a JPEG that stands upright, else the picture as the page shows it."""

    def fetch() -> bytes | np.ndarray:
        import pypdfium2

        matrix = figure.get_matrix()
        upright = matrix.b == matrix.c == 0 and matrix.a > 0 and matrix.d > 0
        try:
            if upright and figure.get_filters() == ["DCTDecode"]:
                return bytes(figure.get_data())
            picture = figure.get_bitmap(render=_may_render(figure)).to_pil().convert("RGBA")
        except (pypdfium2.PdfiumError, ValueError) as error:
            raise UserError(f"bad image: {error}") from None
        white = PIL.Image.new("RGBA", picture.size, "white")
        return np.asarray(PIL.Image.alpha_composite(white, picture).convert("RGB"))

    return fetch


def _may_render(figure: Any) -> bool:
    """Whether the picture is bounded as it is drawn: a thin one may be stretched without end."""
    width, height = figure.get_px_size()
    left, bottom, right, top = figure.get_bounds()
    shown_width, shown_height = abs(right - left), abs(top - bottom)
    if not shown_width or not shown_height:
        return False
    if (width < height) != (shown_width < shown_height):  # it lies on its side
        width, height = height, width
    scale = max(width / shown_width, height / shown_height)
    return shown_width * shown_height * scale**2 <= MAX_PIXELS
