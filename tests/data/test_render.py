"""A page of documents: everything in it, in order, and what a document says stays text."""

import base64
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mmpt.config import UserError
from mmpt.data.inspect import inspect
from mmpt.data.interleave import interleave
from mmpt.data.render import render_page, write_page
from mmpt.data.shards import Document, Record, write_shard
from mmpt.parts import Audio, Image, Text, Video
from mmpt.sound import sound_bytes

NASTY = '<script>alert("&amp;")</script> <img src=x onerror=alert(1)> </p>'


class Page(HTMLParser):
    """What a browser would make of a page: its elements, their addresses and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for key, value in attrs if key in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def make_document(key: str, text: str = "a cat") -> Document:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    sound = Audio(rng.uniform(-0.5, 0.5, 4000).astype(np.float32), 8000)
    parts = [Text(text), Image(frames[0]), Video(frames, 10.0), sound]
    times = (None, None, (0.0, 0.3), (1.25, 1.75))
    return Document(key, f"base {key}", "any", parts, "source", voices=("someone",), times=times)


def page_of(tmp_path: Path, *documents: Document | Record, count: int = 10) -> Page:
    write_shard(tmp_path / "a.tar", documents)
    write_page(tmp_path / "page.html", [tmp_path / "a.tar"], count)
    return Page((tmp_path / "page.html").read_text())


def test_a_page_shows_every_part_in_order(tmp_path):
    page = page_of(tmp_path, make_document("one"))
    shown = [tag for tag in page.tags if tag in ("img", "audio", "picture")]
    assert shown == ["img", "picture", "img", "img", "audio"]  # the last picture is a spectrogram
    kinds = [word for word in page.words if word in ("text", "image", "video", "speech")]
    assert kinds == ["text", "image", "video", "speech"]
    text = " ".join(page.words)
    for known in ("one", "base one", "a cat", "someone", "0.00 to 0.30 s", "1.25 to 1.75 s"):
        assert known in text


def test_a_page_holds_everything_in_itself(tmp_path):
    page = page_of(tmp_path, make_document("one"))
    starts = [source.partition(",")[0] for source in page.sources]
    assert sorted(set(starts)) == [
        f"data:{kind};base64" for kind in ("audio/wav", "image/png", "image/webp")
    ]
    sound = next(source for source in page.sources if source.startswith("data:audio"))
    back = Audio.load(base64.b64decode(sound.partition(",")[2]))
    whole = make_document("one").parts[3]
    assert isinstance(whole, Audio)
    assert np.allclose(back.wave, whole.wave, atol=1e-4)


def test_what_a_document_says_stays_text(tmp_path):
    record = Record(
        'a" onclick="x',
        "<b>base</b>",
        "any",
        (
            {"type": "text", "text": NASTY},
            {
                "type": "audio",
                "voice": "<i>who</i>",
                "text": NASTY,
                "lang": ["<u>"],
                "suffix": "wav",
                "data": sound_bytes(np.zeros(100, np.float32), 8000),
            },
        ),
        "<s>source",
        "<em>licence",
    )
    page = page_of(tmp_path, record)
    assert not {"script", "b", "u", "em", "s"} & set(page.tags)
    assert page.tags.count("img") == 1  # the spectrogram
    assert NASTY in page.words
    assert 'a" onclick="x' in page.words


def test_the_words_of_what_is_heard_stand_beside_it(tmp_path):
    sound = {
        "type": "audio",
        "suffix": "wav",
        "data": sound_bytes(np.zeros(9000, np.float32), 8000),
    }
    said = {"type": "text", "text": "red circle", "words": [[0, 0.4], [0.5, 1.0]]}
    write_shard(tmp_path / "a.tar", [Record("k", "k", "any", (said, sound), "", "")])
    interleave([str(tmp_path / "a.tar")], out=tmp_path / "b", template="speech-text-spans")
    write_page(tmp_path / "page.html", [tmp_path / "b" / "a.tar"], 1)
    page = Page((tmp_path / "page.html").read_text())
    assert page.tags.count("q") == 1
    assert {"red", "circle"} <= {word.strip() for word in page.words}
    assert "speech-text-spans" in " ".join(page.words)


def test_shards_take_turns(tmp_path):
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", [make_document(f"{name}{n}") for n in range(3)])
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    assert write_page(tmp_path / "page.html", paths, 3) == 3
    words = Page((tmp_path / "page.html").read_text()).words
    assert [word for word in words if word in ("a0", "b0", "a1", "b1")] == ["a0", "b0", "a1"]


def test_inspect_renders_beside_counting(tmp_path):
    write_shard(tmp_path / "a.tar", [make_document("one"), make_document("two")])
    report = inspect([tmp_path / "a.tar"], render=tmp_path / "page.html", documents=1)
    assert (report["documents"], report["page"]) == (2, str(tmp_path / "page.html"))
    assert Page((tmp_path / "page.html").read_text()).tags.count("article") == 1


def test_a_page_of_nothing_says_so():
    assert "No document can be read." in render_page([])


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_a_page_has_a_bound(tmp_path, count):
    with pytest.raises(UserError, match="a page holds 1 to 1000"):
        write_page(tmp_path / "page.html", [], count)
