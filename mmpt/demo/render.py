"""A conversation as HTML: turns, parts that stand in the page itself, and what can be done to them.

All that anyone wrote is escaped. Buttons name what they are about (`data-act`, `data-part`); the
page's script hands that to the server.
"""

from collections.abc import Sequence

from mmpt.demo.conversation import Answer, Turn
from mmpt.page.cells import render_part
from mmpt.page.markup import escape, number, tag
from mmpt.parts import Audio, Image, Part, Text, Video

DECODERS = {"ar": "one id at a time", "dida": "in parallel"}
KINDS = {Text: "text", Image: "image", Video: "video", Audio: "speech"}
WAIT = {
    None: "Thinking",
    "text": "Writing",
    "image": "Drawing",
    "video": "Filming",
    "speech": "Speaking",
}


def render_turns(turns: Sequence[Turn]) -> str:
    """Turns, oldest first."""
    return "".join(map(render_turn, turns))


def render_turn(turn: Turn) -> str:
    """What was asked, and what was answered so far."""
    place = f"{turn.number}.-1"
    asked = [_part(turn, part, f"{place}.{n}", "you") for n, part in enumerate(turn.asked)]
    if turn.edit is not None:
        asked.append(tag("p", "A region is made anew", class_="aside"))
    answers = [_answer(turn, n, answer) for n, answer in enumerate(turn.answers)]
    both = "answers both" if len(answers) > 1 else "answers"
    return tag(
        "article",
        tag("div", *asked, class_="asked", role="group", aria_label="You"),
        tag("div", *answers, class_=both),
        class_="turn",
    )


def render_error(message: str) -> str:
    """A sentence that says what was wrong."""
    return tag("p", escape(message), class_="problem", role="alert")


def _answer(turn: Turn, index: int, answer: Answer) -> str:
    place = f"{turn.number}.{index}"
    made = enumerate(answer.parts)
    parts = [_part(turn, part, f"{place}.{n}", "the model") for n, part in made]
    if not answer.done:
        parts.append(_live(answer))
    if answer.note == "stopped":
        parts.append(tag("p", "Stopped", class_="aside"))
    elif answer.note:
        parts.append(render_error(answer.note))
    return tag(
        "section",
        tag("div", *parts, class_="parts"),
        _times(turn, answer, place),
        class_="answer done" if answer.done else "answer busy",
        aria_label=f"The model, {DECODERS[answer.decoder]}",
    )


def _live(answer: Answer) -> str:
    """The part that is being made, as far as it is."""
    done, total = answer.progress
    waiting = f"{WAIT[answer.medium]} {done} of {total}" if total else WAIT[answer.medium]
    bar = tag("progress", value=done, max=total, aria_label="passes") if total else ""
    if answer.live is None:
        frame = "blank" if answer.medium in ("image", "video") else ""
        box = tag("div", class_=f"shimmer {frame}") if frame else ""
        return tag("div", box, tag("p", waiting, class_="aside pulse"), class_="part live")
    shown = render_part(answer.live, "the answer so far")
    words = "" if answer.medium == "text" else tag("p", waiting, class_="aside pulse")
    kind = KINDS[type(answer.live)]
    return tag("div", shown, bar, words, class_=f"part live {kind}")


def _part(turn: Turn, part: Part, place: str, whose: str) -> str:
    """A finished part, of which nothing changes any more: clips take long to pack."""
    if place not in turn.html:
        turn.html[place] = _finished(part, place, whose)
    return turn.html[place]


def _finished(part: Part, place: str, whose: str) -> str:
    if isinstance(part, Text) and not part.text:
        return tag("p", "(no words)", class_="aside")
    shown = render_part(part, f"from {whose}")
    kind, redo = KINDS[type(part)], ""
    if not isinstance(part, Text):
        redo = _button("redo", place, "Edit", f"make a region of this {kind} anew")
    return tag("div", shown, redo, class_=f"part {kind}")


def _times(turn: Turn, answer: Answer, place: str) -> str:
    words = [DECODERS[answer.decoder]]
    if answer.seconds:
        words.append(f"{number(answer.seconds, 2)} s")
    if answer.first and answer.done:
        words.append(f"first after {number(answer.first, 2)} s")
    words.append(f"seed {turn.seed}")
    shown = [tag("span", each) for each in words]
    if answer.result is not None:
        shown.append(_button("inspect", place, "Inspect", "show the ids of this answer"))
    return tag("footer", *shown)


def _button(act: str, place: str, label: str, title: str) -> str:
    return tag("button", label, type="button", data_act=act, data_part=place, title=title)
