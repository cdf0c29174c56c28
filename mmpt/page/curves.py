"""Lines of several runs in one frame, as inline SVG."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmpt.page.frame import Frame, compact, padded
from mmpt.page.markup import chip, tag

MAX_POINTS = 600  # of one drawn line
NUM_HUES = 8  # of the style sheet; from there on they come again, dashed


@dataclass(frozen=True)
class Curve:
    """A line. x ascends; xs and ys (N,) are finite. low, high: (N,) of a band around it."""

    name: str
    hue: str  # a class that sets the colour
    xs: np.ndarray
    ys: np.ndarray
    faint: np.ndarray | None = None  # (N,) as measured, where ys are smoothed
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    dotted: bool = False  # marks its points: there are few


def run_hue(number: int) -> str:
    """The class of the colour of the n-th run or source."""
    return f"r-{number % NUM_HUES}" + (" dashed" if number >= NUM_HUES else "")


def known(xs: Sequence[float] | np.ndarray, ys: Sequence[float] | np.ndarray) -> np.ndarray:
    """bool (N,): where both are finite."""
    return np.isfinite(np.asarray(xs, float)) & np.isfinite(np.asarray(ys, float))


def thin(values: np.ndarray, points: int = MAX_POINTS) -> np.ndarray:
    """Places of at most `points` values: the least and the largest of every stretch, and the ends.

    So a spike of one step is drawn however long the run is.
    """
    count = len(values)
    if count <= points:
        return np.arange(count)
    edges = np.linspace(0, count, (points - 2) // 2 + 1).round().astype(int)
    kept = [0, count - 1]
    for begin, end in itertools.pairwise(edges):
        stretch = values[begin:end]
        kept += [begin + int(stretch.argmin()), begin + int(stretch.argmax())]
    return np.unique(kept)


def smooth(
    values: np.ndarray, weights: np.ndarray | None = None, share: float = 0.02
) -> np.ndarray:
    """The mean of the values (N,) around each, over a share of all to both sides, by weight."""
    weights = np.ones(len(values)) if weights is None else np.maximum(weights, 1e-9)
    half = max(int(len(values) * share), 1)
    total = np.concatenate([[0.0], np.cumsum(values * weights)])
    count = np.concatenate([[0.0], np.cumsum(weights)])
    index = np.arange(len(values))
    a, b = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[b] - total[a]) / (count[b] - count[a])


def line_panel(
    title: str,
    curves: Sequence[Curve],
    frame: Frame | None = None,
    *,
    reference: float | None = None,
    points: int = MAX_POINTS,
    values: int | None = None,
) -> str:
    """Curves in a frame that fits them; `frame` gives units and kinds of axes.

    reference: the value of a dashed horizontal line. points: most of one line.
    values: how many curves, the first ones, have their last value written beside them; all.
    """
    curves = [curve for curve in curves if len(curve.xs)]
    if not curves:
        return ""
    frame = _fit(frame or Frame(last=0, low=0, high=0), curves, reference)
    words = "; ".join(f"{each.name} {compact(float(each.ys[-1]))}" for each in curves)
    drawn = [tag("g", *_drawn(each, frame, points), class_=each.hue) for each in curves]
    if reference is not None:
        y = f"{frame.y(reference):.1f}"
        ends = {"x1": frame.left, "x2": frame.width - frame.right, "y1": y, "y2": y}
        drawn.insert(0, tag("line", **ends, class_="reference"))
    return tag(
        "svg",
        *frame.axes(),
        *drawn,
        *_end_values(curves[:values], frame),
        viewBox=f"0 0 {frame.width} {frame.height}",
        role="img",
        aria_label=f"{title}, at the end: {words}",
        class_="panel",
    )


def stacked_panel(
    title: str, xs: np.ndarray, parts: dict[str, np.ndarray], hues: Sequence[str], frame: Frame
) -> str:
    """Shares of a whole over x: parts (N,) that sum to 1, one band each, first at the bottom."""
    frame = replace(frame, first=float(xs[0]), last=float(xs[-1]), low=0.0, high=1.0)
    bands, below = [], np.zeros(len(xs))
    for values, hue in zip(parts.values(), hues, strict=True):
        above = np.minimum(below + values, 1.0)
        bands.append(tag("path", d=frame.area(xs, below, above), class_=f"fill {hue}"))
        below = above
    words = ", ".join(f"{name} {100 * values[-1]:.0f}%" for name, values in parts.items())
    return tag(
        "svg",
        *frame.axes(),
        *bands,
        viewBox=f"0 0 {frame.width} {frame.height}",
        role="img",
        aria_label=f"{title}, at the end: {words}",
        class_="panel bands",
    )


def hue_legend(names: Sequence[str], hues: Sequence[str] | None = None) -> str:
    """What the colours mean; those of runs unless given."""
    hues = hues or [run_hue(number) for number in range(len(names))]
    items = [tag("li", chip(name, hue)) for name, hue in zip(names, hues, strict=True)]
    return tag("ul", *items, class_="legend")


def _fit(frame: Frame, curves: Sequence[Curve], reference: float | None) -> Frame:
    ends = [*(float(each.xs[0]) for each in curves), *(float(each.xs[-1]) for each in curves)]
    shown = [each.ys for each in curves]
    shown += [side for each in curves for side in (each.low, each.high) if side is not None]
    if reference is not None:
        shown.append(np.array([reference]))
    low = min(float(values.min()) for values in shown)
    high = max(float(values.max()) for values in shown)
    # of what is drawn faintly, rare outliers may leave the frame
    high = max(
        [high, *(float(np.percentile(c.faint, 99.5)) for c in curves if c.faint is not None)]
    )
    if frame.log_y:
        low, high = max(low, 1e-12) / 1.1, max(high, 1e-12) * 1.1
    else:
        low, high = padded(low, high)
    first, last = min(ends) if frame.log_x else 0.0, max(ends)
    return replace(frame, first=first, last=last, low=low, high=high)


def _drawn(curve: Curve, frame: Frame, points: int) -> list[str]:
    out = []
    if curve.low is not None and curve.high is not None and len(curve.xs) > 1:
        out.append(tag("path", d=frame.area(curve.xs, curve.low, curve.high), class_="band"))
    if curve.faint is not None:
        keep = thin(curve.faint, points)
        out.append(tag("path", d=frame.path(curve.xs[keep], curve.faint[keep]), class_="raw"))
    keep = thin(curve.ys, points if curve.faint is None else points // 2)
    xs, ys = curve.xs[keep], curve.ys[keep]
    out.append(tag("path", d=frame.path(xs, ys), class_="line"))
    if curve.dotted or len(xs) == 1:
        dots = zip(xs, ys, strict=True)
        out += [
            tag("circle", cx=f"{frame.x(x):.1f}", cy=f"{frame.y(y):.1f}", r=2.6) for x, y in dots
        ]
    return out


def _end_values(curves: Sequence[Curve], frame: Frame) -> list[str]:
    """The last value of each curve that reaches the right end, unless another one is there."""
    out: list[str] = []
    taken: list[float] = []
    for curve in curves:
        value = float(curve.ys[-1])
        y = frame.y(value)
        there = frame.x(float(curve.xs[-1])) > 0.95 * (frame.width - frame.right)
        if there and all(abs(y - other) >= 12 for other in taken):
            taken.append(y)
            place = frame.beside(value)
            value_text = tag("text", compact(value), **place, class_="value start")
            out.append(tag("g", value_text, class_=curve.hue))
    return out
