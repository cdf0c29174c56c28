"""Subtitles: SRT and WebVTT files as cues with times; what is malformed is counted, not fatal."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mmpt.config import UserError

CLOCK = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{2})[.,](\d{3})"
TIMES = re.compile(rf"\s*{CLOCK}\s*-->\s*{CLOCK}(?:\s.*)?")
TAG = re.compile(r"</?[A-Za-z][^<>\n]*>|<\d[\d:.]*>|\{\\[^{}\n]*\}")  # HTML, times, SSA
NOT_CUES = ("NOTE", "STYLE", "REGION")


@dataclass(frozen=True)
class Cue:
    """What is said from start to end, both in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Subtitles:
    """Cues in the order of time, none over another; and what is wrong with the others."""

    cues: tuple[Cue, ...]
    malformed: tuple[str, ...]


def parse(text: str) -> Subtitles:
    """The cues of SRT or WebVTT; raises UserError when there is none at all.

    A cue that begins before the one before it has ended is joined with it.
    """
    cues, malformed = [], []
    for number, block in enumerate(_blocks(text)):
        try:
            if cue := _parse_block(block):
                cues.append(cue)
        except UserError as error:
            malformed.append(f"malformed cue: block {number + 1}: {error}")
    if not cues:
        raise UserError(f"no cues: none in the subtitles, {len(malformed)} malformed")
    return Subtitles(tuple(_join(sorted(cues, key=lambda cue: cue.start))), tuple(malformed))


def _blocks(text: str) -> Iterator[list[str]]:
    """Lines between empty lines; a header and comments are no cues."""
    lines: list[str] = []
    for line in [*text.removeprefix("\ufeff").splitlines(), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            first = lines[0].split()[0]
            if not (first in NOT_CUES or (first == "WEBVTT" and "-->" not in "".join(lines))):
                yield lines
            lines = []


def _parse_block(lines: list[str]) -> Cue | None:
    """A cue: perhaps a name, the times, the text; None for one that says nothing."""
    place = next((n for n, line in enumerate(lines[:3]) if "-->" in line), None)
    if place is None:
        raise UserError(f"no times in {lines[0][:80]!r}")
    times = TIMES.fullmatch(lines[place])
    if times is None:
        raise UserError(f"bad times {lines[place][:80]!r}")
    start, end = _seconds(times.groups()[:4]), _seconds(times.groups()[4:])
    if end <= start:
        raise UserError(f"it ends at {end} s, before its start at {start} s")
    text = html.unescape(TAG.sub("", " ".join(lines[place + 1 :])))
    words = " ".join(text.split())
    return Cue(start, end, words) if words else None


def _seconds(clock: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, thousandths = (int(value or 0) for value in clock)
    return ((hours * 60 + minutes) * 60 + seconds) + thousandths / 1000


def _join(cues: list[Cue]) -> Iterator[Cue]:
    last = cues[0]
    for cue in cues[1:]:
        if cue.start < last.end:
            last = Cue(last.start, max(last.end, cue.end), f"{last.text} {cue.text}")
        else:
            yield last
            last = cue
    yield last
