"""PDF files: text and pictures by their place on the page."""

import io

import PIL.Image
import pytest

from mmpt.data.formats import pdf
from mmpt.parts import Image, Text


def write(path, *pages, jpegs=()):
    """A PDF by hand: a page is what it draws; (left, bottom, text), or a number of a picture."""
    objects = [b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    for data, width, height in jpegs:
        head = (
            f"<< /Type /XObject /Subtype /Image /Width {width} /Height {height} /BitsPerComponent 8"
            f" /ColorSpace /DeviceRGB /Filter /DCTDecode /Length {len(data)} >>"
        )
        objects.append(head.encode() + b"\nstream\n" + data + b"\nendstream")
    names = " ".join(f"/P{n} {n + 2} 0 R" for n in range(len(jpegs)))
    resources = f"<< /Font << /F 1 0 R >> /XObject << {names} >> >>"
    kids, parent = [], len(objects) + 2 * len(pages) + 1
    for page in pages:
        drawn = "\n".join(_draw(*item) for item in page).encode()
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawn), drawn))
        kids.append(f"{len(objects) + 1} 0 R")
        objects.append(
            f"<< /Type /Page /Parent {parent} 0 R /MediaBox [0 0 600 800] "
            f"/Contents {len(objects)} 0 R /Resources {resources} >>".encode()
        )
    objects.append(f"<< /Type /Pages /Count {len(pages)} /Kids [{' '.join(kids)}] >>".encode())
    objects.append(f"<< /Type /Catalog /Pages {parent} 0 R >>".encode())
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number + 1, body)
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    end = (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
        f"trailer << /Size {len(objects) + 1} /Root {len(objects)} 0 R >>\n"
        f"startxref\n{len(data)}\n%%EOF\n"
    )
    path.write_bytes(data + end.encode())
    return path


def _draw(left, bottom, what, matrix="40 0 0 40"):
    if isinstance(what, int):
        return f"q {matrix} {left} {bottom} cm /P{what} Do Q"
    return f"BT /F 10 Tf {left} {bottom} Td ({what}) Tj ET"


def jpeg(colour, width=16, height=16):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), colour).save(buffer, "jpeg", quality=95)
    return buffer.getvalue(), width, height


def column(left, top, words):
    return [(left, top - 12 * n, word) for n, word in enumerate(words)]


WORDS = [f"these are the words of a line with number {n}" for n in range(5)]


def test_text_and_figures_stand_as_they_are_read_and_not_as_they_are_drawn(tmp_path, run):
    page = [(50, 600, "below"), (50, 640, 0), (50, 700, "above")]
    red = jpeg((200, 0, 0))
    found = run("pdf", write(tmp_path / "a.pdf", page, jpegs=[red]))
    [above, figure, below] = found.documents[0].parts
    assert (above, below) == (Text("above"), Text("below"))
    assert isinstance(figure, Image)
    assert figure.pixels.shape == (16, 16, 3)
    assert abs(int(figure.pixels[0, 0, 0]) - 200) < 4


def test_two_columns_are_read_one_after_the_other(tmp_path, run):
    left = [f"left {word}" for word in WORDS]
    right = [f"right {word}" for word in WORDS]
    rows = zip(column(40, 700, left), column(320, 700, right), strict=True)
    page = [item for row in rows for item in row]  # drawn across
    [document] = run("pdf", write(tmp_path / "a.pdf", page)).documents
    assert document.parts == [Text("\n".join(left + right))]


def test_a_line_that_is_drawn_in_pieces_is_one_line(tmp_path, run):
    page = [(50, 700, "one "), (74, 700, "two"), (50, 688, "three"), (50, 640, "far")]
    [document] = run("pdf", write(tmp_path / "a.pdf", page)).documents
    assert document.parts == [Text("one two\nthree\n\nfar")]


def test_an_upright_jpeg_keeps_its_bytes_and_a_turned_one_is_drawn(tmp_path, run):
    picture = jpeg((0, 200, 0), 32, 16)
    page = [(50, 700, 0, "64 0 0 32"), (50, 500, 0, "0 64 -32 0")]
    path = write(tmp_path / "a.pdf", page, jpegs=[picture])
    [draft] = pdf.read(path, None)
    upright, turned = draft.parts
    assert upright["data"] == picture[0]
    assert turned["suffix"] == "webp"
    assert Image.load(turned["data"]).pixels.shape == (32, 16, 3)


def test_a_thin_picture_that_is_stretched_is_not_drawn_large(tmp_path, run):
    page = [(50, 700, 0, "0 0.0001 -700 0"), (50, 650, "text")]
    found = run("pdf", write(tmp_path / "a.pdf", page, jpegs=[jpeg((9, 9, 9), 8000, 8)]))
    [picture] = [part for part in found.documents[0].parts if isinstance(part, Image)]
    assert picture.pixels.shape == (8, 8000, 3)


def test_long_files_are_several_documents_with_one_base_key(tmp_path, run, monkeypatch):
    monkeypatch.setattr(pdf, "MAX_PAGES", 2)
    pages = [[(50, 700, f"page {number}")] for number in range(5)]
    found = run("pdf", write(tmp_path / "a.pdf", *pages))
    assert found.brief() == [["page 0\n\npage 1"], ["page 2\n\npage 3"], ["page 4"]]
    assert len({document.base for document in found.documents}) == 1


def test_bad_files_are_left_out_and_the_next_is_read(tmp_path, run):
    folder = tmp_path / "in"
    folder.mkdir()
    data = write(folder / "good.pdf", [(50, 700, "good")]).read_bytes()
    (folder / "a.pdf").write_bytes(b"no pdf")
    (folder / "b.pdf").write_bytes(data[:60])
    (folder / "c.pdf").symlink_to("/etc/passwd")
    write(folder / "d.pdf", [])
    found = run("pdf", folder)
    assert found.brief() == [["good"]]
    assert found.result["reasons"] == {"bad pdf": 2, "outside": 1, "empty document": 1}


def test_a_broken_picture_does_not_hide_the_page(tmp_path, run):
    data, width, height = jpeg((1, 2, 3))
    page = [(50, 700, 0), (50, 650, 1), (50, 600, "text")]
    path = write(
        tmp_path / "a.pdf", page, jpegs=[(data[:30], width, height), jpeg((0, 0, 0), 2, 2)]
    )
    found = run("pdf", path)
    assert found.documents[0].parts[-1] == Text("text")
    assert found.result["part_reasons"]["tiny picture"] == 1
    assert found.result["parts_left_out"] == 2


@pytest.mark.parametrize("seed", range(8))
def test_damaged_bytes_never_stop_the_import(tmp_path, run, seed):
    import random

    folder = tmp_path / "in"
    folder.mkdir()
    page = [*column(50, 700, WORDS), (50, 500, 0)]
    whole = write(folder / "z.pdf", page, page, jpegs=[jpeg((9, 99, 9))]).read_bytes()
    rng = random.Random(seed)
    for number in range(10):
        data = bytearray(whole)
        for _ in range(8):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (folder / f"{number}.pdf").write_bytes(data)
    assert run("pdf", folder).result["read"] == 11
