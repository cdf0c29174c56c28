"""The reading order of what stands on a page: boxes are cut apart along the white between them.

A page is cut into columns where a wide white stripe has filled columns on both sides, else into
rows at its widest gap, and so on (recursive XY cut, Nagy and Seth 1984).
Coordinates are those of PDF: points, from the lower left corner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

MAX_BOXES = 1500  # more are read from top to bottom: cutting takes quadratic time
COLUMN_GAP = 0.8  # least width of the white between columns, in heights of a line
COLUMN_FILL = 0.5  # least median width of a line in its column: cells of tables are narrower
MIN_LINES, MIN_WIDTH = 3, 8  # of a column, the width in heights of a line
PARAGRAPH_GAP = 0.7  # white between paragraphs, in heights of a line


@dataclass(frozen=True)
class Box:
    """A line of text (str) or a figure (anything else)."""

    left: float
    bottom: float
    right: float
    top: float
    content: Any

    @property
    def height(self) -> float:
        """In points."""
        return self.top - self.bottom


def reading_order(boxes: Sequence[Box]) -> list[Box]:
    """The boxes as a person reads them."""
    if len(boxes) > MAX_BOXES:
        return _by_rows(list(boxes))
    heights = [box.height for box in boxes if isinstance(box.content, str)]
    line = median(heights) if heights else 1.0
    done: list[Box] = []
    waiting = [list(boxes)]  # a stack of groups, the first to be read on top
    while waiting:
        group = waiting.pop()
        halves = _cut_columns(group, line) or _cut_rows(group)
        if halves is None:
            done += _by_rows(group)
        else:
            waiting += reversed(halves)
    return done


def joint(above: Box, below: Box) -> str:
    """What stands between two texts that follow one another: a space, a new or an empty line."""
    overlap = min(above.top, below.top) - max(above.bottom, below.bottom)
    line = min(above.height, below.height)
    if overlap > line / 2 and below.left >= above.right:
        return " "
    return "\n\n" if above.bottom - below.top > PARAGRAPH_GAP * line else "\n"


def _cut_columns(group: list[Box], line: float) -> tuple[list[Box], list[Box]] | None:
    """Left and right of the widest white stripe that parts two columns."""
    spans = [(box.left, box.right, box) for box in group]
    for width, left, right in sorted(_gaps(spans), key=lambda gap: -gap[0]):
        if width < COLUMN_GAP * line:
            return None
        if _is_column(left, line) and _is_column(right, line):
            return left, right
    return None


def _cut_rows(group: list[Box]) -> tuple[list[Box], list[Box]] | None:
    """Above and below the widest white row."""
    gaps = list(_gaps([(-box.top, -box.bottom, box) for box in group]))
    if not gaps:
        return None
    _, above, below = max(gaps, key=lambda gap: gap[0])
    return above, below


def _by_rows(group: list[Box]) -> list[Box]:
    """From top to bottom, and from left to right where the middles of boxes are level."""
    rows: list[list[Box]] = []
    for box in sorted(group, key=lambda box: -box.top):
        if rows and _are_level(rows[-1][0], box):
            rows[-1].append(box)
        else:
            rows.append([box])
    return [box for row in rows for box in sorted(row, key=lambda box: box.left)]


def _are_level(first: Box, second: Box) -> bool:
    middles = [(box.top + box.bottom) / 2 for box in (first, second)]
    return first.bottom < middles[1] and middles[0] > second.bottom


def _gaps(
    spans: list[tuple[float, float, Box]],
) -> list[tuple[float, list[Box], list[Box]]]:
    """Every stretch that no span covers: its width, and the boxes before and after it."""
    spans = sorted(spans, key=lambda span: span[:2])
    boxes, gaps, end = [box for _, _, box in spans], [], float("-inf")
    for number, (first, last, _) in enumerate(spans):
        if number and first > end:
            gaps.append((first - end, boxes[:number], boxes[number:]))
        end = max(end, last)
    return gaps


def _is_column(boxes: list[Box], line: float) -> bool:
    """A figure, or lines of which most fill the width."""
    if any(not isinstance(box.content, str) for box in boxes):
        return True
    width = max(box.right for box in boxes) - min(box.left for box in boxes)
    widths = [box.right - box.left for box in boxes]
    if len(boxes) < MIN_LINES or width < MIN_WIDTH * line:
        return False
    return median(widths) >= COLUMN_FILL * width
