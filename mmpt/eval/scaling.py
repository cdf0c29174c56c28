"""`mmpt scaling`: laws of the held-out loss over compute, fitted to finished runs of several sizes.

Compute is what a run trained with over all media: six operations for each active weight and id.
Runs that were stopped are left out: a loss before the learning rate has come down is of no law.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmpt.config import UserError, write_atomic
from mmpt.eval.page.panels import style
from mmpt.eval.powerlaw import Estimate, Law, fit_law, separable
from mmpt.eval.runs import Run, flops_per_id, read_runs, training_flops
from mmpt.page.curves import Curve, hue_legend, line_panel, run_hue
from mmpt.page.document import document
from mmpt.page.frame import Frame, compact
from mmpt.page.markup import DASH, MODALITIES, chip, escape, hue, number, percent, table, tag

LEAST = 4  # runs
NEXT = 4.0  # the next run, in compute of the largest
CHANCE = 0.05  # from this share of shuffled runs that fit as well, there is no law


@dataclass(frozen=True)
class Point:
    """A finished run, for one medium: active weights, its ids, all compute, held-out nats."""

    run: str
    weights: float
    ids: float
    flops: float
    nats: float


def scaling_command(
    runs: Sequence[str], *, out: Path = Path("scaling.html"), flops: float | None = None
) -> dict[str, Any]:
    """Fit the held-out loss of each medium as E + A C^-alpha to RUNS, and predict a larger run.

    RUNS are at least 4 folders of finished runs that were evaluated (evaluate.every in the recipe).
    Each number comes as [value, low, high], with its 95% interval. --flops: training compute of
    the run to predict; 4 times the largest unless given. With several numbers of weights and of
    ids, E + A N^-alpha + B D^-beta is fitted, too.
    """
    read = read_runs(runs)
    finished = [run for run in read if run.get("step")[-1] >= run.recipe.get("steps", 0)]
    if len(finished) < LEAST:
        raise UserError(
            f"{len(finished)} of {len(read)} runs are finished; give at least {LEAST} finished runs"
        )
    points = {medium: _points(finished, medium) for medium in MODALITIES}
    points = {medium: each for medium, each in points.items() if len(each) >= LEAST}
    if not points:
        raise UserError(f"no medium has a held-out loss in {LEAST} runs; give more runs")
    largest = max(point.flops for each in points.values() for point in each)
    target = flops if flops is not None else NEXT * largest
    if not target > 0 or not math.isfinite(target):
        raise UserError(f"--flops {target}: use the training compute of a run, such as 1e18")
    laws = {medium: fit_law(_compute(each), _nats(each)) for medium, each in points.items()}
    sizes = {medium: law for medium, each in points.items() if (law := _law_of_sizes(each))}
    write_atomic(out, _page(finished, points, laws, sizes, target))
    return {
        "page": str(out),
        "runs": [run.name for run in finished],
        "left_out": [run.name for run in read if run not in finished],
        "next_flops": target,
        "laws": {medium: _law_json(law, target) for medium, law in laws.items()},
        "laws_of_sizes": {medium: _sizes_json(law) for medium, law in sizes.items()},
    }


def _points(runs: Sequence[Run], medium: str) -> list[Point]:
    out = []
    for run in runs:
        if not run.evaluations:
            raise UserError(
                f"{run.folder} has no evaluations.jsonl; train with evaluate.every in the recipe"
            )
        per_id = flops_per_id(run.model)
        if not per_id:
            raise UserError(f"{run.folder}/recipe.toml names no model whose weights can be counted")
        last = run.evaluations[-1]
        nats = ((last.get("loss") or {}).get(medium) or {}).get("nats")
        if not isinstance(nats, int | float) or not nats > 0 or not math.isfinite(nats):
            continue
        done = run.get("step") <= last["step"]
        ids = float(np.nan_to_num(run.get(f"{medium} ids"))[done].sum())
        spent = float(training_flops(run)[done][-1])
        if ids and spent:
            out.append(Point(run.name, per_id[medium] / 6, ids, spent, float(nats)))
    return out


def _compute(points: Sequence[Point]) -> np.ndarray:
    return np.array([[point.flops] for point in points])


def _nats(points: Sequence[Point]) -> np.ndarray:
    return np.array([point.nats for point in points])


def _law_of_sizes(points: Sequence[Point]) -> Law | None:
    """Of weights and ids, where the runs tell them apart."""
    sizes = np.array([[point.weights, point.ids] for point in points])
    distinct = [len(np.unique(np.round(np.log(column), 1))) for column in sizes.T]
    if len(points) < 7 or min(distinct) < 3 or not separable(sizes):
        return None
    return fit_law(sizes, _nats(points))


def _law_json(law: Law, target: float) -> dict[str, Any]:
    return {
        "E": law.floor.to_json(),
        "A": law.factor().to_json(),
        "alpha": law.exponent().to_json(),
        "next_nats": _next(law, target).to_json(),
        "explained": round(law.explained, 4),
        "by_chance": law.by_chance,
        "law": law.by_chance < CHANCE,
    }


def _sizes_json(law: Law) -> dict[str, Any]:
    names = {"E": law.floor, "A": law.factor(0), "alpha": law.exponent(0)}
    names |= {"B": law.factor(1), "beta": law.exponent(1)}
    return {name: each.to_json() for name, each in names.items()} | {
        "explained": round(law.explained, 4),
        "by_chance": law.by_chance,
    }


def _next(law: Law, target: float) -> Estimate:
    return law.predict(np.array([[target]]), of_run=True)[0]


def _page(
    runs: Sequence[Run],
    points: dict[str, list[Point]],
    laws: dict[str, Law],
    sizes: dict[str, Law],
    target: float,
) -> str:
    names = [run.name for run in runs]
    panels = [_panel(medium, names, points[medium], law, target) for medium, law in laws.items()]
    text = (
        "Held-out nats per id at the end of each run over the compute of its training. The line is "
        "E + A C^-alpha, the band its 95% interval, dashed E, what no compute removes. Its end "
        f"is the prediction for {compact(target)} FLOPs."
    )
    chapters = {
        "compute": (
            "Loss over compute",
            tag("p", text, class_="prose")
            + hue_legend(names)
            + tag("div", *panels, class_="panels")
            + _laws_table(laws, target),
        ),
        "sizes": ("Loss over weights and ids", _sizes_table(sizes)),
        "runs": ("The runs", _runs_table(runs, points)),
    }
    if not sizes:
        del chapters["sizes"]
    kept = sum(law.by_chance < CHANCE for law in laws.values())
    lead = f"{len(runs)} finished runs; a law holds for {kept} of {len(laws)} media."
    return document("Scaling", lead, "", chapters, style=style())


def _panel(
    medium: str, names: Sequence[str], points: Sequence[Point], law: Law, target: float
) -> str:
    xs = np.geomspace(min(point.flops for point in points), target, 60)
    line = law.predict(xs[:, None])
    curve = Curve(
        f"{medium}, the law",
        hue(medium),
        xs,
        np.array([each.value for each in line]),
        low=np.array([each.low for each in line]),
        high=np.array([each.high for each in line]),
    )
    dots = [
        Curve(p.run, run_hue(names.index(p.run)), np.array([p.flops]), np.array([p.nats]))
        for p in sorted(points, key=lambda point: point.flops)
    ]
    frame = Frame(last=0, low=0, high=0, x_unit="FLOPs", log_x=True, left=46)
    chart = line_panel(medium, [curve, *dots], frame, reference=law.floor.value, values=1)
    judged = "" if law.by_chance < CHANCE else f" {DASH} no law: shuffled losses fit as well"
    return tag("figure", tag("figcaption", chip(medium) + judged), chart, class_="chart")


def _laws_table(laws: dict[str, Law], target: float) -> str:
    rows = [
        [
            chip(medium),
            _cell(law.floor),
            _cell(law.factor()),
            _cell(law.exponent()),
            _cell(_next(law, target)),
            percent(max(law.explained, 0.0)),
            percent(law.by_chance),
        ]
        for medium, law in laws.items()
    ]
    head = ["", "E", "A", "alpha", f"nats at {compact(target)} FLOPs", "explained", "by chance"]
    return table(head, rows, label="Laws of compute")


def _sizes_table(laws: dict[str, Law]) -> str:
    if not laws:
        return ""
    rows = [
        [chip(medium)]
        + [_cell(e) for e in (law.floor, law.factor(0), law.exponent(0))]
        + [_cell(e) for e in (law.factor(1), law.exponent(1))]
        + [percent(max(law.explained, 0.0)), percent(law.by_chance)]
        for medium, law in laws.items()
    ]
    text = "E + A N^-alpha + B D^-beta: N active weights of an id of the medium, D its ids."
    head = ["", "E", "A", "alpha", "B", "beta", "explained", "by chance"]
    return tag("p", text, class_="prose") + table(head, rows, label="Laws of weights and ids")


def _runs_table(runs: Sequence[Run], points: dict[str, list[Point]]) -> str:
    rows = []
    for index, run in enumerate(runs):
        by_medium = {m: p for m, each in points.items() for p in each if p.run == run.name}
        spent = max((point.flops for point in by_medium.values()), default=math.nan)
        nats = [number(by_medium[m].nats if m in by_medium else None, 3) for m in points]
        rows.append([chip(run.name, run_hue(index)), compact(spent), *nats])
    return table(["", "FLOPs", *(escape(f"{m}, nats") for m in points)], rows, label="Runs")


def _cell(estimate: Estimate) -> str:
    low, high = compact(estimate.low), compact(estimate.high)
    return f"{compact(estimate.value)} {tag('small', f'[{low}, {high}]')}"
