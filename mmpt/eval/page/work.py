"""What runs read, which experts did the work, and where the time went, as HTML."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mmpt.eval.page import shares
from mmpt.eval.page.panels import (
    figure,
    heading,
    run_chip,
    step_curves,
    step_panel,
    window_panel,
)
from mmpt.eval.runs import Run, Window
from mmpt.page.curves import hue_legend, line_panel, run_hue, stacked_panel
from mmpt.page.frame import Frame
from mmpt.page.markup import escape, hue, percent, table, tag

DEAD = 0.1  # of an even share: an expert with less in the last window is dead


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
            title = heading(run, runs)
            out.append(title + tag("div", *parts, class_="panels"))
    return "".join(out)


def experts(runs: Sequence[Run]) -> str:
    """Load per layer x group x expert at the end, how even it was over training, dead experts."""
    groups = list(dict.fromkeys(g for run in runs for w in run.windows for g in w.loads))
    several = [g for g in groups if any(_num_experts(run, g) > 1 for run in runs)]
    if not several:
        return ""
    frame = Frame(last=0, low=0, high=0, y_unit="evenness", left=46)
    even = [window_panel(runs, f"{group} experts", frame, _evenness(group)) for group in several]
    router = list(dict.fromkeys(name for run in runs for name in run.names("entropy ")))
    even += [step_panel(runs, f"router entropy of {g}", f"entropy {g}", frame) for g in router]
    text = (
        "Evenness is the entropy of an expert's shares beside that of even shares: 1 is all alike, "
        "mean over layers; a router's entropy is that of its mean scores. The maps are of the last "
        "stretch of each run: rows are layers, columns experts; half colour is an even share, "
        f"full colour twice that. An expert with less than {percent(DEAD)} of an even share counts "
        "as dead."
    )
    maps = tag("div", *(_expert_maps(run, several, runs) for run in runs), class_="panels")
    return tag("p", text, class_="prose") + tag("div", *even, class_="panels") + maps


def time(runs: Sequence[Run]) -> str:
    """Ids a second, and the seconds of a step by what they went into."""
    with np.errstate(divide="ignore", invalid="ignore"):
        speeds = [run.get("step_tokens") / run.get("step_seconds") for run in runs]
    frame = Frame(last=0, low=0, high=0, y_unit="ids/s", left=46)
    speed = figure(
        "throughput",
        line_panel("throughput", step_curves(runs, speeds, faint=len(runs) == 1), frame),
    )
    bars, rows = [], []
    for index, run in enumerate(runs):
        laps = {name: sum(w.laps.get(name, 0.0) for w in run.windows) for name in _laps(run)}
        total = sum(w.seconds for w in run.windows) or math.nan
        if laps:
            laps["other"] = max(total - sum(laps.values()), 0.0)
            per_step = [f"{1000 * laps[name] / run.num_steps:,.0f}" for name in laps]
            cells = [f"{name} {ms} ms" for name, ms in zip(laps, per_step, strict=True)]
            rows.append([run_chip(run, index), ", ".join(map(escape, cells))])
            shown = {name: value for name, value in laps.items() if value > 0}
            hues = {name: run_hue(number) for number, name in enumerate(shown)}
            title = f"a step of {escape(run.name)}" if len(runs) > 1 else "where a step's time goes"
            bars.append(figure(title, shares.stacked_bar(shown, hues)))
    laps_table = table(["", "milliseconds a step"], rows, label="Laps") if rows else ""
    return tag("div", speed, *bars, class_="panels") + laps_table


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
    rows = tag("div", *maps, class_="heat-maps")
    return tag("div", heading(run, runs), rows) if maps else ""


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
    return figure(f"by {what}", panel + hue_legend(list(parts), hues))


def _laps(run: Run) -> list[str]:
    return list(dict.fromkeys(name for window in run.windows for name in window.laps))
