"""The sections of a page on training runs, as HTML; empty when nothing was recorded."""

import base64
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mmpt.eval.page import shares
from mmpt.eval.runs import Run, Window, training_flops
from mmpt.page.curves import (
    Curve,
    hue_legend,
    known,
    line_panel,
    run_hue,
    smooth,
    stacked_panel,
)
from mmpt.page.document import tile
from mmpt.page.frame import Frame, compact
from mmpt.page.markup import chip, duration, escape, hue, number, percent, plain, table, tag

AXES = {"steps": "step", "ids": "tokens", "FLOPs": "flops", "seconds": "seconds"}
LATE = 0.05  # the last share of a run that its table tells of
DEAD = 0.1  # of an even share: an expert with less in the last window is dead
MAX_SAMPLES, MAX_SAMPLE_BYTES = 12, 400_000  # of a page
SAMPLES = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg", ".wav": "audio/wav"}

STYLE = """
.r-0 { --hue: #3a82e6; } .r-1 { --hue: #d4601c; } .r-2 { --hue: #0d8a63; } .r-3 { --hue: #9a3486; }
.r-4 { --hue: #a98600; } .r-5 { --hue: #5b5bd6; } .r-6 { --hue: #c2334d; } .r-7 { --hue: #5d7a8c; }
@media (prefers-color-scheme: dark) {
  .r-0 { --hue: #6c9cf8; } .r-1 { --hue: #f28a45; } .r-2 { --hue: #5fe3b0; }
  .r-3 { --hue: #e3aee6; } .r-4 { --hue: #e2c04a; } .r-5 { --hue: #a5a3ff; }
  .r-6 { --hue: #ff8496; } .r-7 { --hue: #a3bccb; }
}
.dashed .line { stroke-dasharray: 5 3; }
.band { fill: var(--hue); fill-opacity: .14; } .panel circle { fill: var(--hue); }
.bands .fill { stroke: var(--page); stroke-width: .6; }
.axis { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; }
.axis > .panels { flex: 1 0 100%; display: none; }
.axis input { position: absolute; opacity: 0; }
.axis label { border: 1px solid var(--line); border-radius: 99px; padding: 2px 14px;
  cursor: pointer; font-size: .875rem; color: var(--soft); }
.axis input:checked + label { background: var(--ink); color: var(--page); }
.axis input:focus-visible + label { outline: 2px solid var(--text); outline-offset: 2px; }
.axis input:nth-of-type(1):checked ~ .panels:nth-of-type(1),
.axis input:nth-of-type(2):checked ~ .panels:nth-of-type(2),
.axis input:nth-of-type(3):checked ~ .panels:nth-of-type(3),
.axis input:nth-of-type(4):checked ~ .panels:nth-of-type(4) { display: grid; }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
h3::first-letter { text-transform: none; } .tiles strong { font-size: 1.5rem; }
.panel .value { fill: var(--hue); }
.sample { flex: 1 1 320px; max-width: 640px; } .sample img { display: block; max-width: 100%; }
.sample figcaption { font-size: .8125rem; color: var(--soft); margin-bottom: 6px; }
td .chip { font-weight: 400; }
"""


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
        rows.append([_run_chip(run, index), *figures, *losses])
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
        _panel(runs, "learning rate", "lr", Frame(last=0, low=0, high=0, y_unit="rate", left=46)),
        _panel(
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
            rows.append([_run_chip(run, index), escape(reason), number(count), shown])
    skipped = (
        table(["", "why", "steps", "which"], rows, label="Skipped steps")
        if rows
        else tag("p", "No step was skipped.", class_="prose")
    )
    return tag("div", *panels, class_="panels") + tag("h3", "skipped steps") + skipped


def mix(runs: Sequence[Run]) -> str:
    """Shares of sources and of media in what was read, over training."""
    out = []
    for run in runs:
        media = {name: np.nan_to_num(run.get(f"{name} ids")) for name in run.media}
        tokens = np.nan_to_num(run.get("tokens"))
        read = {
            name: np.diff(np.nan_to_num(run.get(f"source {name}")) * tokens, prepend=0.0)
            for name in run.names("source ")
        }
        parts = [
            _stacked(run, "source", read, [run_hue(number) for number in range(len(read))]),
            _stacked(run, "medium", media, [hue(name) for name in media]),
        ]
        if any(parts):
            title = _heading(run, runs)
            out.append(title + tag("div", *parts, class_="panels"))
    return "".join(out)


def experts(runs: Sequence[Run]) -> str:
    """Load per layer x group x expert at the end, how even it was over training, dead experts."""
    groups = list(dict.fromkeys(g for run in runs for w in run.windows for g in w.loads))
    several = [g for g in groups if any(_num_experts(run, g) > 1 for run in runs)]
    if not several:
        return ""
    frame = Frame(last=0, low=0, high=0, y_unit="evenness", left=46)
    even = [_window_panel(runs, f"{group} experts", frame, _evenness(group)) for group in several]
    router = list(dict.fromkeys(name for run in runs for name in run.names("entropy ")))
    nats = Frame(last=0, low=0, high=0, y_unit="nats", left=46)
    even += [_panel(runs, f"router entropy of {g}", f"entropy {g}", nats) for g in router]
    text = (
        "Evenness is the entropy of an expert's shares beside that of even shares: 1 is all alike, "
        "mean over layers. The maps are of the last stretch of each run: rows are layers, columns "
        "experts; half colour is an even share, full colour twice that. "
        f"An expert with less than {percent(DEAD)} of an even share counts as dead."
    )
    maps = tag("div", *(_expert_maps(run, several, runs) for run in runs), class_="panels")
    return tag("p", text, class_="prose") + tag("div", *even, class_="panels") + maps


def time(runs: Sequence[Run]) -> str:
    """Ids a second, and the seconds of a step by what they went into."""
    with np.errstate(divide="ignore", invalid="ignore"):
        speeds = [run.get("step_tokens") / run.get("step_seconds") for run in runs]
    frame = Frame(last=0, low=0, high=0, y_unit="ids/s", left=46)
    speed = _figure(
        "throughput", line_panel("throughput", _curves(runs, speeds, faint=len(runs) == 1), frame)
    )
    bars, rows = [], []
    for index, run in enumerate(runs):
        laps = {name: sum(w.laps.get(name, 0.0) for w in run.windows) for name in _laps(run)}
        total = sum(w.seconds for w in run.windows) or math.nan
        if laps:
            laps["other"] = max(total - sum(laps.values()), 0.0)
            per_step = [f"{1000 * laps[name] / run.num_steps:,.0f}" for name in laps]
            cells = [f"{name} {ms} ms" for name, ms in zip(laps, per_step, strict=True)]
            rows.append([_run_chip(run, index), ", ".join(map(escape, cells))])
            shown = {name: value for name, value in laps.items() if value > 0}
            hues = {name: run_hue(number) for number, name in enumerate(shown)}
            title = f"a step of {escape(run.name)}" if len(runs) > 1 else "where a step's time goes"
            bars.append(_figure(title, shares.stacked_bar(shown, hues)))
    laps_table = table(["", "milliseconds a step"], rows, label="Laps") if rows else ""
    return tag("div", speed, *bars, class_="panels") + laps_table


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
            out.append(_heading(run, runs) + tag("div", *figures, class_="cells") + more)
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
    head = ["", *(_run_chip(run, i) if len(runs) > 1 else "value" for i, run in enumerate(runs))]
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


def _run_chip(run: Run, index: int) -> str:
    return chip(run.name, run_hue(index))


def _heading(run: Run, runs: Sequence[Run]) -> str:
    """The name of one of several runs."""
    return tag("h3", _run_chip(run, list(runs).index(run))) if len(runs) > 1 else ""


def _figure(title: str, chart: str) -> str:
    return tag("figure", tag("figcaption", title), chart, class_="chart") if chart else ""


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
    return _figure(chip(medium), line_panel(medium, curves, frame, points=_points(runs)))


def _points(runs: Sequence[Run]) -> int:
    return max(600 // max(len(runs) // 3, 1), 60)  # so that the page stays small


def _curves(
    runs: Sequence[Run], columns: Sequence[np.ndarray], *, faint: bool = False
) -> list[Curve]:
    out = []
    for index, (run, ys) in enumerate(zip(runs, columns, strict=True)):
        here = known(run.get("step"), ys)
        if here.any():
            xs, ys = run.get("step")[here], ys[here]
            mean = smooth(ys, share=0.01) if faint else ys
            out.append(Curve(run.name, run_hue(index), xs, mean, ys if faint else None))
    return out


def _panel(
    runs: Sequence[Run], title: str, column: str, frame: Frame, *, faint: bool = False
) -> str:
    columns = [run.get(column) for run in runs]
    if frame.log_y:
        columns = [np.where(values > 0, values, math.nan) for values in columns]
    curves = _curves(runs, columns, faint=faint)
    return _figure(title, line_panel(title, curves, frame, points=_points(runs)))


def _window_panel(
    runs: Sequence[Run], title: str, frame: Frame, value: Callable[[Window], float]
) -> str:
    curves = []
    for index, run in enumerate(runs):
        xs = np.array([window.step for window in run.windows])
        ys = np.array([value(window) for window in run.windows])
        here = known(xs, ys)
        curves.append(Curve(run.name, run_hue(index), xs[here], ys[here]))
    return _figure(title, line_panel(title, curves, frame))


def _evenness(group: str) -> Callable[[Window], float]:
    def value(window: Window) -> float:
        loads = window.loads.get(group)
        if loads is None or loads.shape[1] < 2 or not loads.sum():
            return math.nan
        share = loads / np.maximum(loads.sum(1, keepdims=True), 1)
        entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(1)
        return float(entropy.mean() / math.log(loads.shape[1]))

    return value


def _num_experts(run: Run, group: str) -> int:
    return max((w.loads[group].shape[1] for w in run.windows if group in w.loads), default=0)


def _expert_maps(run: Run, groups: Sequence[str], runs: Sequence[Run]) -> str:
    window = run.windows[-1]
    maps = []
    for group in groups:
        loads = window.loads.get(group)
        if loads is None or not loads.any():
            continue
        even = loads.sum(1, keepdims=True) / loads.shape[1]
        dead = int((loads < DEAD * even).sum())
        words = f"{group}: {dead} of {loads.size} experts dead" if dead else f"{group}: none dead"
        colour = group.removeprefix("noisy_")
        colour = {"visual": "image"}.get(colour, colour)
        chart = tag(
            "div",
            shares.heat_map(group, loads, colour),
            class_="scroll",
            tabindex=0,
            role="region",
            aria_label=f"Expert load of {group} in {run.name}",
        )
        maps.append(tag("figure", tag("figcaption", escape(words)), chart, class_="heat"))
    heading = _heading(run, runs)
    return tag("div", heading, tag("div", *maps, class_="heat-maps")) if maps else ""


def _stacked(run: Run, what: str, parts: dict[str, np.ndarray], hues: Sequence[str]) -> str:
    if not parts:
        return ""
    bounds = np.linspace(0, run.num_steps, min(run.num_steps, 60) + 1).round().astype(int)
    sums = {n: np.maximum(np.add.reduceat(v, bounds[:-1]), 0.0) for n, v in parts.items()}
    total = np.maximum(sum(sums.values()), 1e-9)
    steps = run.get("step")[bounds[1:] - 1]
    frame = Frame(last=0, low=0, high=0, y_unit="share", left=46)
    values = {name: each / total for name, each in sums.items()}
    panel = stacked_panel(f"shares by {what}", steps, values, hues, frame)
    return _figure(f"by {what}", panel + hue_legend(list(parts), hues))


def _laps(run: Run) -> list[str]:
    return list(dict.fromkeys(name for window in run.windows for name in window.laps))


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
