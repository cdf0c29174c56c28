"""Charts of a quantity over the steps of several runs, for pages on training runs."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mmpt.eval.runs import Run, Window
from mmpt.page.curves import Curve, known, line_panel, run_hue, smooth
from mmpt.page.frame import Frame
from mmpt.page.markup import chip, tag


def style() -> str:
    """The style sheet that pages on runs have beside the one of all pages."""
    return Path(__file__).with_name("runs.css").read_text("utf-8")


def run_chip(run: Run, index: int) -> str:
    """The name of the n-th run behind its colour."""
    return chip(run.name, run_hue(index))


def heading(run: Run, runs: Sequence[Run]) -> str:
    """The name of one of several runs."""
    return tag("h3", run_chip(run, list(runs).index(run))) if len(runs) > 1 else ""


def figure(title: str, chart: str) -> str:
    """A chart under its title; nothing where there is no chart."""
    return tag("figure", tag("figcaption", title), chart, class_="chart") if chart else ""


def most_points(runs: Sequence[Run]) -> int:
    """Of one line, so that the page of many runs stays small."""
    return max(600 // max(len(runs) // 3, 1), 60)


def step_curves(
    runs: Sequence[Run], columns: Sequence[np.ndarray], *, faint: bool = False
) -> list[Curve]:
    """A column of each run over its steps."""
    out = []
    for index, (run, ys) in enumerate(zip(runs, columns, strict=True)):
        here = known(run.get("step"), ys)
        if here.any():
            xs, ys = run.get("step")[here], ys[here]
            mean = smooth(ys, share=0.01) if faint else ys
            out.append(Curve(run.name, run_hue(index), xs, mean, ys if faint else None))
    return out


def step_panel(
    runs: Sequence[Run], title: str, column: str, frame: Frame, *, faint: bool = False
) -> str:
    """The curves of a column in a frame."""
    columns = [run.get(column) for run in runs]
    if frame.log_y:
        columns = [np.where(values > 0, values, math.nan) for values in columns]
    curves = step_curves(runs, columns, faint=faint)
    return figure(title, line_panel(title, curves, frame, points=most_points(runs)))


def window_panel(
    runs: Sequence[Run], title: str, frame: Frame, value: Callable[[Window], float]
) -> str:
    """A value of each window of each run over the steps."""
    curves = []
    for index, run in enumerate(runs):
        xs = np.array([window.step for window in run.windows])
        ys = np.array([value(window) for window in run.windows])
        here = known(xs, ys)
        curves.append(Curve(run.name, run_hue(index), xs[here], ys[here]))
    return figure(title, line_panel(title, curves, frame))
