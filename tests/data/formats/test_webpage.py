"""HTML folders: text and local media in reading order, and nothing from elsewhere."""

import base64
import time

import pytest

from mmpt.data.formats.draft import Draft
from mmpt.data.formats.webpage import read_html


def texts(html: str) -> list[str]:
    draft = Draft("page", 0, "page")
    read_html(html, draft, lambda link: b"")
    return [part["text"] for part in draft.parts]


@pytest.fixture
def folder(tmp_path, picture):
    """site/page.html (to be written), site/a.png, site/images/b c.jpg, and a secret beside."""
    site = tmp_path / "site"
    (site / "images").mkdir(parents=True)
    (site / "a.png").write_bytes(picture(1))
    (site / "images" / "b c.png").write_bytes(picture(2))
    (tmp_path / "secret.png").write_bytes(picture(3))
    return site


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>one</p><p>two  \n three</p>", "one\n\ntwo three"),
        ("<h1>Title</h1>text<br>line", "Title\n\ntext\nline"),
        ("<ul><li>a</li><li>b</ul>end", "a\nb\n\nend"),
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1<td>2</table>", "a | b\n1 | 2"),
        ("<p>a <b>bold</b> w<i>or</i>d &amp; &eacute;&#33;</p>", "a bold word & \xe9!"),
        ("x<pre>  if a:\n    b\n</pre>y", "x\n\n  if a:\n    b\n\ny"),
        ("<title>t</title><style>s</style><script>if (a<b) c</script>text", "text"),
        ("<nav><ul><nav>x</nav><li>y</ul></nav>text<footer>z</footer>", "text"),
        ("<div role=navigation><div>x</div>y</div>text<p hidden>z</p>", "text"),
        ("<h2>Head<a class='headerlink'>P</a></h2>", "Head"),
        ("before<main><p>inside</p></main>after", "inside"),
        ("a<div role=main>b<div>c</div>d</div>e", "b\n\nc\n\nd"),
        ("<nav>never closed<body>text", "text"),
        ("a<!-- comment -->b<![CDATA[x]]>", "ab"),
        ("<p>open <p>paragraphs <div>and", "open\n\nparagraphs\n\nand"),
    ],
)
def test_text_is_what_a_reader_sees(html, text):
    assert texts(html) == [text]


def test_a_page_without_text_gives_none():
    assert texts("<body><script>x</script> \n </body>") == []


def test_deep_nesting_is_no_trouble():
    assert texts("<div>" * 50_000 + "deep") == ["deep"]


@pytest.mark.parametrize("mark", ["<a b", "<a x='", "<!--", "</a ", "<a/", "<![CDATA["])
@pytest.mark.parametrize("end", ["", ">", "-->"])
def test_tags_that_never_end_take_no_quadratic_time(mark, end):
    began = time.monotonic()
    texts("text" + mark * 50_000 + end)
    assert time.monotonic() - began < 5  # it was hours


def test_pictures_stand_where_they_are_shown(folder, run):
    page = '<p>one <img src="a.png"> two</p><p>three<img src="images/b%20c.png?v=1#x">'
    (folder / "page.html").write_text(page)
    found = run("html", folder)
    assert found.brief() == [["one", 1, "two\n\nthree", 2]]
    assert found.documents[0].base == "site/page"
    assert found.documents[0].order == "fixed"


def test_a_page_in_a_folder_may_use_the_folders_beside_it(folder, run):
    (folder / "deep").mkdir()
    (folder / "deep" / "page.htm").write_text('<img src="../a.png">text')
    assert run("html", folder).brief() == [[1, "text"]]


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("../secret.png", "outside"),
        ("images/../../secret.png", "outside"),
        ("%2e%2e/secret.png", "outside"),
        ("/etc/passwd", "outside"),
        ("\\\\server\\x.png", "outside"),
        ("linked.png", "outside"),
        ("http://a.example/x.png", "remote"),
        ("//a.example/x.png", "remote"),
        ("file:///etc/passwd", "remote"),
        ("javascript:x", "remote"),
        ("http://[", "missing file"),
        ("absent.png", "missing file"),
        ("images", "missing file"),
        ("a%00.png", "missing file"),
        ("x" * 5000, "missing file"),
        ("", "missing file"),
        ("data:image/png", "missing file"),
        ("data:image/png;base64,A", "missing file"),
        ("data:image/svg+xml,%3Csvg/%3E", "bad image"),
        ("page.html", "bad image"),
    ],
)
def test_links_out_of_the_folder_are_not_followed(folder, run, link, why):
    (folder / "linked.png").symlink_to(folder.parent / "secret.png")
    (folder / "page.html").write_text(f'before<img src="{link}">after')
    found = run("html", folder)
    assert found.brief() == [["before\n\nafter"]]
    assert found.result["part_reasons"] == {why: 1}


def test_a_page_that_is_a_link_out_of_the_folder_is_left_out(folder, run):
    (folder.parent / "secret.html").write_text("secret")
    (folder / "page.html").symlink_to(folder.parent / "secret.html")
    assert run("html", folder).result["reasons"] == {"outside": 1}


def test_inline_pictures_films_and_sounds_are_read(folder, run, picture, sound):
    (folder / "s.wav").write_bytes(sound())
    inline = base64.b64encode(picture(5)).decode()
    page = f"""<img src="data:image/png;base64,{inline}">
        <audio controls><source src="s.wav"><source src="s.ogg">old browser</audio>
        <picture><source srcset="x.webp"><img src="a.png"></picture><video></video>"""
    (folder / "page.html").write_text(page)
    found = run("html", folder)
    assert found.brief() == [[5, "Audio", "old browser", 1]]
    assert found.lines == []


def test_pages_name_their_charset_or_are_left_out(folder, run):
    (folder / "a.html").write_bytes('<meta charset="latin-1">\xe9'.encode("latin-1"))
    (folder / "b.html").write_bytes(b"\xe9")
    (folder / "c.html").write_bytes(b'<meta charset="zip">\xe9')
    (folder / "d.html").write_bytes(b'<meta charset="no-such">\xe9')
    (folder / "e.html").write_bytes(b"<![if x]>\xc3\xa9<![no")
    found = run("html", folder)
    assert found.brief()[0] == ["\xe9"]
    assert found.result["reasons"]["bad text"] == 3
