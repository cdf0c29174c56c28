"""MINT-1T: entries and the pages of a TIFF come together in their order."""

import io
import json
import tarfile

import PIL.Image
import pytest

from mmpt.parts import Image


def tiff(*reds: int, mode: str = "RGB", side: int = 16) -> bytes:
    pages = [_page(mode, red, side) for red in reds]
    buffer = io.BytesIO()
    pages[0].save(buffer, "tiff", save_all=True, append_images=pages[1:])
    return buffer.getvalue()


def _page(mode: str, red: int, side: int) -> PIL.Image.Image:
    if mode == "I;16":
        return PIL.Image.new(mode, (side, side), red * 257)
    return PIL.Image.new("RGB", (side, side), (red, 0, 0)).convert(mode)


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def described(images, texts) -> bytes:
    return json.dumps({"images": images, "texts": texts, "image_metadata": []}).encode()


GOOD = described([None, "p1.png", None, "p2.png"], ["one", None, "two", None])


def test_page_n_of_the_tiff_is_picture_n(tmp_path, run):
    path = write(tmp_path / "a.tar", [("d/1.json", GOOD), ("d/1.tiff", tiff(10, 20))])
    found = run("mint", path)
    assert found.brief() == [["one", 10, "two", 20]]
    assert found.documents[0].base == "a/d/1"


@pytest.mark.parametrize("mode", ["L", "CMYK", "1", "RGBA", "I;16"])
def test_pages_of_other_modes_are_read(tmp_path, run, mode):
    path = write(tmp_path / "a.tar", [("1.json", GOOD), ("1.tiff", tiff(9, 9, mode=mode))])
    found = run("mint", path)
    assert [type(part) for part in found.documents[0].parts][1::2] == [Image, Image]


def test_bad_samples_are_left_out_and_the_next_is_read(tmp_path, run):
    bad = {
        "no-json": [("tiff", tiff(1))],
        "bad-json": [("json", b"{"), ("tiff", tiff(1))],
        "deep-json": [("json", b"[" * 20_000), ("tiff", tiff(1))],
        "no-lists": [("json", described("a", "b"))],
        "unequal": [("json", described([None], []))],
        "both": [("json", described(["a"], ["b"])), ("tiff", tiff(1))],
        "number": [("json", described([1], [None])), ("tiff", tiff(1))],
        "no-tiff": [("json", GOOD)],
        "few-pages": [("json", GOOD), ("tiff", tiff(1))],
        "many-pages": [("json", GOOD), ("tiff", tiff(1, 2, 3))],
        "cut-tiff": [("json", GOOD), ("tiff", tiff(1, 2)[:20])],
        "png": [("json", GOOD), ("tiff", b"\x89PNG")],
    }
    members = [(f"{key}.{field}", data) for key, rows in bad.items() for field, data in rows]
    members += [("good.json", GOOD), ("good.tiff", tiff(10, 20))]
    found = run("mint", write(tmp_path / "a.tar", members))
    assert found.brief() == [["one", 10, "two", 20]]
    assert [line["key"] for line in found.lines] == list(bad)


def test_a_broken_page_does_not_hide_the_next(tmp_path, run):
    data = bytearray(tiff(10, 20, side=64))
    # the second entry of the first directory gives the width: an absurd one
    first = int.from_bytes(data[4:8], "little")
    for entry in range(first + 2, first + 2 + 12 * 8, 12):
        if data[entry : entry + 2] == (256).to_bytes(2, "little"):
            data[entry + 8 : entry + 12] = (60_000).to_bytes(4, "little")
    path = write(tmp_path / "a.tar", [("1.json", GOOD), ("1.tiff", bytes(data))])
    found = run("mint", path)
    assert found.brief() == [["one\n\ntwo", 20]]
    assert found.result["part_reasons"] == {"bad tiff": 1}


def test_a_cut_tar_gives_what_stands_before_the_cut(tmp_path, run):
    members = []
    for number in range(4):
        members += [(f"{number}.json", GOOD), (f"{number}.tiff", tiff(1, 2))]
    path = write(tmp_path / "a.tar", members)
    with tarfile.open(path) as tar:
        offset = tar.getmember("2.tiff").offset_data
    path.write_bytes(path.read_bytes()[: offset + 100])
    found = run("mint", path)
    assert found.result["written"] == 2
    assert found.result["reasons"]["truncated"] == 1
