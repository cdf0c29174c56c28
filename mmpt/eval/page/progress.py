"""What evaluations during training say, over its steps: held-out losses, early signals, probes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmpt.eval.runs import Run
from mmpt.page.curves import Curve, line_panel, run_hue
from mmpt.page.frame import Frame
from mmpt.page.markup import MODALITIES, chip, escape, finite, hue, number, table, tag


def heldout(runs: Sequence[Run]) -> str:
    """Held-out nats per id by medium over training, where they were lowest, and by source."""
    media = [m for m in MODALITIES if any(_series(run, "loss", m, "nats")[0].size for run in runs)]
    if not media:
        return ""
    frame = Frame(last=0, low=0, high=0, left=46)
    panels = [
        tag(
            "figure",
            tag("figcaption", chip(medium)),
            line_panel(
                f"held-out {medium}",
                [
                    Curve(
                        run.name,
                        run_hue(index) if len(runs) > 1 else hue(medium),
                        *_series(run, "loss", medium, "nats"),
                        dotted=True,
                    )
                    for index, run in enumerate(runs)
                ],
                frame,
            ),
            class_="chart",
        )
        for medium in media
    ]
    text = (
        "Nats per id on documents that training never sees; the media of a document in turn last."
    )
    return (
        tag("p", text, class_="prose")
        + tag("div", *panels, class_="panels")
        + tag("h3", "where it was lowest")
        + _lowest(runs, media)
        + tag("h3", "by source, at the last evaluation")
        + _by_source(runs, media)
    )


def signals(runs: Sequence[Run]) -> str:
    """How often the right one of several is the likeliest, and what hidden states tell."""
    panels = []
    for kind in ("choices", "probes"):
        names = dict.fromkeys(
            name for run in runs for row in run.evaluations for name in _table(row.get(kind))
        )
        panels += [_shares_panel(runs, kind, name) for name in names]
    if not any(panels):
        return ""
    text = (
        "Shares of right answers with their 95% intervals; the dashed line is chance. Choices: of "
        "several held-out documents, the one to which a given part belongs has the highest "
        "likelihood (prior removed: beside its mean over the given parts). Probes: a linear "
        "classifier on the hidden states of a middle layer, chance being the commonest class. An "
        "untrained model may lie somewhat off chance: what counts is the rise."
    )
    return tag("p", text, class_="prose") + tag("div", *panels, class_="panels")


def _shares_panel(runs: Sequence[Run], kind: str, name: str) -> str:
    curves, chances = [], []
    for index, run in enumerate(runs):
        xs, ys = _series(run, kind, name, "right")
        low, high = (_series(run, kind, name, side)[1] for side in ("low", "high"))
        if len(xs) and len(xs) == len(low) == len(high):
            curves.append(Curve(run.name, run_hue(index), xs, ys, None, low, high, dotted=True))
        chances += list(_series(run, kind, name, "chance")[1][-1:])
    chance = float(chances[0]) if chances else None
    frame = Frame(last=0, low=0, high=0, y_unit="right", left=46)
    chart = line_panel(name, curves, frame, reference=chance)
    title = escape(name) if kind == "choices" else f"probe: {escape(name)}"
    return tag("figure", tag("figcaption", title), chart, class_="chart") if chart else ""


def _lowest(runs: Sequence[Run], media: Sequence[str]) -> str:
    """Beyond that step a run learns by heart what it reads."""
    rows = []
    for index, run in enumerate(runs):
        for medium in media:
            steps, nats = _series(run, "loss", medium, "nats")
            if nats.size:
                best = int(nats.argmin())
                who = chip(run.name, run_hue(index)) if len(runs) > 1 else ""
                step, low, last = number(int(steps[best])), nats[best], nats[-1]
                rows.append(
                    [f"{who} {medium}", step, number(float(low), 3), number(float(last), 3)]
                )
    columns = ["", "step", "nats there", "nats at the end"]
    return table(columns, rows, label="Lowest held-out nats")


def _by_source(runs: Sequence[Run], media: Sequence[str]) -> str:
    rows = []
    for index, run in enumerate(runs):
        last = run.evaluations[-1] if run.evaluations else {}
        for source, losses in _table(last.get("sources")).items():
            cells = [number(_table(_table(losses).get(m)).get("nats"), 3) for m in media]
            who = chip(run.name, run_hue(index)) if len(runs) > 1 else ""
            rows.append([f"{who} {escape(source)}", number(int(last["step"])), *cells])
    return table(["", "step", *media], rows, label="Held-out nats by source")


def _series(run: Run, kind: str, name: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of what was measured."""
    pairs = [
        (float(row["step"]), finite(_table(_table(row.get(kind)).get(name)).get(key)))
        for row in run.evaluations
    ]
    kept = [(step, value) for step, value in pairs if value is not None]
    steps, values = zip(*kept, strict=True) if kept else ((), ())
    return np.array(steps, float), np.array(values, float)


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
