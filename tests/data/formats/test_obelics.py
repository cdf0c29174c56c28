"""OBELICS: parquet rows become pages, and what is broken does not stop the others."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmpt.data.formats import obelics

URL = "https://a.example/pictures/{}.png?size=1"


@pytest.fixture
def images(tmp_path, picture):
    """A folder with picture 1 by its hash and picture 2 by its name."""
    folder = tmp_path / "images"
    folder.mkdir()
    digest = hashlib.sha256(URL.format(1).encode()).hexdigest()
    (folder / f"{digest}.png").write_bytes(picture(1))
    (folder / "2.png").write_bytes(picture(2))
    (folder / "broken.png").write_bytes(picture(3)[:40])
    return folder


def write(path, rows, **options):
    metadata = [json.dumps({"url": f"https://page.example/{n}"}) for n in range(len(rows))]
    columns = {
        "images": pa.array([row[0] for row in rows], pa.list_(pa.string())),
        "texts": pa.array([row[1] for row in rows], pa.list_(pa.string())),
        "general_metadata": metadata,
    }
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_pictures_and_texts_stand_in_their_order(tmp_path, images, run):
    row = ([None, URL.format(1), None, URL.format(2)], ["first", None, "second", None])
    found = run("obelics", write(tmp_path / "a.parquet", [row]), images=images)
    assert found.brief() == [["first", 1, "second", 2]]
    [document] = found.documents
    assert (document.base, document.order) == ("https://page.example/0", "fixed")


def test_a_missing_or_broken_picture_is_counted_and_its_document_stays(tmp_path, images, run):
    links = [URL.format(1), URL.format(9), URL.format("broken"), None, None]
    path = write(tmp_path / "a.parquet", [(links, [None, None, None, "one", "two"])])
    found = run("obelics", path, images=images)
    assert found.brief() == [[1, "one\n\ntwo"]]
    assert found.result["part_reasons"] == {"missing picture": 1, "bad image": 1}
    assert {line["key"] for line in found.lines} == {"https://page.example/0"}
    whole = run("obelics", path, images=images, whole=True)
    assert whole.result["reasons"] == {"incomplete": 1}


def test_bad_rows_are_left_out_with_their_number(tmp_path, images, run):
    rows = [
        ([None], ["good"]),
        ([None, None], ["unequal"]),
        ([URL.format(1)], ["both"]),
        (None, ["none"]),
        ([None], [None]),
        ([None], ["good too"]),
    ]
    found = run("obelics", write(tmp_path / "a.parquet", rows), images=images)
    assert found.brief() == [["good"], ["good too"]]
    assert [line["offset"] for line in found.lines] == [1, 2, 3, 4]
    assert found.result["reasons"] == {"bad row": 3, "empty document": 1}


@pytest.mark.parametrize("name", ["..", "../secret.png", "/etc/passwd", "a\0b", "x" * 300, ""])
def test_a_url_never_leads_out_of_the_folder(tmp_path, images, picture, run, name):
    (tmp_path / "secret.png").write_bytes(picture(7))
    row = ([f"https://a.example/{name}", None], [None, "text"])
    found = run("obelics", write(tmp_path / "a.parquet", [row]), images=images)
    assert found.brief() == [["text"]]
    assert found.result["part_reasons"] == {"missing picture": 1}


def test_a_link_out_of_the_folder_is_not_followed(tmp_path, images, picture, run):
    (tmp_path / "secret.png").write_bytes(picture(7))
    (images / "linked.png").symlink_to(tmp_path / "secret.png")
    row = ([URL.format("linked"), None], [None, "text"])
    found = run("obelics", write(tmp_path / "a.parquet", [row]), images=images)
    assert found.result["part_reasons"] == {"outside": 1}


@pytest.mark.parametrize("damage", ["cut", "text", "columns", "middle"])
def test_a_damaged_file_is_left_out_and_the_next_is_read(tmp_path, images, run, damage):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [([None], [f"row {number} {'x' * 50}"]) for number in range(100)]
    first = write(folder / "a.parquet", rows, row_group_size=20, compression="gzip")
    write(folder / "b.parquet", [([None], ["good"])])
    data = bytearray(first.read_bytes())
    if damage == "columns":
        pq.write_table(pa.table({"images": [1], "text": ["a"]}), first)
    elif damage == "middle":
        start = pq.ParquetFile(first).metadata.row_group(2).column(1).data_page_offset
        data[start + 40 : start + 80] = bytes(40)
        first.write_bytes(data)
    else:
        first.write_bytes(data[:500] if damage == "cut" else b"no parquet")
    found = run("obelics", folder, images=images)
    assert found.brief()[-1] == ["good"]
    assert found.result["reasons"] == {"bad parquet": 1}
    if damage == "middle":  # one of five groups of rows is lost
        assert found.lines[0]["offset"] == 40
        assert found.result["written"] == 80 + 1


def test_rows_are_read_as_they_are_asked_for(tmp_path, images, monkeypatch):
    path = write(tmp_path / "a.parquet", [([None], [f"{n}"]) for n in range(500)])
    read = []
    batches = pq.ParquetFile.iter_batches

    def counted(self, **options):
        for batch in batches(self, **options):
            read.append(len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    assert next(obelics.read(path, images)).base == "https://page.example/0"
    assert read == [obelics.ROWS]
