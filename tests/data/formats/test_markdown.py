"""Markdown folders: the source text, cut where a picture stands."""

import pytest


@pytest.fixture
def folder(tmp_path, picture):
    site = tmp_path / "docs"
    site.mkdir()
    for number in range(3):
        (site / f"{number}.png").write_bytes(picture(number))
    return site


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (
            "# Title\n\nText with `code`.\n\n* a\n* b\n",
            ["# Title\n\nText with `code`.\n\n* a\n* b"],
        ),
        ("a ![alt](0.png) b\n\nc", ["a", 0, "b\n\nc"]),
        ("![x](<1.png> 'title')\n![y][r]\n\n[r]: 2.png", [1, 2]),
        ("[![badge](1.png)](http://a.example) text", [1, "text"]),
        ("- a ![](0.png)\n- b\n\n      code\n", ["a", 0, "b\n\ncode"]),
        ("| a | b |\n|---|---|\n| ![](0.png) | c |", ["a\n\nb", 0, "c"]),
        ("| a | b |\n|---|---|\n| 1 | c |", ["| a | b |\n|---|---|\n| 1 | c |"]),
        ('<p align="center"><img src="0.png"></p>\n\nx <img src="1.png"/> y', [0, "x", 1, "y"]),
        ("```\n![no](0.png)\n```\n\n`![no](1.png)`", ["```\n![no](0.png)\n```\n\n`![no](1.png)`"]),
        ("    indented\n    ![no](0.png)", ["    indented\n    ![no](0.png)"]),
        ("> quoted ![](0.png)", ["quoted", 0]),
        ("\\![no](0.png) ![no] (0.png)", ["\\![no](0.png) ![no] (0.png)"]),
        ("a ![b ![](0.png) c](1.png) d", ["a", 1, "d"]),
    ],
)
def test_text_stays_as_it_is_written_around_pictures(folder, run, source, parts):
    (folder / "page.md").write_text(source)
    assert run("markdown", folder).brief() == [parts]


def test_links_out_of_the_folder_are_not_followed(folder, run, picture):
    (folder.parent / "secret.png").write_bytes(picture(9))
    links = ["../secret.png", "/etc/passwd", "http://a.example/x.png", "absent.png"]
    (folder / "page.md").write_text("text " + " ".join(f"![]({link})" for link in links))
    found = run("markdown", folder)
    assert found.brief() == [["text"]]
    assert found.result["part_reasons"] == {"outside": 2, "remote": 1, "missing file": 1}


def test_bad_files_are_left_out_and_the_next_is_read(folder, run):
    (folder / "a.md").write_bytes(b"\xff\xfe")
    (folder / "b.md").write_text(" \n")
    (folder / "c.markdown").write_text("![a" * 200_000)
    (folder / "d.md").write_text("good")
    found = run("markdown", folder)
    assert found.brief()[-1] == ["good"]
    assert found.result["reasons"] == {
        "bad text": 1,
        "empty document": 1,
        "too many marks": 1,
    }
