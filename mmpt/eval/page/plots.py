"""Charts as inline SVG: likelihood beside baselines, intervals, losses over steps.

Horizontal positions are percentages where a chart must fit a phone and a desk alike: shapes move,
text keeps its size. A modality has one colour everywhere (class c-text and so on); the page's style
sheet holds the hues, which stay apart (20 in CIELAB) for every colour blindness in both themes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmpt.page.curves import smooth
from mmpt.page.frame import Frame, padded, text_at, ticks
from mmpt.page.markup import DASH, escape, finite, hue, number, percent, tag

MAX_POINTS = 240  # of one drawn line
DIAMOND = "M0-6L6 0L0 6L-6 0Z"

Points = Sequence[tuple[float, float, float]]  # step, value, weight


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """One row of the likelihood chart; all but the name in nats per id."""

    name: str
    ours: float | None
    unigram: float | None
    baseline: float | None
    shuffled: float | None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A horizontal line of the loss chart."""

    name: str
    value: float


def likelihood_chart(rows: Sequence[Likelihood]) -> str:
    """Nats as a share of the unigram's, which is the line at 1: further left is better."""
    shares = [_shares(row) for row in rows]
    known = [value for row in shares for value in row.values() if value is not None]
    top = max([1.0, *known]) * 1.06
    bottom, height = 26, 70
    full = bottom + height * len(rows) + 26
    axis = [
        _guide(_at(value, top), bottom - 4, full - 24, "grid")
        + text_at(_at(value, top), full - 8, percent(value), class_="tick")
        for value in ticks(0, top, 6)
    ]
    head = text_at(_at(1, top), 14, "unigram", class_="tick strong")
    head += _guide(_at(1, top), bottom - 4, full - 24, "unigram")
    drawn = [
        _likelihood_row(row, values, top, bottom + i * height)
        for i, (row, values) in enumerate(zip(rows, shares, strict=True))
    ]
    words = ", ".join(
        f"{row.name} {percent(values['ours'])}" for row, values in zip(rows, shares, strict=True)
    ).replace(DASH, "unknown")
    words = f"Held-out nats per id as a share of the unigram's: {words}"
    return _svg(full, words, *axis, head, *drawn)


def interval_chart(rows: Mapping[str, tuple[float, float, float]]) -> str:
    """Differences (low, mean, high) in nats around a line at 0."""
    values = [0.0, *(value for row in rows.values() for value in row)]
    low, high = min(values), max(values)
    pad = (high - low or 1.0) * 0.08
    low, high = low - pad, high + pad
    height, bottom = 56, 8
    full = bottom + height * len(rows) + 26
    axis = [
        _guide(_at(value - low, high - low), bottom, full - 24, "unigram" if value == 0 else "grid")
        + text_at(_at(value - low, high - low), full - 8, number(value, 2), class_="tick")
        for value in ticks(low, high, 6)
    ]
    drawn = []
    for index, (name, (left, mean, right)) in enumerate(rows.items()):
        y = bottom + index * height + 30
        a, m, b = (_at(value - low, high - low) for value in (left, mean, right))
        drawn.append(
            tag(
                "g",
                _rail(y),
                tag("text", escape(name), x="0", y=y - 12, class_="name"),
                tag("line", x1=a, x2=b, y1=y, y2=y, class_="range"),
                tag("circle", cx=m, cy=y, r=5.5, class_="ours"),
                text_at(m, y + 20, number(mean, 3), class_="value"),
                class_=hue(name),
            )
        )
    words = ", ".join(f"{name} {mean:+.3f}" for name, (_, mean, _) in rows.items())
    return _svg(full, f"Nats that another document's condition costs: {words}", *axis, *drawn)


def loss_panel(name: str, points: Points, references: Sequence[Reference] = ()) -> str:
    """Loss over steps: every step faint, their moving mean strong, references dashed."""
    steps, values, mean = _moving_mean(points)
    marks = [each.value for each in references]
    low, high = padded(
        min([float(mean.min()), *marks]),
        max([float(np.percentile(values, 99.5)), float(mean.max()), *marks]),
    )
    frame = Frame(last=float(steps[-1]), low=low, high=high)
    lines = [
        tag("path", d=frame.path(steps, values), class_="raw"),
        tag("path", d=frame.path(steps, mean), class_="line"),
        tag("text", number(mean[-1]), **frame.beside(float(mean[-1])), class_="value start"),
    ]
    label = f"{name}: loss from {mean[0]:.2f} to {mean[-1]:.2f} nats per id"
    label += "".join(f"; {each.name} {each.value:.2f}" for each in references)
    recent = [frame.y(value) for value in mean[-len(mean) // 3 :]]
    return tag(
        "svg",
        *frame.axes(),
        tag("g", *lines, class_=hue(name)),
        *_reference_lines(references, frame, recent),
        viewBox=f"0 0 {frame.width} {frame.height}",
        role="img",
        aria_label=label,
        class_="panel",
    )


def _shares(row: Likelihood) -> dict[str, float | None]:
    unigram = finite(row.unigram)
    values = {"ours": row.ours, "baseline": row.baseline, "shuffled": row.shuffled}
    return {
        key: known / unigram if (known := finite(value)) is not None and unigram else None
        for key, value in values.items()
    }


def _likelihood_row(
    row: Likelihood, values: Mapping[str, float | None], top: float, offset: float
) -> str:
    y = offset + 42
    out = [
        _rail(y),
        tag("text", escape(row.name), x="0", y=offset + 16, class_="name"),
    ]
    ours, baseline, shuffled = values["ours"], values["baseline"], values["shuffled"]
    if ours is None:
        return tag(
            "g", *out, text_at("50%", y + 4, "not measured", class_="tick"), class_=hue(row.name)
        )
    if baseline is not None:
        out.append(
            tag("line", x1=_at(ours, top), x2=_at(baseline, top), y1=y, y2=y, class_="range")
        )
        out.append(_mark(_at(baseline, top), y, tag("path", d=DIAMOND, class_="baseline")))
        out.append(_label(baseline / top, y + 21, percent(baseline), "tick"))
    if shuffled is not None:
        out.append(tag("circle", cx=_at(shuffled, top), cy=y, r=6, class_="shuffled"))
    out.append(tag("circle", cx=_at(ours, top), cy=y, r=6.5, class_="ours"))
    out.append(_label(ours / top, y - 12, percent(ours), "value"))
    return tag("g", *out, class_=hue(row.name))


def _svg(height: float, label: str, *children: str) -> str:
    return tag("svg", *children, height=height, role="img", aria_label=label, class_="fluid")


def _at(value: float, top: float) -> str:
    """A position in percent; both ends stay clear of the edge."""
    return f"{2 + 95 * value / top:.2f}%"


def _label(share: float, y: float, text: str, class_: str) -> str:
    side = " start" if share < 0.06 else " end" if share > 0.96 else ""
    return text_at(_at(share, 1), y, text, class_=class_ + side)


def _guide(x: str, y1: float, y2: float, class_: str) -> str:
    return tag("line", x1=x, x2=x, y1=y1, y2=y2, class_=class_)


def _rail(y: float) -> str:
    return tag("line", x1="2%", x2="97%", y1=y, y2=y, class_="rail")


def _mark(x: str, y: float, shape: str) -> str:
    return tag("svg", shape, x=x, y=y, class_="mark")


def _moving_mean(points: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, values, and their mean over a 4% window weighted by ids, thinned for drawing."""
    data = np.array(points, dtype=float)
    steps, values, weights = data.T
    mean = smooth(values, weights)
    keep = np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int))
    return steps[keep], values[keep], mean[keep]


def _reference_lines(
    references: Sequence[Reference], frame: Frame, curve: Sequence[float]
) -> list[str]:
    """Dashed lines, each with its name on the side where less is in the way."""
    out, right = [], frame.width - frame.right
    taken = [*curve, *(frame.y(each.value) for each in references for _ in curve)]
    for each in references:
        y = frame.y(each.value)
        above, below = (sum(abs(other - y - side) < 8 for other in taken) for side in (-9, 9))
        middle = y - 9 if above <= below else y + 9
        taken += [middle] * len(curve)
        out.append(
            tag("line", x1=frame.left, x2=right, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="reference")
            + tag(
                "text",
                f"{escape(each.name)} {each.value:.2f}",
                x=right,
                y=f"{middle + 4:.1f}",
                class_="tick end halo",
            )
        )
    return out
