"""MMC4: a picture stands before the sentence that it is matched to."""

import gzip
import json
import zipfile

import pytest

from mmpt.data.formats import mmc4


@pytest.fixture
def images(tmp_path, picture):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


def row(*matches, texts=("One.", "Two.", "Three."), url="https://page.example/"):
    infos = [
        {"image_name": f"{number}.png", "raw_url": "https://x", "matched_text_index": place}
        for number, place in matches
    ]
    return {"url": url, "text_list": list(texts), "image_info": infos}


def lines(*rows) -> bytes:
    encoded = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    return b"".join(line + b"\n" for line in encoded)


def test_a_picture_stands_before_its_sentence(tmp_path, images, run):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(row((0, 1), (2, 2), (1, 1)), row()))
    found = run("mmc4", path, images=images)
    assert found.brief() == [["One.", 0, 1, "Two.", 2, "Three."], ["One. Two. Three."]]
    assert found.documents[0].base == "https://page.example/"


@pytest.mark.parametrize("suffix", [".zip", ".jsonl.gz"])
def test_packed_files_give_what_plain_ones_give(tmp_path, images, run, suffix):
    data, path = lines(*[row((n % 3, 0)) for n in range(20)]), tmp_path / f"a{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../../docs.jsonl", data)
            archive.writestr("readme.txt", "no documents")
    else:
        path.write_bytes(gzip.compress(data))
    found = run("mmc4", path, images=images)
    assert found.brief() == [[n % 3, "One. Two. Three."] for n in range(20)]


def test_bad_lines_are_left_out_with_their_number(tmp_path, images, run):
    path = tmp_path / "a.jsonl"
    bad = [
        b"{cut",
        b"[1]",
        b"[" * 20_000,
        b'"\xff"',
        {"text_list": "no list"},
        {"text_list": [1]},
        row((0, 3)),
        row((0, -1)),
        row((0, True)),
        {"text_list": ["a"], "image_info": [1]},
        {"text_list": ["a"], "image_info": [{"matched_text_index": 0, "raw_url": 1}]},
    ]
    path.write_bytes(lines(*bad, row((0, 0)), row((9, 0))))
    found = run("mmc4", path, images=images)
    assert found.brief() == [[0, "One. Two. Three."], ["One. Two. Three."]]
    assert [line["offset"] for line in found.lines] == [*range(len(bad)), len(bad) + 1]
    assert found.result["reasons"] == {"bad json": 3, "bad row": 8}
    assert found.result["part_reasons"] == {"missing picture": 1}


def test_an_archive_that_is_cut_gives_what_stands_before_the_cut(tmp_path, images, run):
    path = tmp_path / "a.jsonl.gz"
    data = gzip.compress(lines(*[row(url=f"https://p/{n * 7919 % 1000}") for n in range(300)]))
    path.write_bytes(data[: len(data) // 2])
    found = run("mmc4", path, images=images)
    assert found.result["reasons"] == {"bad file": 1}
    assert 10 < found.result["written"] < 300
    (tmp_path / "b.zip").write_bytes(b"PK no zip")
    assert run("mmc4", tmp_path / "b.zip", images=images).result["left_out"] == 1


def test_a_line_that_is_too_long_is_one_bad_line(tmp_path, images, run, monkeypatch):
    monkeypatch.setattr(mmc4, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(row(texts=["a" * 5000]), row()))
    found = run("mmc4", path, images=images)
    assert found.brief() == [["One. Two. Three."]]
    assert found.result["left_out"] == 1
