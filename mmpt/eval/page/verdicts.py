"""Judgements on a held-out likelihood: better or not, in words and signs, never by colour alone.

A row has nats per id of the model (`nats`), of `unigram_nats` and `baseline_nats`, and the interval
`shuffled_minus_right`; any of them may be missing, and then nothing is claimed.
"""

import math
from collections.abc import Mapping
from typing import Any

from mmpt.page.markup import DASH, chip, escape, finite, number, tag

Row = Mapping[str, Any]


def plain_words(name: str, row: Row) -> str:
    """What the numbers of one modality mean, as a list item."""
    ours, unigram, baseline = (
        finite(row.get(key)) for key in ("nats", "unigram_nats", "baseline_nats")
    )
    if ours is None:
        return tag("li", chip(name), tag("p", "Not measured."))
    text = []
    if unigram is not None:
        text.append(
            f"The right id gets {_times(unigram - ours)} the probability that its frequency "
            "alone gives it."
        )
    if baseline is not None:
        verb = "Better than" if ours < baseline else tag("b", "Not better") + " than"
        text.append(
            f"{verb} the baseline ({escape(row.get('baseline') or 'unnamed')}): {number(ours)} "
            f"against {number(baseline)} nats."
        )
    if not text:
        text.append(f"{number(ours)} nats per id; nothing was measured beside it.")
    text.append(_about_condition(bounds(row)))
    bad = beats(row, "baseline_nats") is False or beats(row, "unigram_nats") is False
    return tag("li", chip(name), tag("p", " ".join(text)), class_="bad" if bad else None)


def ratio(value: object, to: object) -> float | None:
    """A quotient; None when either is unknown."""
    above, below = finite(value), finite(to)
    return above / below if above is not None and below else None


def beats(row: Row, key: str) -> bool | None:
    """Whether the model is strictly better than `row[key]`; None when either is unknown."""
    ours, other = finite(row.get("nats")), finite(row.get(key))
    return ours < other if ours is not None and other is not None else None


def bounds(row: Row) -> tuple[float, float, float] | None:
    """(low, mean, high) of what another document's condition costs."""
    values = [finite(value) for value in row.get("shuffled_minus_right") or ()]
    known = [value for value in values if value is not None]
    return (known[0], known[1], known[2]) if len(values) == len(known) == 3 else None


def verdict(won: bool | None, *, yes: str, no: str) -> str:
    """A judgement in words and a sign, never by colour alone."""
    if won is None:
        return tag("span", DASH, class_="verdict")
    mark, text = ("&#10003;", yes) if won else ("&#10007;", no)
    return tag("span", f"{mark} {text}", class_="verdict good" if won else "verdict bad")


def _times(nats: float) -> str:
    ratio = math.exp(min(abs(nats), 50))
    shown = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2f}" if ratio < 1.095 else f"{ratio:.1f}"
    return f"{shown} times" if nats >= 0 else f"only 1/{shown} of"


def _about_condition(interval: tuple[float, float, float] | None) -> str:
    if interval is None:
        return ""
    low, mean, high = interval
    shown = f"({number(low, 3)} to {number(high, 3)})"
    if low > 0:
        return f"The right condition saves {number(mean, 3)} nats per id {shown}."
    if high < 0:
        return (
            f"The right condition makes it <b>worse</b> by {number(-mean, 3)} nats per id {shown}."
        )
    return f"No sure effect of the condition: {number(mean, 3)} nats per id {shown}."
