"""SRT and WebVTT: cues with times; what is malformed is counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpt.config import UserError
from mmpt.data.formats.subtitles import Cue, parse

SRT = """\ufeff1\r
00:00:01,000 --> 00:00:02,500\r
Hello <i>there</i>.\r
\r
2\r
00:01:02,000 --> 01:00:00,001  X1:1 X2:2\r
{\\an8}Two\r
lines\r
"""
VTT = """WEBVTT - a title
Kind: captions

STYLE
::cue { color: red }

NOTE 00:00 --> is no cue

name
00:01.000 --> 00:02.500 align:start position:0%
<v Ann>Hello <00:00:01.500><c.red>there</c>.</v> 1 &lt; 2

01:02.000 --> 1:00:00.001
Two
lines
"""


def test_both_formats_give_cues_without_markup():
    last = Cue(62.0, 3600.001, "Two lines")
    assert parse(SRT).cues == (Cue(1.0, 2.5, "Hello there."), last)
    assert parse(VTT).cues == (Cue(1.0, 2.5, "Hello there. 1 < 2"), last)
    assert parse(SRT).malformed == parse(VTT).malformed == ()


def test_cues_are_sorted_and_those_that_overlap_are_joined():
    text = "00:05.000 --> 00:06.000\nc\n\n00:01.000 --> 00:03.000\na\n\n00:02.000 --> 00:02.500\nb"
    assert parse(text).cues == (Cue(1.0, 3.0, "a b"), Cue(5.0, 6.0, "c"))


@pytest.mark.parametrize(
    "block",
    [
        "just text",
        "3\nno times",
        "00:01 --> 00:02\nx",
        "00:00:05,000 --> 00:00:04,000\nx",
        "00:00:05,000 --> 00:00:05,000\nx",
        "aa:bb:cc,ddd --> 00:00:04,000\nx",
        "00:00:01,000 -> 00:00:04,000\nx",
        "00:00:01,000 --> \nx",
    ],
)
def test_a_malformed_cue_is_counted_and_the_others_are_kept(block):
    found = parse(f"{block}\n\n00:00:01,000 --> 00:00:02,000\ngood\n")
    assert found.cues == (Cue(1.0, 2.0, "good"),)
    [why] = found.malformed
    assert why.startswith("malformed cue: block 1")


def test_a_cue_without_words_says_nothing():
    text = "00:01.000 --> 00:02.000\n<i> </i>\n\n00:03.000 --> 00:04.000\nx"
    assert len(parse(text).cues) == 1


@pytest.mark.parametrize("text", ["", "WEBVTT", "prose\n\nmore prose"])
def test_subtitles_without_any_cue_are_refused(text):
    with pytest.raises(UserError, match="no cues"):
        parse(text)


@given(st.text(alphabet="0123456789:,.-> <\n{}ab&;WEBVTT", max_size=200))
def test_any_text_gives_ordered_cues_or_one_line(text):
    try:
        cues = parse(text).cues
    except UserError:
        return
    ends = [time for cue in cues for time in (cue.start, cue.end)]
    assert ends == sorted(ends)
    assert all(cue.text and cue.start < cue.end for cue in cues)
