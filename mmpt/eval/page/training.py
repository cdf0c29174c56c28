"""The sections of a page on training runs, as HTML; empty when nothing was recorded."""

import base64
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmpt.eval.page.panels import figure, heading, most_points, run_chip, step_panel
from mmpt.eval.runs import Run, training_flops
from mmpt.page.curves import (
    Curve,
    known,
    line_panel,
    run_hue,
    smooth,
)
from mmpt.page.document import tile
from mmpt.page.frame import Frame, compact
from mmpt.page.markup import chip, duration, escape, hue, number, plain, table, tag

AXES = {"steps": "step", "ids": "tokens", "FLOPs": "flops", "seconds": "seconds"}
LATE = 0.05  # the last share of a run that its table tells of
MAX_SAMPLES, MAX_SAMPLE_BYTES = 12, 400_000  # of a page
SAMPLES = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg", ".wav": "audio/wav"}


def lead(runs: Sequence[Run]) -> str:
    """A sentence on all of them."""
    done = sum(_state(run) == "finished" for run in runs)
    ids = sum(_last(run.get("tokens")) or 0.0 for run in runs)
    what = "One training run" if len(runs) == 1 else f"{len(runs)} training runs"
    state = "finished" if done == len(runs) else f"{done} of {len(runs)} finished"
    return f"{what}, {state}: {compact(ids)} ids read."


def overview(runs: Sequence[Run]) -> str:
    """Key figures of one run, or a row of them for each of several."""
    if len(runs) == 1:
        cells = _figures(runs[0])
        return tag("ul", *(tile(name, value, unit) for name, value, unit in cells), class_="tiles")
    names = [name for name, _, _ in _figures(runs[0])]
    media = list(dict.fromkeys(name for run in runs for name in run.media))
    rows = []
    for index, run in enumerate(runs):
        figures = [f"{value} {tag('small', unit)}" for _, value, unit in _figures(run)[:6]]
        losses = [number(_late(run, f"{name} loss", f"{name} ids")) for name in media]
        rows.append([run_chip(run, index), *figures, *losses])
    head = ["", *names[:6], *(f"{name}, nats" for name in media)]
    return table(head, rows, label="Runs")


def losses(runs: Sequence[Run]) -> str:
    """Loss by medium against steps, ids, FLOPs and seconds."""
    flops = [training_flops(run) for run in runs]
    inputs, panels = [], []
    for unit, column in AXES.items():
        drawn = [_loss(runs, flops, medium, column, unit) for medium in _media(runs)]
        drawn = [each for each in drawn if each]
        if drawn:
            first = not inputs
            key = f"axis-{column}"
            inputs.append(
                tag("input", type="radio", name="axis", id=key, checked=first)
                + tag("label", f"over {unit}", for_=key)
            )
            panels.append(tag("div", *drawn, class_="panels"))
    if not panels:
        return ""
    text = "Nats per id of each medium, as trained on" + (
        ": every step faint, their moving mean strong." if len(runs) == 1 else ", smoothed."
    )
    text += " FLOPs are six times the weights that an id of the medium uses, for each id."
    return tag("p", text, class_="prose") + tag("div", *inputs, *panels, class_="axis")


def optimisation(runs: Sequence[Run]) -> str:
    """Learning rate, gradient norm, and which steps were skipped and why."""
    panels = [
        step_panel(
            runs, "learning rate", "lr", Frame(last=0, low=0, high=0, y_unit="rate", left=46)
        ),
        step_panel(
            runs,
            "gradient norm",
            "grad_norm",
            Frame(last=0, low=0, high=0, y_unit="norm", log_y=True, left=46),
            faint=len(runs) == 1,
        ),
    ]
    rows = []
    for index, run in enumerate(runs):
        for reason, count in Counter(reason for _, reason in run.skipped).most_common():
            steps = [step for step, why in run.skipped if why == reason]
            shown = ", ".join(f"{step:,}" for step in steps[:8]) + (" ..." if count > 8 else "")
            rows.append([run_chip(run, index), escape(reason), number(count), shown])
    skipped = (
        table(["", "why", "steps", "which"], rows, label="Skipped steps")
        if rows
        else tag("p", "No step was skipped.", class_="prose")
    )
    return tag("div", *panels, class_="panels") + tag("h3", "skipped steps") + skipped


def samples(runs: Sequence[Run]) -> str:
    """Pictures and sounds that stand in `samples` of a run folder, the newest first."""
    out, count, size = [], 0, 0
    for run in runs:
        found = [p for p in (run.folder / "samples").rglob("*") if p.suffix.lower() in SAMPLES]
        found.sort(key=lambda path: (-path.stat().st_mtime, path.name))
        figures = []
        for path in found:
            if count < MAX_SAMPLES and size + path.stat().st_size < MAX_SAMPLE_BYTES:
                count, size = count + 1, size + path.stat().st_size
                figures.append(_sample(path, str(path.relative_to(run.folder / "samples"))))
        if figures:
            rest = len(found) - len(figures)
            more = tag("p", f"{rest} more are in the folder.", class_="prose") if rest else ""
            out.append(heading(run, runs) + tag("div", *figures, class_="cells") + more)
    return "".join(out)


def recipes(runs: Sequence[Run]) -> str:
    """The keys whose values are not the same in all runs; the whole recipe of a single one."""
    keys = sorted({key for run in runs for key in run.recipe})
    if len(runs) > 1:
        keys = [key for key in keys if len({repr(run.recipe.get(key)) for run in runs}) > 1]
    rows = [[escape(key), *(plain(run.recipe.get(key)) for run in runs)] for key in keys]
    if not rows:
        same = "The recipes do not differ." if any(run.recipe for run in runs) else ""
        return tag("p", same, class_="prose") if same else ""
    head = ["", *(run_chip(run, i) if len(runs) > 1 else "value" for i, run in enumerate(runs))]
    return table(head, rows, label="Recipes")


def _figures(run: Run) -> list[tuple[str, str, str]]:
    steps, planned = run.get("step")[-1], run.recipe.get("steps")
    flops = _last(training_flops(run))
    speed = np.nansum(run.get("step_tokens")) / (np.nansum(run.get("step_seconds")) or math.nan)
    return [
        ("state", _state(run), ""),
        ("steps", number(int(steps)), f"of {number(planned)}" if planned else ""),
        ("ids read", compact(_last(run.get("tokens")) or 0.0), ""),
        ("training FLOPs", compact(flops) if flops else number(None), ""),
        ("time in steps", duration(_last(run.get("seconds"))), ""),
        ("throughput", compact(float(speed)) if math.isfinite(speed) else number(None), "ids/s"),
    ]


def _state(run: Run) -> str:
    planned = run.recipe.get("steps")
    return "finished" if isinstance(planned, int) and run.get("step")[-1] >= planned else "not done"


def _media(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.media))


def _last(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def _late(run: Run, column: str, weights: str) -> float:
    """The mean over the last steps."""
    first = -max(int(LATE * run.num_steps), 1)
    values, weight = run.get(column)[first:], np.nan_to_num(run.get(weights)[first:])
    here = np.isfinite(values) & (weight > 0)
    return float(np.average(values[here], weights=weight[here])) if here.any() else math.nan


def _loss(
    runs: Sequence[Run], flops: Sequence[np.ndarray], medium: str, column: str, unit: str
) -> str:
    curves = []
    for index, (run, spent) in enumerate(zip(runs, flops, strict=True)):
        ys, ids = run.get(f"{medium} loss"), run.get(f"{medium} ids")
        xs = spent if column == "flops" else run.get(column)
        here = known(xs, ys) & (np.nan_to_num(xs) > 0)
        if here.any():
            mean = smooth(ys[here], ids[here])
            one = len(runs) == 1
            colour = hue(medium) if one else run_hue(index)
            curves.append(Curve(run.name, colour, xs[here], mean, ys[here] if one else None))
    frame = Frame(last=0, low=0, high=0, x_unit=unit)
    return figure(chip(medium), line_panel(medium, curves, frame, points=most_points(runs)))


def _sample(path: Path, name: str) -> str:
    uri = f"data:{SAMPLES[path.suffix.lower()]};base64,"
    uri += base64.b64encode(path.read_bytes()).decode()
    sound = path.suffix.lower() == ".wav"
    what = (
        tag("audio", controls=True, src=uri, aria_label=name)
        if sound
        else tag("img", src=uri, alt=name)
    )
    return tag("figure", tag("figcaption", escape(name)), what, class_="sample")
