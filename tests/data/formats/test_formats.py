"""The verb: what it counts, writes, refuses and holds."""

import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mmpt.__main__ import main
from mmpt.config import UserError
from mmpt.data import formats
from mmpt.data.formats import import_documents
from mmpt.data.formats.draft import Draft
from mmpt.data.formats.writer import SplitWriter
from mmpt.data.shards import Record, is_heldout
from mmpt.media import video_bytes


@pytest.fixture
def folder(tmp_path, picture):
    site = tmp_path / "site"
    site.mkdir()
    (site / "a.png").write_bytes(picture(1))
    for number in range(40):
        (site / f"{number}.html").write_text(f"page {number} <img src=a.png>")
    return site


def test_splits_follow_the_base_key_and_equal_input_gives_equal_bytes(folder, tmp_path, run):
    found = run("html", folder, name="pages", license="MIT")
    assert found.result["written"] == 40
    for document in found.documents:
        assert is_heldout(document.base) == ("-heldout-" in document.shard)
        assert document.source == "pages"
    again = import_documents("html", [folder], out=tmp_path / "again", name="pages", license="MIT")
    names = [Path(path).name for path in again["shards"]]
    assert names == ["pages-train-0000.tar", "pages-heldout-0000.tar"]
    for first, second in zip(found.result["shards"], again["shards"], strict=True):
        assert Path(first).read_bytes() == Path(second).read_bytes()
    assert b'"license":"MIT"' in Path(again["shards"][0]).read_bytes()


def test_a_document_is_read_only_when_the_one_before_it_is_taken(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(
        formats.webpage, "read_html", lambda text, draft, fetch: opened.append(draft.path)
    )
    pages = formats.FORMATS["html"].read(folder, None)
    next(pages)
    next(pages)
    assert len(opened) == 2


def record(number: int, size: int) -> Record:
    part = {"type": "image", "suffix": "png", "data": bytes(size)}
    return Record(f"k{number}", f"base {number}", "fixed", (part,), "s", "")


def test_the_writer_holds_one_shard_of_each_split(tmp_path):
    writer, held = SplitWriter(tmp_path, "x", 10_000), []
    for number in range(100):
        writer.add(record(number, 2000))
        held.append(sum(len(records) for records in writer._waiting.values()))
    paths = writer.finish()
    assert max(held) <= 4
    assert len(paths) == 50
    assert max(path.stat().st_size for path in paths) < 20_480


def test_a_new_import_replaces_the_shards_of_its_name_alone(tmp_path):
    for name, count in (("x", 60), ("x-y", 20), ("x", 1)):
        writer = SplitWriter(tmp_path, name, 5000)
        for number in range(count):
            writer.add(record(number, 3000))
        last = writer.finish()
    names = sorted(path.name for path in tmp_path.glob("*.tar"))
    assert [path.name for path in last] == ["x-train-0000.tar"]
    assert len([name for name in names if name.startswith("x-y-")]) == 20
    assert len(names) == 21


def test_an_import_that_finds_nothing_leaves_the_one_before_alone(folder, tmp_path, run):
    shards = run("html", folder).result["shards"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no html documents"):
        run("html", tmp_path / "empty")
    assert all(Path(path).exists() for path in shards)


def test_a_document_that_is_too_large_is_left_out(folder, run, monkeypatch):
    monkeypatch.setattr(formats.draft, "MAX_DOCUMENT_BYTES", 200)
    (folder / "0.html").write_text("a" * 300)
    found = run("html", folder)
    assert found.result["reasons"] == {"too large": 1}
    assert found.result["written"] == 39


def test_texts_join_unless_they_have_times():
    draft = Draft("p", 0, "b")
    draft.text("a")
    draft.text("b", joint=" ")
    draft.text("  \n")
    draft.text("c", start=1.0)
    draft.text("d", start=2.0)
    draft.text("\ud800")
    assert [part["text"] for part in draft.parts] == ["a b", "c", "d"]
    assert draft.lost[0].startswith("bad text")


@pytest.fixture
def samples(picture, sound) -> dict[str, tuple[str, bytes]]:
    """A small file of each kind."""
    page, table, tar = "https://page.example", io.BytesIO(), io.BytesIO()
    columns = {"images": [[None, "x"]] * 9, "texts": [["a", None]] * 9}
    pyarrow.parquet.write_table(pyarrow.table(columns), table, row_group_size=3)
    line = {"url": page, "text_list": ["a", "b"], "image_info": [{"matched_text_index": 1}]}
    with tarfile.open(fileobj=tar, mode="w") as archive:
        row = json.dumps({"images": [None, "x"], "texts": ["a", None]}).encode()
        for name, data in (("1.json", row), ("1.tiff", picture(1, "tiff"))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    return {
        "obelics": ("a.parquet", table.getvalue()),
        "mmc4": ("a.jsonl", (json.dumps(line) + "\n").encode() * 9),
        "mint": ("a.tar", tar.getvalue()),
        "html": ("a.html", b"<p>a<img src='a.png'><table><tr><td>&amp;</table><!-- x -->" * 9),
        "markdown": ("a.md", b"# a\n\n![x](a.png) [y](z)\n\n- b\n\n```\nc\n```\n\n" * 9),
        "clips": ("a.mp4", video_bytes(frames, 10.0)),
        "speech": ("a.mp3", sound(kind="MP3")),
    }


@pytest.mark.parametrize("kind", ["obelics", "mmc4", "mint", "html", "markdown", "clips", "speech"])
def test_damaged_bytes_never_stop_an_import(tmp_path, samples, run, kind):
    rng, folder, (name, whole) = random.Random(kind), tmp_path / "in", samples[kind]
    for number in range(30):
        data = bytearray(whole[: rng.randrange(9, len(whole))] if number % 5 == 4 else whole)
        for _ in range(8):
            data[rng.randrange(len(data))] = rng.randrange(256)
        place = folder / f"{number:02}"
        place.mkdir(parents=True)
        (place / name).write_bytes(data)
        (place / "a.txt").write_text("words")
        (place / "a.vtt").write_bytes(b"WEBVTT\n\n00:00.000 --> 00:00.500\nwords\n")
    options = {"images": tmp_path} if formats.FORMATS[kind].by_url else {}
    assert run(kind, folder, **options).result["read"] >= 30


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("html", {"paths": ["absent"]}, "absent is not there"),
        ("html", {"images": Path()}, "--images is for obelics and mmc4"),
        ("obelics", {}, "give their folder by --images"),
        ("mmc4", {"images": Path("absent")}, "not absent"),
        ("html", {"name": "a.b"}, "use letters"),
        ("html", {"shard_mib": 0}, "needs at least 1"),
        ("mint", {}, "no mint documents"),
    ],
)
def test_mistakes_of_the_user_are_named_in_one_line(tmp_path, kind, options, why):
    paths = options.pop("paths", [tmp_path])
    with pytest.raises(UserError, match=why) as caught:
        import_documents(kind, [Path(path) for path in paths], out=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mmpt\[import\]'"):
        import_documents("pdf", [tmp_path], out=tmp_path)


def test_the_command_line_runs_it(folder, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--name", "pages", "--json"]
    assert main(["data", "import", "html", str(folder), *out]) == 0
    assert '"written": 40' in capsys.readouterr().out
    assert main(["data", "verify", *map(str, (tmp_path / "out").glob("*.tar"))]) == 0


def test_what_the_formats_need_is_loaded_only_where_it_is_used():
    code = (
        "import sys, mmpt.data.formats; "
        "print({'torch', 'pyarrow', 'pypdfium2', 'markdown_it', 'av'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
