"""The reading order of boxes on a page."""

from hypothesis import given
from hypothesis import strategies as st

from mmpt.data.formats.layout import MAX_BOXES, Box, joint, reading_order


def line(left: float, top: float, text: str, *, width: float = 200, height: float = 10) -> Box:
    return Box(left, top - height, left + width, top, text)


def order(*boxes: Box) -> str:
    return " ".join(str(box.content) for box in reading_order(boxes))


def test_lines_are_read_from_top_to_bottom():
    boxes = [line(50, 700 - 12 * n, f"{n}") for n in (3, 0, 2, 1)]
    assert order(*boxes) == "0 1 2 3"


def test_columns_are_read_one_after_the_other_below_a_title_over_both():
    title = line(50, 760, "title", width=430, height=20)
    left = [line(50, 700 - 12 * n, f"l{n}") for n in range(4)]
    right = [line(270, 700 - 12 * n, f"r{n}") for n in range(4)]
    footer = line(250, 60, "7", width=20)
    assert order(*right, footer, *left, title) == "title l0 l1 l2 l3 r0 r1 r2 r3 7"


def test_a_figure_in_a_column_stands_between_the_lines_around_it():
    left = [line(50, 700 - 12 * n, f"l{n}") for n in range(4)]
    figure = Box(270, 640, 470, 680, 1)
    right = [line(270, 700, "above"), line(270, 630, "below"), line(270, 618, "more")]
    assert order(figure, *right, *left) == "l0 l1 l2 l3 above 1 below more"


def test_a_table_is_read_row_by_row():
    cells = [
        line(50 + 200 * c, 700 - 15 * r, f"{r}{c}", width=20) for r in range(4) for c in (0, 1)
    ]
    assert order(*reversed(cells)) == "00 01 10 11 20 21 30 31"


def test_pieces_of_a_line_are_read_from_left_to_right_though_they_are_not_quite_level():
    rows = [(700.4, "b", 100), (700, "a", 20), (690.6, "c", 20), (691, "d", 100)]
    boxes = [line(left, top, text, width=60) for top, text, left in rows]
    assert order(*boxes) == "a b c d"


def test_texts_are_joined_by_what_parts_them():
    assert joint(line(0, 700, "a"), line(210, 700, "b")) == " "
    assert joint(line(0, 700, "a"), line(0, 688, "b")) == "\n"
    assert joint(line(0, 700, "a"), line(0, 670, "b")) == "\n\n"


numbers = st.integers(0, 1000)
boxes = st.builds(
    lambda x, y, w, h, text: Box(x, y, x + w, y + h, "a" if text else 1),
    numbers, numbers, numbers, numbers, st.booleans(),
)  # fmt: skip


@given(st.lists(boxes, max_size=40))
def test_every_box_is_read_once(found):
    assert sorted(map(id, reading_order(found))) == sorted(map(id, found))


def test_pages_of_very_many_boxes_take_bounded_time():
    many = [line(n % 7 * 60, n, f"{n}", width=20, height=0.5) for n in range(MAX_BOXES * 4)]
    assert len(reading_order(many)) == len(many)
